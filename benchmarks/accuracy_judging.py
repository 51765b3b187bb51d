"""What is true of an engine's replies beside the reference's: pure, on token ids and counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from sglang_minimax.accuracy.results import Score

#: (question, step, one token, the other) -> by how much the oracle prefers one after the reference.
Margin = Callable[[int, int, int, int], float]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first step at which a reply is not the reference's.

    question: counted from 0. step: of the reply, from 0. expected, found: token ids, None behind a
    reply's end. margin: the difference of both tokens' log-probabilities under the oracle, None
    where one has no token.
    """

    question: int
    step: int
    expected: int | None
    found: int | None
    margin: float | None

    def is_near_tie(self, tolerance: float) -> bool:
        """Whether rounding alone may have turned the choice."""
        return self.margin is not None and self.margin <= tolerance


def first_difference(
    reference: Sequence[int], found: Sequence[int]
) -> tuple[int, int | None, int | None] | None:
    """(step, expected token, found token) of the first difference, None for equal replies."""
    for step, (wanted, got) in enumerate(zip_longest(reference, found)):
        if wanted != got:
            return step, wanted, got
    return None


def differences(
    references: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], margin: Margin
) -> list[Difference]:
    """One entry for each reply that differs. Raises ValueError for another number of replies."""
    found = []
    for question, pair in enumerate(zip(references, replies, strict=True)):
        if (first := first_difference(*pair)) is None:
            continue
        step, wanted, got = first
        apart = None if wanted is None or got is None else margin(question, step, wanted, got)
        found.append(Difference(question, step, wanted, got, apart))
    return found


def verdict(found: Iterable[Difference], tolerance: float) -> dict[str, Any]:
    """`near_ties` and `differences` as JSON values; `status` is "ok" without any of the latter."""
    ties: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for each in found:
        (ties if each.is_near_tie(tolerance) else others).append(asdict(each))
    return {"status": "differs" if others else "ok", "near_ties": ties, "differences": others}


def is_within(found: Score, reference: Score) -> bool:
    """Whether a share lies in Wilson's 95 % interval of the reference's share, ends included.

    What is asserted of bf16: the share of right answers of a shape, against the interval of the
    fp32 reference on the same questions. Raises ValueError for another number of questions.
    """
    if found.asked != reference.asked:
        raise ValueError(f"{found.asked} questions beside {reference.asked} of the reference")
    low, high = reference.interval
    return low <= found.share <= high
