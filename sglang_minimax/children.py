"""A child process that takes all that it started with it, and dies with us.

Used for servers, for the suites of a lane, and for SGLang's benchmark of serving.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

import psutil

#: Seconds between two looks at a process.
POLL = 0.2

_PR_SET_PDEATHSIG = 1


class Child:
    """A command in a session of its own.

    environment: what it sees beside ours. log: where its output goes; None lets it through to ours.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        log: IO[bytes] | None = None,
    ) -> None:
        self.command = list(command)
        self._environment = {**os.environ, "PYTHONWARNINGS": "ignore", **(environment or {})}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    @property
    def pid(self) -> int | None:
        """The process id of the command, None before `start`."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process and return at once."""
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

    def wait(self, *, give_up: Callable[[], bool] = lambda: False) -> int | None:
        """Wait until it ends by itself and return its status; None if `give_up` says so."""
        if self._process is None:
            raise RuntimeError("start() comes first")
        while not give_up():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(POLL)
        return None

    def run(self, limit: float, give_up: Callable[[], bool] = lambda: False) -> int | None:
        """The command's exit status; None if it takes `limit` s or `give_up` says so.

        Nothing of it is left, however this ends.
        """
        deadline = time.monotonic() + limit
        try:
            self.start()
            return self.wait(give_up=lambda: give_up() or time.monotonic() > deadline)
        finally:
            self.stop()

    def stop(self, grace: float = 10.0) -> None:
        """End it and every process it started; SIGTERM first, SIGKILL after `grace` s.

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
        # It leads a session, so its children are found even after it has gone.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        psutil.wait_procs(family, timeout=grace)
        self._process.wait(grace)

    def family(self) -> list[psutil.Process]:
        """The process and all of its descendants that are alive."""
        if self._process is None:
            return []
        try:
            first = psutil.Process(self._process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _die_with_parent() -> None:
    """Ask the kernel for SIGTERM if the parent dies, even by SIGKILL. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
