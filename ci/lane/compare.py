"""How far two runs of a lane are apart, figure by figure. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ci.lane import LaneError
from ci.lane.outcome import Judged, Outcome, holds


@dataclass(frozen=True)
class Drift:
    """One figure in both runs; None where a run has none."""

    variant: str
    suite: str
    before: Judged | None
    after: Judged | None

    @property
    def name(self) -> str:
        """variant, suite and figure."""
        figure = self.before or self.after
        return f"{self.variant} {self.suite} {figure.name if figure else ''}"

    @property
    def change(self) -> float | None:
        """After minus before."""
        if self.before is None or self.after is None:
            return None
        if self.before.value is None or self.after.value is None:
            return None
        return self.after.value - self.before.value

    @property
    def apart(self) -> bool | None:
        """Whether both 95 % intervals have nothing in common; None where one has none."""
        if self.before is None or self.after is None:
            return None
        first, second = self.before.interval, self.after.interval
        if first is None or second is None:
            return None
        return first[1] < second[0] or second[1] < first[0]

    @property
    def is_loss(self) -> bool:
        """Whether a threshold that held before, as it was then, does not hold after."""
        if self.before is None or self.before.verdict != "held" or self.before.threshold is None:
            return False
        if self.after is None or self.after.value is None:
            return True
        return not holds(self.after.value, self.before.threshold, self.before.better)


def compare(before: Outcome, after: Outcome) -> list[Drift]:
    """Every figure of both runs. Raises LaneError for two lanes."""
    if before.lane != after.lane:
        raise LaneError(
            f"the runs are of {before.lane} and {after.lane}; compare two runs of one lane."
        )
    first, second = dict(_figures(before)), dict(_figures(after))
    return [
        Drift(variant, suite, first.get(key), second.get(key))
        for key in {**first, **second}
        for variant, suite, _ in [key]
    ]


def _figures(outcome: Outcome) -> Iterator[tuple[tuple[str, str, str], Judged]]:
    for variant in outcome.variants:
        for suite in variant.suites:
            for figure in suite.figures:
                yield (variant.name, suite.name, figure.name), figure
