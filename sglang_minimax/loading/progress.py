"""A bar of the bytes that have been loaded."""

from __future__ import annotations

import sys
from typing import Protocol

from tqdm.auto import tqdm


class Progress(Protocol):
    """What a reader needs of a tqdm bar."""

    def update(self, n: int, /) -> object: ...
    def close(self) -> object: ...


class _Bar(tqdm):  # type: ignore[misc, unused-ignore]
    monitor_interval = 0  # no thread of its own, which a fork would lose and nothing would end


def progress_bar(total_bytes: int, enabled: bool) -> Progress:
    """A bar of bytes, with rate and time left, on stderr; silent unless `enabled` (rank 0)."""
    return _Bar(
        total=total_bytes,
        desc="Loading weights",
        unit="B",
        unit_scale=True,
        disable=not enabled,
        miniters=1,
        # Into a log each update adds to the file, so there they are few.
        mininterval=0.5 if sys.stderr and sys.stderr.isatty() else 5.0,
    )
