"""A child process with a server's manners: a session of its own, gone with us, nothing left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from sglang_minimax.cli.local_server import LocalServer


class Child(LocalServer):
    """Any command, started, watched and ended as `LocalServer` does it."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: IO[bytes] | None
    ) -> None:
        super().__init__(environment=dict(environment), log=log)
        self.command = list(command)

    def run(self, limit: float, give_up: Callable[[], bool]) -> int | None:
        """The command's exit status; None if it takes `limit` s or `give_up` says so."""
        deadline = time.monotonic() + limit
        try:
            self.start()
            return self.wait(give_up=lambda: give_up() or time.monotonic() > deadline)
        finally:
            self.stop()
