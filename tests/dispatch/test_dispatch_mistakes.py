"""Every plausible wrong version of a dispatcher fails the test that is there for it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests import ranks
from tests.dispatch import mistakes_in_rows, stage
from tests.dispatch import test_dispatch_paths as paths
from tests.dispatch.mistakes import MISTAKES, Mistake


def fail_at_once(monkeypatch: pytest.MonkeyPatch, patience: float | None) -> None:
    """A rank's error is raised, and ends the others' waiting for it.

    patience: seconds that a rank waits for one that does not come, instead of `together`'s own.
    """
    barriers: list[threading.Barrier] = []

    def barrier(size: int, timeout: float) -> threading.Barrier:
        barriers.append(threading.Barrier(size, timeout=patience or timeout))
        return barriers[-1]

    def together(act: Callable[[int, Any], Any], size: int) -> list[Any]:
        def acts(rank: int, gather: Any) -> Any:
            try:
                return act(rank, gather)
            except Exception:
                barriers[-1].abort()
                raise

        found = ranks.together(acts, size)
        for error in found:
            if isinstance(error, Exception) and not isinstance(error, threading.BrokenBarrierError):
                raise error
        return found

    in_ranks = SimpleNamespace(**vars(threading) | {"Barrier": barrier})
    monkeypatch.setattr(ranks, "threading", in_ranks)
    monkeypatch.setattr(stage, "together", together)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_planted_mistake_fails(monkeypatch: pytest.MonkeyPatch, mistake: Mistake) -> None:
    fail_at_once(monkeypatch, 1 if mistake.error is threading.BrokenBarrierError else None)
    mistake.plant(monkeypatch)
    with pytest.raises(mistake.error, match=re.escape(mistake.words) or None):
        mistake.check(monkeypatch, *mistake.case)


@pytest.mark.parametrize(
    "mistake",
    {(each.check, each.case): each for each in MISTAKES}.values(),
    ids=lambda mistake: mistake.name,
)
def test_the_same_test_passes_without_it(monkeypatch: pytest.MonkeyPatch, mistake: Mistake) -> None:
    mistake.check(monkeypatch, *mistake.case)


def test_routing_on_arrival_is_right_for_rows_that_nothing_rounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What fails with rounded rows is the rounding, not the routing in another place."""
    mistakes_in_rows.routed_on_rounded_rows(monkeypatch)
    paths.test_choices_are_those_of_the_rows_before_they_are_rounded(monkeypatch, "gather")
