"""A proxy in the environment is for other machines: this one is asked without it."""

from __future__ import annotations

import sys

import httpx
import pytest

from sglang_minimax.accuracy import endpoint, proxies, run_tools
from sglang_minimax.accuracy.errors import AccuracyError
from sglang_minimax.accuracy.settings import ToolSettings
from sglang_minimax.cli.local_server import LocalServer
from tests.accuracy.conftest import Serve
from tests.accuracy.fake_server import Said

#: Nothing listens there, so what goes through it fails.
PROXY = "http://127.0.0.1:9"


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy for everything."""
    for name in ("NO_PROXY", "no_proxy", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", PROXY)


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://127.0.0.1:30000", True),
        ("http://127.3.0.1", True),
        ("http://localhost:1/v1", True),
        ("http://[::1]:30000", True),
        ("http://10.0.0.1:30000", False),
        ("https://localhost.example.org", False),
        ("http://", False),
    ],
)
def test_loopback(url: str, loopback: bool) -> None:
    assert proxies.is_loopback(url) is loopback


@pytest.mark.usefixtures("proxy")
def test_both_clients_go_past_the_proxy(serve: Serve) -> None:
    """The look at the server, and the openai client's questions, whole and streamed."""
    server = serve(lambda body: Said("#### 1"))
    settings = ToolSettings(url=server.url, limit=1, retries=0, timeout=20.0)
    assert run_tools(settings).figures["cases"] == 1


@pytest.mark.usefixtures("proxy")
@pytest.mark.parametrize("client", ["look", "openai"])
def test_through_the_proxy_nothing_answers(
    client: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake, in each client: an address that is not known to be of this machine."""
    server = serve(lambda body: Said("#### 1"))
    settings = ToolSettings(url=server.url, limit=1, retries=0, timeout=20.0)
    looked = endpoint.look(settings)
    if client == "openai":
        monkeypatch.setattr("sglang_minimax.accuracy.tools.look", lambda settings: looked)
    monkeypatch.setattr(endpoint, "is_loopback", lambda url: False)
    with pytest.raises(AccuracyError, match="no server" if client == "look" else "requests failed"):
        run_tools(settings)


@pytest.mark.usefixtures("proxy")
def test_sglangs_benchmark_goes_past_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    from requests.utils import get_environ_proxies

    url = "http://127.0.0.1:30000"
    assert get_environ_proxies(url)
    monkeypatch.setenv("NO_PROXY", "example.org")
    for name, value in proxies.without_proxy(url).items():
        monkeypatch.setenv(name, value)
    assert not get_environ_proxies(url)
    assert not get_environ_proxies("http://example.org")
    assert get_environ_proxies("http://10.0.0.1")
    assert proxies.without_proxy("http://10.0.0.1") == {}


HEALTHY = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.usefixtures("proxy")
def test_our_own_server_is_seen_past_the_proxy() -> None:
    server = LocalServer()
    server.command = [sys.executable, "-c", HEALTHY, str(server.port)]
    with server.running(timeout=60), pytest.raises(httpx.HTTPError):
        httpx.get(f"{server.url}/health", timeout=5)
