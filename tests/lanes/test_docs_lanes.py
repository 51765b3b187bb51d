"""docs/lanes.md has the lanes and the numbers that the lane files have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ci.lane import docs

TEXT = (Path(__file__).parents[2] / "docs/lanes.md").read_text()


@pytest.mark.parametrize(("mark", "rows"), [("lanes", docs.lanes()), ("numbers", docs.numbers())])
def test_the_tables_are_those_of_the_lane_files(mark: str, rows: list[str]) -> None:
    found = re.search(f"<!-- {mark} -->\n(.*?)\n<!-- /{mark} -->", TEXT, re.DOTALL)
    assert found is not None
    assert found[1].splitlines() == rows, "print them with `python -m ci.lane.docs`"


def test_every_command_of_the_page_exists() -> None:
    commands = set(re.findall(r"python -m ci\.lane (\w+)", TEXT))
    assert commands == {"list", "check", "run", "compare"}
