"""The README against the code and the result files that it speaks of."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import readme
from sglang_minimax import __version__
from sglang_minimax.config import Architecture
from sglang_minimax.plugin import SUPPORTED_SGLANG
from sglang_minimax.support import Launch, notes, refusals

TEXT = readme.README.read_text()
ROOT = readme.README.parent
PUBLISHED = json.loads((Path(__file__).parents[1] / "data/published_config.json").read_text())


def test_the_tables_are_the_result_files() -> None:
    assert readme.rendered(TEXT) == TEXT, "run `python -m benchmarks.readme`"


def test_a_stale_table_would_show() -> None:
    assert readme.rendered(TEXT.replace("| `tp=1` |", "| `tp=9` |")) == readme.rendered(TEXT)
    with pytest.raises(ValueError, match="no place"):
        readme.rendered(TEXT.replace("<!-- topologies -->", ""))


@pytest.mark.parametrize("line", re.findall(r"`(--tp-size[^`]*)`", TEXT))
def test_the_launch_lines_are_legal_for_the_published_checkpoint(line: str) -> None:
    sizes = dict(re.findall(r"--(tp|ep|pp)-size (\d+)", line))
    launch = Launch(quantization="fp8", **{name: int(size) for name, size in sizes.items()})
    assert refusals(Architecture.from_config(PUBLISHED), launch) == []


@pytest.mark.parametrize("tp", [8, 16])
def test_without_expert_parallelism_blocks_are_dealt_at_the_price_it_names(tp: int) -> None:
    arch, launch = Architecture.from_config(PUBLISHED), Launch(tp=tp, quantization="fp8")
    assert refusals(arch, launch) == []
    (note,) = notes(arch, launch)
    assert "+33.3 % expert memory" in note
    assert f"--ep-size {tp} needs no padding" in note
    assert notes(arch, Launch(tp=tp, ep=tp, quantization="fp8")) == []
    assert TEXT.count("+33 %") == 3


def test_versions() -> None:
    assert f"| {__version__} | {SUPPORTED_SGLANG} (pinned) |" in TEXT


def test_every_link_leads_somewhere() -> None:
    pages = [readme.README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "ci/tiny_m2/README.md"]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"
