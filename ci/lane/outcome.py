"""What a run found: figures against thresholds, as records and as JSON. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ci.lane import Exit, LaneError
from ci.lane.schema import Figure, Suite

#: `reported` has no threshold; `absent` has one, and the suite did not come to a number.
Verdict = Literal["held", "missed", "reported", "absent"]
FORMAT = 2


@dataclass(frozen=True)
class Judged:
    """One figure. interval: 95 %, of shares. The rest is the lane's."""

    name: str
    verdict: Verdict
    value: float | None
    interval: tuple[float, float] | None = None
    better: str = "higher"
    baseline: float | None = None
    threshold: float | None = None
    note: str = ""
    source: str | None = None


def judge(
    name: str, figure: Figure, value: float | None, interval: tuple[float, float] | None = None
) -> Judged:
    """Hold a value to its threshold; a value on it passes."""
    if figure.threshold is None:
        verdict: Verdict = "reported"
    elif value is None:
        verdict = "absent"
    else:
        verdict = "held" if holds(value, figure.threshold, figure.better) else "missed"
    kept = {key: getattr(figure, key) for key in ("better", "baseline", "threshold", "note")}
    return Judged(name, verdict, value, interval, **kept, source=figure.source)


def holds(value: float, threshold: float, better: str) -> bool:
    """Whether a value is on the good side of a threshold, or on it; NaN is on neither."""
    return value >= threshold if better == "higher" else value <= threshold


@dataclass
class SuiteOutcome:
    """One suite. error: why it came to no result, one sentence. result: as the suite wrote it."""

    name: str
    figures: list[Judged] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether it came to a result, and every threshold held."""
        return self.error is None and all(
            each.verdict in ("held", "reported") for each in self.figures
        )


def judged(name: str, suite: Suite, result: Mapping[str, Any]) -> SuiteOutcome:
    """A suite's result against the figures of its lane."""
    scores, figures = result.get("scores", {}), result.get("figures", {})
    found = []
    for key, figure in suite.figures.items():
        score = scores.get(key)
        value = score["share"] if score else figures.get(key)
        interval = tuple(score["interval_95"]) if score else None
        found.append(judge(key, figure, value, interval))
    return SuiteOutcome(name, found, result=dict(result))


@dataclass
class VariantOutcome:
    """One launch on one node.

    node: suites are run on node 0 alone. error: why it did not start, or ended early. interrupted:
    by a signal. stages: seconds since the start.
    """

    name: str
    command: list[str] = field(default_factory=list)
    suites: list[SuiteOutcome] = field(default_factory=list)
    error: str | None = None
    interrupted: bool = False
    stages: dict[str, float] = field(default_factory=dict)
    node: int = 0

    @property
    def passed(self) -> bool:
        """Whether it started and every suite passed; on node 0 nothing asked is nothing passed."""
        if self.error is not None or (self.node == 0 and not self.suites):
            return False
        return all(suite.passed for suite in self.suites)


@dataclass
class Outcome:
    """A lane's run.

    missing: what the machine lacks, in sentences; then nothing was started. ended: False while it
    lasts, and for ever if it was killed.
    """

    lane: str
    about: str
    model: str
    date: str
    machine: dict[str, Any]
    missing: list[str] = field(default_factory=list)
    variants: list[VariantOutcome] = field(default_factory=list)
    ended: bool = False

    @property
    def status(self) -> Exit:
        """How the run ends."""
        if self.missing:
            return Exit.COULD_NOT_RUN
        if any(each.interrupted for each in self.variants):
            return Exit.INTERRUPTED
        passed = self.ended and self.variants and all(each.passed for each in self.variants)
        return Exit.PASS if passed else Exit.FAIL

    def as_dict(self) -> dict[str, Any]:
        """JSON values; `read` reads them."""
        return {"format": FORMAT, "status": self.words, **asdict(self)}

    @property
    def words(self) -> str:
        """`pass`, `fail`, `could not run`, `interrupted`, or `not ended`."""
        if not self.ended:
            return "not ended"
        return self.status.name.lower().replace("_", " ")

    def write(self, path: Path) -> None:
        """Write as JSON, in whole or not at all."""
        beside = path.with_name(f".{path.name}.part")
        beside.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        beside.replace(path)


def read(path: Path) -> Outcome:
    """A result that `run` wrote. Raises LaneError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaneError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    except ValueError as error:
        raise LaneError(f"{path} is not JSON; give the result.json of a run.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise LaneError(f"{path} is no result of `ci.lane run`; give the result.json of a run.")
    rest = {k: v for k, v in content.items() if k not in ("format", "status", "variants")}
    try:
        return Outcome(**rest, variants=[_variant(each) for each in content["variants"]])
    except (TypeError, KeyError) as error:
        raise LaneError(f"{path} is a result of another version; run the lane again.") from error


def _variant(content: Mapping[str, Any]) -> VariantOutcome:
    suites = [
        SuiteOutcome(**{**each, "figures": [_judged(figure) for figure in each["figures"]]})
        for each in content["suites"]
    ]
    return VariantOutcome(**{**content, "suites": suites})


def _judged(content: Mapping[str, Any]) -> Judged:
    interval = content["interval"]
    return Judged(**{**content, "interval": tuple(interval) if interval else None})
