"""What a suite found: counts, shares with their intervals, and what they were measured on."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Two-sided 95 % quantile of the normal distribution.
Z_95 = 1.959963984540054

#: Settings that are no path, whatever they begin with.
_TEXTS = frozenset({"prompt"})


def wilson(right: int, asked: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share: (low, high), each 0 to 1.

    Source: E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference,
    JASA 22 (1927) 209-212. Unlike the normal interval it has a width at 0 and at 1, and it never
    leaves [0, 1]. Raises ValueError unless 0 <= right <= asked and asked > 0.

    >>> low, high = wilson(95, 100)
    >>> round(low, 4), round(high, 4)
    (0.8882, 0.9785)
    """
    if not 0 <= right <= asked or asked == 0:
        raise ValueError(f"{right} right of {asked} is no share")
    share = right / asked
    spread = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    middle, scale = share + z * z / (2 * asked), 1 + z * z / asked
    # The ends are exact; rounding would leave them beside 0 and 1.
    low = 0.0 if right == 0 else (middle - spread) / scale
    high = 1.0 if right == asked else (middle + spread) / scale
    return low, high


@dataclass(frozen=True)
class Score:
    """Right ones out of those asked."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """The share that is right, 0 to 1."""
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        return wilson(self.right, self.asked)

    def as_dict(self) -> dict[str, Any]:
        """Counts, share and interval."""
        low, high = self.interval
        return {
            "right": self.right,
            "asked": self.asked,
            "share": self.share,
            "interval_95": [low, high],
        }


@dataclass(frozen=True)
class Result:
    """The outcome of one suite.

    suite: `gsm8k`, `tools` or `bench_serving`. settings: as asked, without a key. date: UTC, ISO
    8601. server: what the server said of itself. scores: counts by name. figures: other numbers by
    name; None where there is none (a server without speculation accepts no drafts).
    """

    suite: str
    settings: dict[str, Any]
    date: str
    server: dict[str, Any]
    scores: dict[str, Score] = field(default_factory=dict)
    figures: dict[str, float | int | None] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """Every number by one flat name, for thresholds: the shares, and the figures there are."""
        shares = {name: score.share for name, score in self.scores.items()}
        return shares | {k: float(v) for k, v in self.figures.items() if v is not None}

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON values; no path of this machine beyond the working folder."""
        return {
            "suite": self.suite,
            "date": self.date,
            "settings": _portable(self.settings),
            "server": _portable(self.server),
            "scores": {name: score.as_dict() for name, score in self.scores.items()},
            "figures": self.figures,
        }

    def write(self, path: Path) -> None:
        """Write the result as JSON, in whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.part")
        beside.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        beside.replace(path)


def _portable(value: Any) -> Any:
    """The same, with each path as it is seen from the working folder, or else its last name."""
    if isinstance(value, dict):
        return {k: each if k in _TEXTS else _portable(each) for k, each in value.items()}
    if isinstance(value, list):
        return [_portable(each) for each in value]
    if not isinstance(value, str) or not Path(value).is_absolute():
        return value
    path, here = Path(value), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name
