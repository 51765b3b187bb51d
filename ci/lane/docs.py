"""The tables of docs/lanes.md, from the lane files: `python -m ci.lane.docs` prints them."""

from __future__ import annotations

from collections.abc import Iterator

from ci.lane.files import find, names
from ci.lane.schema import Figure, Lane
from ci.lane.show import hardware, number


def lanes() -> list[str]:
    """A row for each lane."""
    return [_row(lane) for lane in map(find, names())]


def _row(lane: Lane) -> str:
    variants = ", ".join(f"`{name}`" for name in lane.variants)
    return f"| `{lane.name}` | {hardware(lane)} | {lane.model.name} | {variants} |"


def numbers() -> list[str]:
    """A row for each number that has a source, without those that several lanes share."""
    rows = (
        f"| {lane.model.name} | {lane.hardware.device} | `{suite}` {name} | "
        f"{number(figure.baseline)} | {number(figure.threshold)} | {figure.source} |"
        for lane, suite, name, figure in _figures()
        if (figure.baseline, figure.threshold) != (None, None)
    )
    return list(dict.fromkeys(rows))


def _figures() -> Iterator[tuple[Lane, str, str, Figure]]:
    for lane in map(find, names()):
        for suite, settings in lane.suites.items():
            for name, figure in settings.figures.items():
                yield lane, suite, name, figure


if __name__ == "__main__":
    print("\n".join([*lanes(), "", *numbers()]))
