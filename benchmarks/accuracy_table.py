"""What results/accuracy_matrix.json shows in a terminal and in docs/benchmarks-accuracy.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sglang_minimax.accuracy.results import Score

Row = dict[str, Any]
SHAPES_HEAD = ("shape", "fp32", "fp32 with Eagle3", "tokens a step", "bf16", "bf16, same replies")
MISTAKES_HEAD = ("planted mistake", "shape", "right", "fall", "replies that change")


def shapes(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """A line a shape: each part's outcome."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["mistake"] is None:
            found.setdefault(row["shape"], {})[row["part"]] = row
    return [_shape(name, parts) for name, parts in found.items()]


def _shape(name: str, parts: dict[str, Row]) -> tuple[str, ...]:
    eagle, bf16 = parts.get("eagle3"), parts.get("bf16")
    length = (eagle or {}).get("accept_length")
    same = f"{bf16['same_replies']} of {bf16['asked']}" if bf16 and "asked" in bf16 else ""
    return (
        f"`{name}`",
        outcome(parts.get("fp32")),
        outcome(eagle),
        f"{length:.2f}" if length else "",
        outcome(bf16),
        same,
    )


def outcome(row: Row | None) -> str:
    """A cell of the table of shapes."""
    if row is None:
        return "not asked"
    if row["status"] == "not run":
        return "not run"
    if row["status"] == "ends":
        return f"**ends**: {plain(row['reason'])}"
    if row["part"] == "bf16":
        return share(row) if row["status"] == "ok" else f"**outside**: {share(row)}"
    if row["differences"]:
        return f"**{len(row['differences'])} of {row['asked']} replies differ**, {share(row)}"
    ties = len(row["near_ties"])
    return f"same, {share(row)}" + (f"; near ties: {ties}" if ties else "")


def share(row: Row) -> str:
    """Right ones of those asked."""
    return f"{100 * row['right'] / row['asked']:.1f} %"


def plain(text: str) -> str:
    """Text that does not end a table's cell."""
    return text.replace("|", "/")


def mistakes(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """A line a mistake: what it costs against the right model in the same shape."""
    listed = list(rows)
    return [_mistake(row, right_model(row, listed)) for row in listed if row["mistake"]]


def right_model(row: Row, rows: Iterable[Row]) -> Row | None:
    """The row of the same shape, with a draft if this one has, without the mistake."""
    part = "eagle3" if row["eagle3"] else "fp32"
    wanted = (part, row["shape"])
    return next((each for each in rows if (each["part"], each["shape"]) == wanted), None)


def fall(row: Row, right: Row | None) -> float | None:
    """Points of accuracy that a mistake costs, None where one of both has no answers."""
    if right is None or "right" not in row or "right" not in right:
        return None
    return 100 * (right["right"] / right["asked"] - row["right"] / row["asked"])


def _mistake(row: Row, right: Row | None) -> tuple[str, ...]:
    name = f"`{row['mistake']}`" + (", with Eagle3" if row["eagle3"] else "")
    if "right" not in row:
        return name, f"`{row['shape']}`", "no answers", "all", plain(_ended(row))
    lost = fall(row, right)
    changed = f"{row['asked'] - row['same_replies']} of {row['asked']}"
    if right and row.get("accept_length") and right.get("accept_length"):
        lengths = f"{right['accept_length']:.2f} to {row['accept_length']:.2f}"
        changed += f"; tokens a step {lengths}"
    points = "not known" if lost is None else f"{lost:.1f} points"
    return name, f"`{row['shape']}`", share(row), points, changed


def _ended(row: Row) -> str:
    return f"ends: {row['reason']}"


def notes(data: dict[str, Any]) -> str:
    """The reference with its interval, the tolerance, what is not run, and each near tie."""
    score = Score(data["reference"]["right"], data["reference"]["asked"])
    low, high = score.interval
    lines = [
        f"Reference: transformers in fp32 has {score.right} of {score.asked} right "
        f"({100 * score.share:.1f} %); Wilson's 95 % interval is {100 * low:.1f} % to "
        f"{100 * high:.1f} %. A near tie is a margin of at most {data['near_tie']:.1e}."
    ]
    reasons: dict[str, list[str]] = {}
    for row in data["rows"]:
        if row["status"] == "not run":
            names = reasons.setdefault(plain(row["reason"]), [])
            if f"`{row['shape']}`" not in names:
                names.append(f"`{row['shape']}`")
    lines += [f"- not run: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    ties = [(row["id"], tie) for row in data["rows"] for tie in row.get("near_ties", ())]
    lines += [
        f"- near tie: {name}, question {tie['question']}, step {tie['step']}: token "
        f"{tie['found']} for {tie['expected']}, margin {tie['margin']:.1e}"
        for name, tie in ties
    ]
    if not ties:
        lines.append("- near ties: none.")
    return lines[0] + "\n\n" + "\n".join(lines[1:])
