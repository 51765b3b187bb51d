"""What the commands print, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import typer

from ci.lane.check import Finding
from ci.lane.compare import Drift
from ci.lane.outcome import Judged, Outcome
from ci.lane.schema import Lane
from sglang_minimax.cli import tables

WORDS = {"held": "held", "missed": "MISSED", "reported": "-", "absent": "NO NUMBER"}


def lanes(found: Sequence[Lane]) -> None:
    """One row a lane."""
    titles = ("lane", "hardware", "model", "variants", "suites")
    rows = (
        (
            lane.name,
            hardware(lane),
            lane.model.name,
            " ".join(lane.variants),
            " ".join(lane.suites),
        )
        for lane in found
    )
    tables.show(tables.table(*titles, rows=rows))


def hardware(lane: Lane) -> str:
    """What a lane runs on, for people."""
    here = lane.hardware
    nodes = f"{here.nodes} x " if here.nodes > 1 else ""
    return "cpu" if here.kind == "cpu" else f"{nodes}{here.per_node} {here.device}"


# --- check ---

SIZES = ("tp_size", "attn_dp_size", "ep_size", "pp_size")
SHORT = {"tp_size": "tp", "attn_dp_size": "attn-dp", "ep_size": "ep", "pp_size": "pp"}


def findings(found: Sequence[Finding]) -> None:
    """What was resolved, whether it fits, and then sentences."""
    titles = ("lane", "variant", "", "sizes", "attention", "exchange")
    tables.show(tables.table(*titles, rows=map(_resolved, found)))
    numbers = ("memory", "static", "weights", "KV a token", "KV tokens", "asked")
    rows = [_memory(each) for each in found if each.fit]
    tables.show(tables.table("a rank of", "variant", *numbers, rows=rows, right=numbers))
    for kind in ("problems", "notes", "unchecked"):
        for sentence, places in _grouped(found, kind).items():
            typer.echo(f"{', '.join(places)}: {sentence}")


def _resolved(finding: Finding) -> tuple[str, ...]:
    answer = finding.answer
    sizes = [f"{SHORT[n]} {answer.resolved[n]}" for n in SIZES if answer.resolved.get(n, 1) != 1]
    state = "BAD" if finding.problems else "good" if answer.resolved else "parsed"
    attention = str(answer.resolved.get("attention_backend", "-"))
    return finding.lane, finding.variant, state, ", ".join(sizes), attention, finding.exchange


def _memory(finding: Finding) -> tuple[str, ...]:
    fit = finding.fit
    assert fit is not None
    return (
        finding.lane,
        finding.variant,
        f"{fit.memory / 1e9:.0f} GB",
        f"{fit.static / 1e9:.1f} GB",
        f"{fit.weights / 1e9:.2f} GB",
        f"{fit.kv_token:,} B",
        f"{fit.room:,}",
        f"{fit.asked:,}",
    )


def _grouped(found: Sequence[Finding], kind: str) -> dict[str, list[str]]:
    """A sentence -> where it is said; many lanes say the same."""
    said: dict[str, list[str]] = {}
    for each in found:
        for sentence in getattr(each, kind):
            said.setdefault(sentence, []).append(f"{each.lane} {each.variant}")
    return said


# --- run and compare ---


def outcome(found: Outcome) -> None:
    """One row a figure, then what went wrong."""
    numbers = ("value", "95 %", "baseline", "threshold")
    rows = [_figure(*row) for row in _figures(found)]
    if rows:
        titles = ("variant", "suite", "figure", *numbers, "")
        tables.show(tables.table(*titles, rows=rows, right=numbers))
    for sentence in found.missing:
        typer.echo(f"could not run: {sentence}")
    for variant in found.variants:
        if variant.error:
            typer.echo(f"{variant.name}: {variant.error}")
        for suite in variant.suites:
            if suite.error:
                typer.echo(f"{variant.name} {suite.name}: {suite.error}")
    typer.echo(f"{found.lane}: {found.words}")


def _figures(found: Outcome) -> Iterator[tuple[str, str, Judged]]:
    for variant in found.variants:
        for suite in variant.suites:
            for figure in suite.figures:
                yield variant.name, suite.name, figure


def _figure(variant: str, suite: str, figure: Judged) -> tuple[str, ...]:
    numbers = (figure.value, None, figure.baseline, figure.threshold)
    value, _, baseline, threshold = map(number, numbers)
    row = (value, _interval(figure), baseline, threshold)
    return variant, suite, figure.name, *row, WORDS[figure.verdict]


def number(value: float | None) -> str:
    """For people; "-" for none."""
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) <= 1 else f"{value:,.1f}"


def _interval(figure: Judged | None) -> str:
    if figure is None or figure.interval is None:
        return "-"
    return "{:.4f} to {:.4f}".format(*figure.interval)


def drifts(found: Sequence[Drift]) -> None:
    """One row a figure of two runs."""
    numbers = ("before", "after", "change", "95 % before", "95 % after")
    rows = [_drift(each) for each in found]
    tables.show(tables.table("figure", *numbers, "", rows=rows, right=numbers))


def _drift(drift: Drift) -> tuple[str, ...]:
    before = number(drift.before.value if drift.before else None)
    after = number(drift.after.value if drift.after else None)
    change = "-" if drift.change is None else f"{drift.change:+.4g}"
    said = "THRESHOLD LOST" if drift.is_loss else "apart" if drift.apart else ""
    intervals = (_interval(drift.before), _interval(drift.after))
    return drift.name, before, after, change, *intervals, said
