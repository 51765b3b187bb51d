"""Start SGLang's server as a child process, wait until it answers, and leave nothing behind.

Used by `serve`, `demo` and the tests. The command is the one a user would type.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import httpx
import psutil

from sglang_minimax import TINY_M2
from sglang_minimax.errors import MinimaxError

#: What a chat with MiniMax-M2 needs beside the model.
PARSERS = ("--tool-call-parser", "minimax-m2", "--reasoning-parser", "minimax")

#: Seconds between two looks at a process.
POLL = 0.2

_PR_SET_PDEATHSIG = 1
_EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST_PORT = 16384


class ServerFailed(MinimaxError):
    """The server ended, or did not answer in time."""


def free_port() -> int:
    """A TCP port of the loopback interface that is free at this moment.

    Below those that the kernel gives out by itself, where there are such: a server opens its port
    only after its ranks have opened dozens for each other.
    """
    below = range(_LOWEST_PORT, _first_ephemeral_port())
    # Not of the seed that a test may have set: processes would all choose alike.
    tries = [random.SystemRandom().choice(below) for _ in range(100)] if below else []
    for port in (*tries, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise ServerFailed("no TCP port of 127.0.0.1 is free.")


def _first_ephemeral_port() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(_EPHEMERAL_PORTS.read_text().split()[0])
    return 0


class LocalServer:
    """A `python -m sglang.launch_server` process and its children.

    model: a checkpoint folder. arguments: further options, as on the command line.
    log: where the server's output goes; None lets it through to ours.
    """

    def __init__(
        self,
        model: Path | str = TINY_M2,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        log: IO[bytes] | None = None,
    ) -> None:
        self.host = host
        self.port = port or free_port()
        self.command = [
            *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)),
            *("--host", host, "--port", str(self.port), *PARSERS, *arguments),
        ]
        self._environment = {**os.environ, "PYTHONWARNINGS": "ignore", **(environment or {})}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    @property
    def url(self) -> str:
        """The server's base address, as a client on this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The process id of the HTTP server, None before `start`."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process and return at once."""
        with socket.socket() as probe:
            if probe.connect_ex((self.host, self.port)) == 0:
                raise ServerFailed(
                    f"port {self.port} of {self.host} is taken; choose another with --port."
                )
        # A session of its own, so that Ctrl-C reaches us alone and we can end it in order.
        self._process = subprocess.Popen(
            self.command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT if self._log else None,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )

    def wait_until_ready(
        self, timeout: float | None = 300.0, *, give_up: Callable[[], bool] = lambda: False
    ) -> bool:
        """Whether the server answers; False as soon as `give_up` says so.

        Raises ServerFailed if it ends or takes `timeout` s; None waits as long as the process
        lives: a large checkpoint takes its time.
        """
        if self._process is None:
            raise RuntimeError("start() comes first")
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while time.monotonic() < deadline:
            if give_up():
                return False
            if self._process.poll() is not None:
                raise ServerFailed(
                    f"the server ended with status {self._process.returncode} before it was ready; "
                    "its last lines say why."
                )
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return True
            time.sleep(POLL)
        raise ServerFailed(f"the server did not answer within {timeout:.0f} s.")

    def wait(self, *, give_up: Callable[[], bool] = lambda: False) -> int | None:
        """Wait until the server ends by itself and return its status; None if `give_up` says so."""
        if self._process is None:
            raise RuntimeError("start() comes first")
        while not give_up():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(POLL)
        return None

    def stop(self, grace: float = 10.0) -> None:
        """End the server and every process it started; SIGTERM first, SIGKILL after `grace` s.

        A second call does nothing.
        """
        if self._process is None or self._stopped:
            return
        self._stopped = True
        family = self.family()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        # The server leads a session, so its children are found even after it has gone.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        psutil.wait_procs(family, timeout=grace)
        self._process.wait(grace)

    def family(self) -> list[psutil.Process]:
        """The server process and all of its descendants that are alive."""
        if self._process is None:
            return []
        try:
            server = psutil.Process(self._process.pid)
            return [server, *server.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    @contextlib.contextmanager
    def running(self, timeout: float = 300.0) -> Iterator[LocalServer]:
        """Start, wait until ready, and stop on the way out, whatever happens."""
        try:
            self.start()
            self.wait_until_ready(timeout)
            yield self
        finally:
            self.stop()


def _die_with_parent() -> None:
    """Ask the kernel for SIGTERM if the parent dies, even by SIGKILL. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
