"""The parts of `LocalServer`, `serve` and `demo` that need no server."""

from __future__ import annotations

import random
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from sglang_minimax.cli import local_server
from sglang_minimax.cli.demo import calculate, final_answer
from sglang_minimax.cli.local_server import LocalServer, ServerFailed
from sglang_minimax.cli.serve import curl_line


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("fd00::7", "http://[fd00::7]:8000"),
    ],
)
def test_the_address_is_one_that_a_client_can_use(host: str, url: str) -> None:
    assert LocalServer(host=host, port=8000).url == url


def test_the_curl_line_survives_a_shell() -> None:
    words = shlex.split(curl_line("http://127.0.0.1:8000").replace("\\\n", ""))
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:8000/v1/chat/completions"]
    assert words[-1].startswith('{"messages": [')


def test_a_server_that_ends_is_an_error_with_its_status() -> None:
    server = LocalServer()
    server.command = [sys.executable, "-c", "raise SystemExit(7)"]
    server.start()
    with pytest.raises(ServerFailed, match="status 7"):
        server.wait_until_ready(timeout=None)
    server.stop()


def test_a_server_that_does_not_answer_is_stopped_with_its_children() -> None:
    server = LocalServer()
    child = "import time; time.sleep(600)"
    server.command = [
        *(sys.executable, "-c"),
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()",
    ]
    with pytest.raises(ServerFailed, match="did not answer within 2 s"), server.running(timeout=2):
        pass
    assert server.family() == []


#: `serve` with a server that needs long, interrupted by signal {number} in the middle of {what}.
INTERRUPTED = """
import os, subprocess, sys
from sglang_minimax import TINY_M2
from sglang_minimax.cli import local_server, serve

class Slow(local_server.LocalServer):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.command = [sys.executable, "-c", "import time; time.sleep(600)"]

    def wait_until_ready(self, *arguments, **options):
        if {what!r} == "an import":  # a dataclass is text that is executed
            exec("os.kill(os.getpid(), {number})")
        return super().wait_until_ready(*arguments, **options)

class Popen(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        print("child", self.pid, flush=True)
        if {what!r} == "the start":
            os.kill(os.getpid(), {number})

subprocess.Popen = Popen
serve.LocalServer = Slow
sys.exit(serve.serve(TINY_M2, "127.0.0.1", local_server.free_port(), []))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("what", ["the start", "an import", "the wait"])
def test_serve_ends_well_wherever_the_signal_meets_it(
    what: str, number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "interrupted.py").write_text(INTERRUPTED.format(what=what, number=int(number)))
    command = [sys.executable, "-m", "interrupted"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        child = next(line for line in process.stdout if line.startswith("child"))
        if what == "the wait":
            process.send_signal(number)
        printed = process.stdout.read()
        assert process.wait(30) == 0
    assert "stopping" in printed
    assert not psutil.pid_exists(int(child.split()[1]))


def test_a_free_port_is_none_that_a_socket_of_the_ranks_may_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        lowest = local_server._first_ephemeral_port()
        assert 0 < lowest <= other.getsockname()[1]
    assert all(16384 <= local_server.free_port() < lowest for _ in range(50))
    # Where the kernel gives out all of them, or does not say.
    for range_of_ports in ("1024 65535", ""):
        (tmp_path / "range").write_text(range_of_ports)
        monkeypatch.setattr(local_server, "_EPHEMERAL_PORTS", tmp_path / "range")
        assert local_server.free_port() > 0


def test_a_free_port_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", local_server.free_port()))
        port = taken.getsockname()[1]
        monkeypatch.setattr(random.SystemRandom, "choice", lambda self, ports: port)
        assert local_server.free_port() != port


def test_a_model_that_is_no_folder_is_one_sentence(tmp_path: Path) -> None:
    command = [*(sys.executable, "-m", "sglang_minimax.cli.main", "serve", "--model")]
    ended = subprocess.run([*command, str(tmp_path / "no")], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert str(tmp_path / "no") in line
    assert "--model" in line


def test_stop_before_start_does_nothing() -> None:
    LocalServer().stop()


@pytest.mark.parametrize(
    ("expression", "value"),
    [("12 + 30", "42"), ("812-349", "463"), ("2 * 3", "cannot evaluate '2 * 3'")],
)
def test_the_calculator(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("text", "answer"),
    [("so\n#### 85", 85), ("#### 1 then #### -2", -2), ("85", None), (None, None)],
)
def test_the_final_answer(text: Any, answer: int | None) -> None:
    assert final_answer(text) == answer
