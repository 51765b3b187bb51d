"""How the ranks of a load end together, over a store that is gone when rank 0 is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest
import sglang.srt.model_executor.model_runner_components.load_model_utils  # noqa: F401 (once)
from torch.distributed import TCPStore

from sglang_minimax.errors import LoadError
from sglang_minimax.patches import shared_fate

RANKS = 3
Load = Callable[[int, shared_fate.SharedFate], None]


def rank_of_a_load(rank: int, port: int, load: Load, result: Connection) -> None:
    """One rank, which ends as soon as its load does; rank 0 takes the store along."""
    store = TCPStore("127.0.0.1", port, is_master=rank == 0, timeout=timedelta(seconds=20))
    if rank == 0:
        result.send(store.port)
    store.add("met", 1)
    while store.add("met", 0) < RANKS:
        time.sleep(0.02)
    group = SimpleNamespace(rank_in_group=rank, world_size=RANKS)
    shared_fate.get_parallel = lambda: SimpleNamespace(world_group=group)  # type: ignore[assignment]
    shared_fate._store = lambda: store
    try:
        with shared_fate.shared_fate() as fate:
            load(rank, fate)
        time.sleep(1)  # a rank that has loaded stays
        result.send(("loaded", False))
    except LoadError as error:
        result.send((str(error), error.is_told_elsewhere))
    except BaseException as error:
        result.send((type(error).__name__, False))


def ends(load: Load) -> list[tuple[str, bool]]:
    """What each rank says at its end, and whether another one prints it."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(RANKS)]
    port = 0
    processes = []
    for rank, (_, far_end) in enumerate(pipes):
        process = context.Process(target=rank_of_a_load, args=(rank, port, load, far_end))
        process.start()
        far_end.close()
        processes.append(process)
        if rank == 0:
            port = pipes[0][0].recv()
    found = []
    for near_end, _ in pipes:
        assert near_end.poll(30), "a rank does not end"
        try:
            found.append(near_end.recv())
        except EOFError:
            found.append(("killed", False))
    for process in processes:
        process.join(10)
        assert process.exitcode is not None
    return found


def test_all_load() -> None:
    assert ends(lambda rank, fate: None) == [("loaded", False)] * RANKS


@pytest.mark.parametrize("bad", range(RANKS))
def test_a_slow_rank_hears_what_another_found(bad: int) -> None:
    """Rank 0 does not leave before; the store would be gone with it."""

    def load(rank: int, fate: shared_fate.SharedFate) -> None:
        if rank == bad:
            raise LoadError("no such tensor.")
        time.sleep(0.3 * rank)

    sentence = "no such tensor." if bad == 0 else f"rank {bad}: no such tensor."
    assert ends(load) == [(sentence, rank != 0) for rank in range(RANKS)]


def test_a_rank_that_does_not_look_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_fate, "PATIENCE_SECONDS", 1.0)

    def load(rank: int, fate: shared_fate.SharedFate) -> None:
        time.sleep((0, 0.3, 3)[rank])
        raise LoadError(
            "wrong.",
        )

    first, second, third = ends(load)
    assert first == ("wrong.", False)
    assert second == ("wrong.", True)
    assert third == ("rank 2: wrong.", False)  # rank 0 is gone, so it says so itself


def test_a_rank_0_that_was_killed_is_told_by_the_others() -> None:
    def load(rank: int, fate: shared_fate.SharedFate) -> None:
        if rank == 0:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)

    first, *others = ends(load)
    assert first == ("killed", False)
    for rank, (sentence, elsewhere) in enumerate(others, start=1):
        assert sentence.startswith(f"rank {rank}: rank 0 ended during the load")
        assert not elsewhere


def test_an_error_of_another_kind_stays_what_it_is() -> None:
    def load(rank: int, fate: shared_fate.SharedFate) -> None:
        if rank == 1:
            raise ZeroDivisionError
        time.sleep(0.5)

    first, second, third = ends(load)
    assert second == ("ZeroDivisionError", False)
    assert first == ("rank 1: the load ended with ZeroDivisionError: ", False)
    assert third == ("rank 1: the load ended with ZeroDivisionError: ", True)
