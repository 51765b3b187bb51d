"""Going on with a run: what of it is kept, and when it must not be."""

from __future__ import annotations

from pathlib import Path

from ci.lane import Exit, LaneError
from ci.lane.outcome import Outcome, VariantOutcome, read


def holds_a_run(result: Path) -> bool:
    """Whether a result is in the way; one that says that nothing was started is not."""
    if not result.exists():
        return False
    try:
        before = read(result)
    except LaneError:
        return True
    return bool(before.variants) or before.status != Exit.COULD_NOT_RUN


def variants_of(result: Path, now: Outcome) -> list[VariantOutcome]:
    """What the run found before, if there was one.

    Raises LaneError unless it is the same lane and model on the same machine with the same
    versions and commit: figures of two builds in one result would say nothing of either.
    """
    if not result.exists():
        return []
    before = read(result)
    there = {"lane": before.lane, "model": before.model, **before.machine}
    here = {"lane": now.lane, "model": now.model, **now.machine}
    for name in {**there, **here}:
        if there.get(name) != here.get(name):
            raise LaneError(
                f"{result.parent} cannot be gone on with: {name} was {there.get(name)}, and is "
                f"{here.get(name)} now; give another --out."
            )
    return before.variants
