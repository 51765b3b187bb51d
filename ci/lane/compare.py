"""How far two runs of a lane are apart, figure by figure. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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


#: Settings that do not decide a figure, and differ from run to run.
BESIDE_THE_POINT = ("url", "log", "progress")


def differences(before: Outcome, after: Outcome) -> list[str]:
    """What else the runs differ in: model, machine, versions, command lines, settings of suites.

    One sentence each; a figure can only be read with them.
    """
    first, second = dict(_facts(before)), dict(_facts(after))
    return [
        f"{name}: {first.get(name, 'nothing')} before, {second.get(name, 'nothing')} after."
        for name in {**first, **second}
        if first.get(name) != second.get(name)
    ]


def _facts(outcome: Outcome) -> Iterator[tuple[str, Any]]:
    yield "model", outcome.model
    yield from _flat("machine", outcome.machine)
    for variant in outcome.variants:
        yield f"{variant.name} command", " ".join(_without_port(variant.command))
        for suite in variant.suites:
            settings = suite.result.get("settings", {})
            kept = {k: v for k, v in settings.items() if k not in BESIDE_THE_POINT}
            yield from _flat(f"{variant.name} {suite.name}", kept)


def _flat(name: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield f"{name} {key}", value


def _without_port(command: list[str]) -> Iterator[str]:
    """The port is any that is free."""
    for before, word in zip(["", *command], command, strict=False):
        if "--port" not in (before, word):
            yield word
