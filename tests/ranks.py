"""The ranks of a group as threads, whose collectives must match as those of processes must."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def together(act: Callable[[int, Any], Any], size: int = 3) -> list[Any]:
    """What `act(rank, gather)` returns, or raises, on each rank.

    A gather waits for all ranks: one that gathers less often than the others fails them, after
    some seconds, with BrokenBarrierError.
    """
    # Nothing is computed between two gathers; the time is for a busy machine.
    barrier, values = threading.Barrier(size, timeout=10), [None] * size
    results: list[Any] = [None] * size

    def one(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            found = list(values)
            barrier.wait()
            return found

        try:
            results[rank] = act(rank, gather)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), name=str(rank)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def own_rank() -> int:
    """The rank that runs, inside of `together`."""
    return int(threading.current_thread().name)
