"""Start SGLang's server as a child process, wait until it answers, and leave nothing behind.

Used by `serve`, `demo` and the tests. The command is the one a user would type.
"""

from __future__ import annotations

import contextlib
import math
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import httpx

from sglang_minimax import TINY_M2
from sglang_minimax.children import POLL, Child
from sglang_minimax.errors import MinimaxError

#: What a chat with MiniMax-M2 needs beside the model.
PARSERS = ("--tool-call-parser", "minimax-m2", "--reasoning-parser", "minimax")

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


class LocalServer(Child):
    """A `python -m sglang.launch_server` process and its children.

    model: a checkpoint folder. arguments: further options, as on the command line.
    environment, log: as of a Child.
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
        command = [
            *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)),
            *("--host", host, "--port", str(self.port), *PARSERS, *arguments),
        ]
        super().__init__(command, environment, log)

    @property
    def url(self) -> str:
        """The server's base address, as a client on this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def start(self) -> None:
        """Start the process and return at once. Raises ServerFailed for a port that is taken."""
        with socket.socket() as probe:
            if probe.connect_ex((self.host, self.port)) == 0:
                raise ServerFailed(
                    f"port {self.port} of {self.host} is taken; choose another with --port."
                )
        super().start()

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
                # It is on this machine, whatever proxy the environment names.
                health = httpx.get(f"{self.url}/health", timeout=5, trust_env=False)
                if health.status_code == 200:
                    return True
            time.sleep(POLL)
        raise ServerFailed(f"the server did not answer within {timeout:.0f} s.")

    @contextlib.contextmanager
    def running(self, timeout: float = 300.0) -> Iterator[LocalServer]:
        """Start, wait until ready, and stop on the way out, whatever happens."""
        try:
            self.start()
            self.wait_until_ready(timeout)
            yield self
        finally:
            self.stop()
