"""A server starts, serves loopback only, sleeps when idle, and leaves nothing, however it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from sglang_minimax.cli.local_server import LocalServer, free_port
from tests.conftest import listens, remaining

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

CLI = (sys.executable, "-m", "sglang_minimax.cli.main")


def ask(url: str) -> str:
    """A short answer of the server at `url`."""
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello!"}], "temperature": 0}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    answer.raise_for_status()
    return answer.json()["choices"][0]["message"]["content"]


def listeners(family: list[psutil.Process]) -> dict[tuple[str, int], str]:
    """(address, port) -> process name, of every listening socket of a family."""
    return {
        (connection.laddr.ip, connection.laddr.port): process.name()
        for process in family
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }


# --- while it runs -------------------------------------------------------------------------


def test_the_family_is_complete(server: LocalServer) -> None:
    """What the tests below count on: they see the ranks, not only the HTTP process."""
    names = " ".join(process.name() for process in server.family())
    assert "sglang::schedul" in names
    assert "sglang::detoken" in names


def test_the_http_port_is_on_loopback_only(server: LocalServer) -> None:
    addresses = {address for address, port in listeners(server.family()) if port == server.port}
    assert addresses == {"127.0.0.1"}


def test_every_port_is_on_loopback(server: LocalServer) -> None:
    open_to_others = {
        where: name
        for where, name in listeners(server.family()).items()
        if where[0] not in ("127.0.0.1", "::1")
    }
    assert open_to_others == {}


def test_an_idle_server_sleeps(server: LocalServer) -> None:
    ask(server.url)
    family = server.family()

    def used() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in family)

    before, begin = used(), time.monotonic()
    time.sleep(3)
    # A rank that polls takes a whole core; observed below 0.02.
    assert (used() - before) / (time.monotonic() - begin) < 0.1


# --- how it ends ---------------------------------------------------------------------------


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[LocalServer]:
    """A server that a test may end."""
    with (tmp_path / "log").open("wb") as log:
        server = LocalServer(arguments=["--log-level", "warning"], log=log)
        with server.running():
            yield server


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL],
)
def test_a_signal_ends_the_whole_family(number: signal.Signals, own_server: LocalServer) -> None:
    """To the HTTP process alone; the others must notice by themselves."""
    assert ask(own_server.url)
    family = own_server.family()
    ports = [port for _, port in listeners(family)]
    assert len(family) >= 3
    assert own_server.pid is not None
    os.kill(own_server.pid, number)
    deadline = time.monotonic() + 30
    ended = own_server.wait(give_up=lambda: time.monotonic() > deadline)
    assert ended is not None, "still runs"
    # SIGKILL leaves the others to find out that their parent is gone.
    assert remaining(family, timeout=20) == []
    deadline = time.monotonic() + 10
    while any(map(listens, ports)):  # the kernel closes the sockets of a killed process in its time
        assert time.monotonic() < deadline, "a port is still listened on"
        time.sleep(0.1)


# --- the command ---------------------------------------------------------------------------


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[int], subprocess.Popen[bytes]]]:
    """Start `sglang-minimax serve --port N` in a process group of its own."""
    started: list[subprocess.Popen[bytes]] = []

    def start(port: int) -> subprocess.Popen[bytes]:
        with (tmp_path / "serve.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    [*CLI, "serve", "--port", str(port)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                    # As in a terminal; a shell starts background jobs with SIGINT ignored.
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                )
            )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_until_serving(process: subprocess.Popen[bytes], port: int) -> None:
    """Return when the server answers; fail if it ends first."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "ended before it served"
        if listens(port) and httpx.get(f"http://127.0.0.1:{port}/health", timeout=30).is_success:
            return
        time.sleep(0.2)
    pytest.fail("did not serve within 120 s")


@pytest.mark.parametrize("when", ["serving", "starting"])
def test_ctrl_c_ends_the_command_and_its_server(when: str, serve: Any) -> None:
    """A terminal sends SIGINT to the foreground process group."""
    port = free_port()
    process = serve(port)
    root = psutil.Process(process.pid)
    if when == "serving":
        wait_until_serving(process, port)
        assert ask(f"http://127.0.0.1:{port}")
    deadline = time.monotonic() + 60
    while not root.children() and time.monotonic() < deadline:
        time.sleep(0.05)
    family = root.children(recursive=True)
    assert family, "no server was started"
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 0
    assert remaining(family) == []
    assert not listens(port)


def test_a_taken_port_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [*CLI, "serve", "--port", str(port)], capture_output=True, text=True, timeout=120
        )
    assert ended.returncode == 1
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1, ended.stderr
    assert str(port) in lines[0]
    assert "taken" in lines[0]
    assert "--port" in lines[0]
