"""What the measured rows of the attention prologue say: rates, ratios, and the aims.

Everything here is arithmetic on the rows of a result file, so that the table, the plot and the
README say the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.kernel_timing import COLD, HOT, gigabytes_per_second
from benchmarks.prologue_paths import (
    BASELINES,
    CUDA,
    FUSED_STORE,
    IN_TREE,
    NO_EXCHANGE,
    VIRTUAL,
)

Row = dict[str, Any]

FASTER, SHARE, MICROSECONDS = 2.5, 0.85, 3.0
#: Tokens of a decode step, for which the aims on latency hold.
DECODE_TOKENS = 128
BANDWIDTH_TOKENS = 8192
EXCHANGE_TP = 8


@dataclass(frozen=True, slots=True)
class Aim:
    """One aim. met: None where the rows that decide it are not there."""

    name: str
    asked: str
    found: str
    met: bool | None

    def as_row(self) -> Row:
        """What the JSON holds."""
        return asdict(self)


def median(row: Row, which: str) -> float:
    """Microseconds of a row that was timed."""
    return row["microseconds"][which]["median"]


def timed(rows: Iterable[Row]) -> dict[tuple[str, int, int, str], Row]:
    """(case, tp, tokens, path) -> row, of those that were timed and are right."""
    return {
        (row["case"], row["tp"], row["tokens"], row["path"]): row
        for row in rows
        if "microseconds" in row
    }


def add_rates(row: Row, bandwidth: float) -> None:
    """Add GB/s and the share of the copy bandwidth (GB/s) for each kind of run of a timed row."""
    row["gbps"] = {
        which: round(gigabytes_per_second(row["bytes"], median(row, which)), 2)
        for which in row["microseconds"]
    }
    row["copy_share"] = {which: round(rate / bandwidth, 4) for which, rate in row["gbps"].items()}


def add_ratios(rows: list[Row]) -> None:
    """Add, to each timed row of ours, how many times as fast as each baseline it is.

    Only kinds of runs that both have are compared.
    """
    known = timed(rows)
    for (case, tp, tokens, path), row in known.items():
        if path in BASELINES:
            continue
        row["ratio"] = {
            baseline: {
                which: round(median(other, which) / median(row, which), 3)
                for which in row["microseconds"]
                if which in other["microseconds"]
            }
            for baseline in BASELINES
            if (other := known.get((case, tp, tokens, baseline))) is not None
        }


def aims(rows: list[Row]) -> list[Aim]:
    """What the issue asks of an H200, judged by the rows of whatever device they are of."""
    return [
        _faster(rows, IN_TREE),
        _faster(rows, FUSED_STORE),
        _bandwidth(rows),
        _exchange(rows),
    ]


def _faster(rows: list[Row], baseline: str) -> Aim:
    """The smallest ratio decides: over the tokens of a decode step, hot and cold."""
    found = {
        (tokens, which): value
        for (case, tp, tokens, path), row in timed(rows).items()
        if (case, tp, path) == ("prologue", 1, CUDA) and tokens <= DECODE_TOKENS
        for which, value in row.get("ratio", {}).get(baseline, {}).items()
    }
    name = f"prologue, TP1, 1 to {DECODE_TOKENS} tokens, against {baseline}"
    asked = f"at least {FASTER} times as fast"
    if not found:
        return Aim(name, asked, "not measured", None)
    (tokens, which), least = min(found.items(), key=lambda item: item[1])
    return Aim(name, asked, f"{least:.2f} at {tokens} tokens, {which} L2", least >= FASTER)


def _bandwidth(rows: list[Row]) -> Aim:
    row = timed(rows).get(("prologue", 1, BANDWIDTH_TOKENS, CUDA))
    name = f"prologue, TP1, {BANDWIDTH_TOKENS} tokens, cold L2"
    asked = f"at least {SHARE:.0%} of the copy bandwidth"
    if row is None or COLD not in row.get("copy_share", {}):
        return Aim(name, asked, "not measured", None)
    share = row["copy_share"][COLD]
    return Aim(name, asked, f"{share:.0%}", share >= SHARE)


def exchange_costs(rows: list[Row], which: str) -> dict[tuple[str, int, int], float]:
    """(case, tp, tokens) -> microseconds that the exchange adds to the same grid without it."""
    known = timed(rows)
    return {
        (case, tp, tokens): median(row, which) - median(without, which)
        for (case, tp, tokens, path), row in known.items()
        if path == VIRTUAL
        and (without := known.get((case, tp, tokens, NO_EXCHANGE))) is not None
        and which in row["microseconds"]
        and which in without["microseconds"]
    }


def _exchange(rows: list[Row]) -> Aim:
    """The largest cost decides: over all batches that were measured, hot and cold."""
    found = {
        (tokens, which): cost
        for which in (HOT, COLD)
        for (case, tp, tokens), cost in exchange_costs(rows, which).items()
        if (case, tp) == ("prologue", EXCHANGE_TP)
    }
    name = f"exchange, TP{EXCHANGE_TP} as virtual ranks on one device"
    asked = f"adds at most {MICROSECONDS:g} us"
    if not found:
        return Aim(name, asked, "not measured", None)
    (tokens, which), most = max(found.items(), key=lambda item: item[1])
    return Aim(name, asked, f"{most:.2f} us at {tokens} tokens, {which} L2", most <= MICROSECONDS)
