"""SGLang engines in forked processes: imports are paid once, and no engine sees another's state.

SGLang keeps its configuration in module globals, so that one process can hold one engine in its
life. `EngineProcess` forks a child after the imports, builds the engine there, and passes method
calls through a pipe. Each rank computes on one thread: OpenMP's threads do not survive a fork, and
a child that counts on those of its parent waits forever.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from sglang_minimax.platforms import choice

#: The name under which `_answer` knows `generate_together`; no method of an engine is called so.
_TOGETHER = "generate together"


class EngineFailed(RuntimeError):
    """The engine did not start, or a call failed; `log` is what the process had printed."""

    def __init__(self, message: str, log: str = "", exit_code: int | None = None) -> None:
        super().__init__(f"{message}\n{log[-3000:]}" if log else message)
        self.log = log
        self.exit_code = exit_code


class EngineProcess:
    """One SGLang `Engine` with the given arguments, in a process of its own.

    arguments: SGLang's; without `port` each engine gets its own, from which attention DP counts.
    before: called in the child before the engine is built; what it patches is inherited by the
    ranks, which are forked in their turn. Where there is a GPU, which a forked process cannot use,
    child and ranks are spawned: `before` must then be picklable, and does not reach the ranks.
    """

    def __init__(
        self, *, before: Callable[[], None] | None = None, timeout: float = 120.0, **arguments: Any
    ) -> None:
        preload()
        arguments.setdefault("port", free_port_base())
        self._timeout = timeout
        self._log = tempfile.NamedTemporaryFile(prefix="engine-", suffix=".log")  # noqa: SIM115
        fork = choice.cpu_platform_chosen()
        context = multiprocessing.get_context("fork" if fork else "spawn")
        self._connection, far_end = context.Pipe()
        self._process = context.Process(  # type: ignore[attr-defined]
            target=_serve, args=(far_end, self._log.name, before, arguments), daemon=False
        )
        self._process.start()
        far_end.close()
        try:
            self._receive("the engine did not start")
        except BaseException:
            self.close()
            raise

    @property
    def log(self) -> str:
        """What the engine and its ranks have printed so far."""
        return Path(self._log.name).read_text(errors="replace")

    def generate(self, **arguments: Any) -> Any:
        """`Engine.generate(**arguments)`, in the child."""
        return self.call("generate", **arguments)

    def generate_together(self, requests: list[dict[str, Any]]) -> list[Any]:
        """`Engine.async_generate(**request)` for all at once; their replies, in order."""
        return self.call(_TOGETHER, requests=requests)

    def call(self, method: str, **arguments: Any) -> Any:
        """Call any method of the engine. Raises EngineFailed with its message if it raises."""
        self._connection.send((method, arguments))
        return self._receive(f"{method} failed")

    def ranks(self) -> list[psutil.Process]:
        """The engine's scheduler processes."""
        family = psutil.Process(self._process.pid).children(recursive=True)
        return [process for process in family if "scheduler" in " ".join(process.cmdline())]

    def close(self) -> None:
        """Shut the engine down and leave no process behind."""
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._process.pid).children(recursive=True)
        with contextlib.suppress(OSError, ValueError):
            self._connection.send(None)
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=5)
        self._connection.close()
        self._log.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self, what: str) -> Any:
        if not self._connection.poll(self._timeout):
            raise EngineFailed(f"{what}: no answer within {self._timeout:.0f} s", self.log)
        try:
            kind, value = self._connection.recv()
        except EOFError:
            self._process.join(10)
            status = self._process.exitcode
            raise EngineFailed(f"{what}: exit status {status}", self.log, status) from None
        if kind == "error":
            raise EngineFailed(f"{what}: {value}", self.log)
        return value


def free_port_base() -> int:
    """A port below the ephemeral ones of which the ports that SGLang counts from it are free.

    With attention DP it listens on a few ports from `port` + 234 on (server_args.PortArgs), and
    takes 30000 for every engine that names none, so that two of them clash.
    """
    drawn = random.Random()  # the caller's seed is the caller's
    for _ in range(100):
        base = drawn.randrange(10_000, 32_000, 20)
        if all(_is_free(base + offset) for offset in range(233, 253)):
            return base
    raise EngineFailed("no run of 20 free ports was found from 10233 to 32253")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def preload() -> None:
    """Import what every engine needs, once for all of them."""
    importlib.import_module("sglang.srt.entrypoints.engine")
    if choice.cpu_platform_chosen():
        from sglang_minimax.platforms.cpu.forking import import_what_children_need

        import_what_children_need()


def quiet_child(log: str) -> None:
    """In a forked process that will hold an engine: print to `log`, compute on one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def _serve(
    connection: Connection,
    log: str,
    before: Callable[[], None] | None,
    arguments: dict[str, Any],
) -> None:
    """The child: build the engine, then answer calls until told to stop."""
    quiet_child(log)
    if before is not None:
        before()
    from sglang.srt.utils import kill_process_tree

    try:
        _answer(connection, arguments)
    finally:
        # What is left would be waited for at the end of this process, without end.
        kill_process_tree(os.getpid(), include_parent=False)


def _answer(connection: Connection, arguments: dict[str, Any]) -> None:
    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(**arguments)
    connection.send(("ready", None))
    while (request := connection.recv()) is not None:
        method, keywords = request
        try:
            together = method == _TOGETHER
            act = partial(_together, engine) if together else getattr(engine, method)
            connection.send(("value", act(**keywords)))
        except Exception as error:
            traceback.print_exc()
            connection.send(("error", f"{type(error).__name__}: {error}"))
    engine.shutdown()


def _together(engine: Any, requests: list[dict[str, Any]]) -> list[Any]:
    async def gather() -> list[Any]:
        replies = [engine.async_generate(**request) for request in requests]
        return await asyncio.gather(*replies)

    return engine.loop.run_until_complete(gather())
