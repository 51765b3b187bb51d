"""How much memory the steps of a parser take, as Python's allocator counts it."""

from __future__ import annotations

import gc
import tracemalloc
from array import array
from collections.abc import Callable, Sequence
from typing import Any


def traced(feed: Callable[[str], Any], cut: Sequence[str]) -> tuple[list[int], int]:
    """Bytes that each step had taken at most, given back or not, and the most of all together.

    Everything that a step makes is in its figure, a string that is thrown away as well.
    """
    steps, most = array("q", [0] * len(cut)), 0  # none of its own, so that it is not counted
    gc.collect()
    tracemalloc.start()
    try:
        for number, piece in enumerate(cut):
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            feed(piece)
            _, peak = tracemalloc.get_traced_memory()
            steps[number] = peak - before
            most = max(most, peak)
    finally:
        tracemalloc.stop()
    return list(steps), most
