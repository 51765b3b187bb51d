"""What goes wrong while weights are read, on one rank of several: one error, and nothing is left.

The faults are put where the operating system's would come from: in `preadv`, or in a reader thread.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_minimax import TINY_M2
from tests.conftest import Launcher

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

RANKS = ("--tp-size", "2")


def on_rank(rank: int, fault: Callable[[int], int]) -> Callable[[], None]:
    """Install `fault(bytes read) -> bytes read` in every `preadv` of one rank."""

    def install() -> None:
        original = os.preadv

        def preadv(descriptor: int, *rest: Any) -> int:
            count = original(descriptor, *rest)
            return fault(count) if torch.distributed.get_rank() == rank else count

        os.preadv = preadv

    return install


def broken_disk(_: int) -> int:
    raise OSError(errno.EIO, "Input/output error")


def cut_short(_: int) -> int:
    """The file ends, though its header and its length were right when they were looked at."""
    return 0


def thread_that_leaves(_: int) -> int:
    raise SystemExit("out of luck")


def no_memory(_: int) -> int:
    raise MemoryError("out of memory")


FAULTS = {
    "disk": (broken_disk, "Input/output error"),
    "cut": (cut_short, "copy or download it again"),
    "thread": (thread_that_leaves, "out of luck"),
    "memory": (no_memory, "out of memory"),
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_one_rank_that_cannot_read_ends_all_with_one_error(
    fault: str, rank: int, launch: Launcher
) -> None:
    install, words = FAULTS[fault]
    ended = launch(TINY_M2, *RANKS, before=on_rank(rank, install))
    ended.assert_refused(words)
    assert ended.output.count(words) == 1, ended.output
    assert ("rank 1: " in ended.output) == (rank == 1)
    # Observed 5 s, most of them SGLang's own start.
    assert ended.seconds < 30


def test_a_reader_thread_that_vanishes_is_noticed(launch: Launcher) -> None:
    def vanish() -> None:
        from sglang_minimax.loading.reader import Reader

        Reader._work = lambda self: None  # type: ignore[method-assign]

    launch(TINY_M2, *RANKS, before=vanish).assert_refused("reader thread")


def test_a_killed_rank_ends_the_server(launch: Launcher) -> None:
    def die(_: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    ended = launch(TINY_M2, *RANKS, before=on_rank(1, die))
    ended.assert_refused(trace=True)  # SGLang's own report of a child that was killed
    assert ended.seconds < 30


@pytest.mark.parametrize("ranks", [(), RANKS], ids=["tp1", "tp2"])
def test_ctrl_c_while_reading_ends_it(
    ranks: tuple[str, ...], launch: Launcher, tmp_path: Path
) -> None:
    flag = tmp_path / "reading"

    def slow_disk() -> None:
        original = os.preadv

        def preadv(*arguments: Any) -> int:
            flag.touch()
            time.sleep(20)
            return original(*arguments)

        os.preadv = preadv

    ended = launch(TINY_M2, *ranks, before=slow_disk, interrupt=flag.exists)
    assert ended.status is not None, ended.output
    assert not ended.started
    assert ended.orphans == []
    assert ended.seconds < 20
