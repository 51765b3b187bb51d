"""What several test folders share: one server, its client, broken checkpoints and their launches.

Engines are forked out of this process, and a forked child cannot use OpenMP threads that its parent
has started. So nothing here may compute on more than one thread.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sglang_minimax import TINY_M2
from sglang_minimax.cli.local_server import LocalServer, free_port

torch.set_num_threads(1)

Tensors = dict[str, torch.Tensor]
ABSENT = object()


# --- one server for all tests of requests --------------------------------------------------


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A real server with the bundled checkpoint, started once."""
    path = tmp_path_factory.mktemp("server") / "log"
    with path.open("wb") as log:
        server = LocalServer(arguments=["--log-level", "warning"], log=log)
        try:
            server.start()
            server.wait_until_ready()
        except BaseException:
            server.stop()
            print(path.read_text(errors="replace")[-4000:])
            raise
        yield server
        server.stop()


@pytest.fixture(scope="session")
def client(server: LocalServer) -> Any:
    """The `openai` client of that server; a test that hangs fails instead."""
    from openai import OpenAI

    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


# --- checkpoints that are wrong in one place -----------------------------------------------


class Derive:
    """Copies of the bundled checkpoint that differ in one thing; untouched files are links."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self,
        change: Callable[[Tensors], Any] | None = None,
        *,
        config: Mapping[str, Any] | None = None,
    ) -> Path:
        """A new checkpoint folder.

        change: edits the dict of tensors in place. config: keys to set; ABSENT removes one.
        """
        folder = self.folder / f"checkpoint-{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        for file in TINY_M2.iterdir():
            (folder / file.name).symlink_to(file)
        if change is not None:
            tensors = self.tensors()
            change(tensors)
            self.write_tensors(folder / "model.safetensors", tensors)
        if config is not None:
            values = json.loads((folder / "config.json").read_text()) | dict(config)
            values = {key: value for key, value in values.items() if value is not ABSENT}
            self.replace(folder / "config.json", json.dumps(values).encode())
        return folder

    @staticmethod
    def tensors() -> Tensors:
        """The tensors of the bundled checkpoint."""
        from safetensors.torch import load_file

        return load_file(TINY_M2 / "model.safetensors")

    @staticmethod
    def write_tensors(path: Path, tensors: Tensors) -> None:
        """Write a safetensors file in place of the link, if there is one."""
        from safetensors.torch import save_file

        path.unlink(missing_ok=True)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path, metadata={"format": "pt"})

    @staticmethod
    def replace(path: Path, content: bytes) -> None:
        """Write `content` in place of the link, never through it."""
        path.unlink(missing_ok=True)
        path.write_bytes(content)


@pytest.fixture
def derive(tmp_path: Path) -> Derive:
    """A factory of broken checkpoints; see `Derive`."""
    folder = tmp_path / "derived"
    folder.mkdir()
    return Derive(folder)


# --- a launch that ends by itself ----------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How `python -m sglang.launch_server` ended: status, output, duration, what it left.

    status: None where it did not end by itself; `started` says whether it listened then.
    """

    status: int | None
    output: str
    seconds: float
    started: bool
    orphans: list[str]

    def assert_refused(self, *words: str, trace: bool = False) -> None:
        """It ended soon with an error, left nothing, and said `words`, without a stack trace.

        trace: allow one. It is for errors of others that come before anybody can know the model.
        """
        assert not self.started, f"the server started:\n{self.output}"
        assert self.status is not None, f"alive after {self.seconds:.0f} s:\n{self.output}"
        assert self.status != 0
        # Observed 0.1 to 2 s; SGLang's own time-outs are 300 s and more.
        assert self.seconds < 60
        assert self.orphans == []
        for word in words:
            assert word in self.output
        assert trace or "Traceback" not in self.output, self.output


class Launcher:
    """Runs SGLang's launcher in forks of this process, so that imports are paid once."""

    def __init__(self, folder: Path) -> None:
        import sglang.launch_server
        import sglang.srt.entrypoints.http_server  # noqa: F401

        from sglang_minimax.validation.engine_process import preload

        preload()
        self._output = folder / "output"

    def __call__(
        self,
        model: Path | str,
        *arguments: str,
        timeout: float = 90.0,
        before: Callable[[], None] | None = None,
        interrupt: Callable[[], bool] | None = None,
    ) -> Ended:
        """Launch a server and wait until it has ended, listens, or `timeout` seconds are over.

        before: called in the server's process, whose ranks inherit what it patches. interrupt:
        asked over and over; when it says yes, the server gets a SIGINT, once. Nothing of it is
        alive afterwards.
        """
        port = free_port()
        command = [
            *("--model-path", str(model), "--host", "127.0.0.1", "--port", str(port)),
            *("--log-level", "warning", *arguments),
        ]
        context = multiprocessing.get_context("fork")
        child = context.Process(target=_launch, args=(str(self._output), command, before))
        begin = time.monotonic()
        child.start()
        family: set[psutil.Process] = set()
        started = False
        while child.is_alive() and not started and time.monotonic() - begin < timeout:
            with contextlib.suppress(psutil.NoSuchProcess):
                family.update(psutil.Process(child.pid).children(recursive=True))
            started = listens(port)
            if interrupt is not None and interrupt():
                interrupt = None
                os.kill(child.pid, signal.SIGINT)
            child.join(0.02)
        status, seconds = child.exitcode, time.monotonic() - begin
        orphans = [] if status is None else remaining(family)
        if child.is_alive():
            child.kill()
        child.join()
        for process in [*family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        output = self._output.read_text(errors="replace")
        return Ended(status, output, seconds, started, orphans)


def listens(port: int) -> bool:
    """Whether somebody accepts connections on a loopback port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def remaining(processes: Iterable[psutil.Process], timeout: float = 3.0) -> list[str]:
    """Those that are still there after `timeout` seconds, by name; a zombie is not."""
    _, alive = psutil.wait_procs(list(processes), timeout=0.1)
    deadline = time.monotonic() + timeout
    while (found := _running(alive)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _running(processes: Iterable[psutil.Process]) -> list[str]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            # A process id may have been given to somebody else.
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {process.name()}")
    return found


def _launch(output: str, arguments: list[str], before: Callable[[], None] | None) -> None:
    """What `python -m sglang.launch_server` does once it has imported SGLang."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    # A test run in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before is not None:
        before()
    try:
        run_server(prepare_server_args(arguments))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """Start servers that should refuse to start; see `Launcher`."""
    return Launcher(tmp_path_factory.mktemp("launch"))


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit status, what it wrote, what it left."""

    status: int
    stderr: str
    orphans: list[str]


@pytest.fixture
def run_to_the_end(tmp_path: Path) -> Callable[[list[str]], Outcome]:
    """Run a command in a session of its own and wait for it; anything left in it is an orphan."""

    def run(command: list[str]) -> Outcome:
        with (tmp_path / "stderr").open("w+b") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
                env={**os.environ, "PYTHONWARNINGS": "ignore"},
            )
            try:
                status = process.wait(120)
            finally:
                left = _session(process.pid)
                orphans = remaining(left)
                for each in left:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
                process.wait()
            stderr.seek(0)
            return Outcome(status, stderr.read().decode(errors="replace"), orphans)

    return run


def _session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found
