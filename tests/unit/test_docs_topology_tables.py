"""The operators' pages against the code: the tables, the commands shown, the sizes advised."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from ci import topology_tables
from sglang_minimax.cli.main import app
from sglang_minimax.config import Architecture
from sglang_minimax.drafts.acceptance import Watch
from sglang_minimax.patches import requests
from sglang_minimax.support import Launch, notes, refusals

TEXT = topology_tables.PAGE.read_text()
DOCS = topology_tables.PAGE.parent
PUBLISHED = json.loads((Path(__file__).parents[1] / "data/published_config.json").read_text())
OPERATORS = (
    *("choose-a-topology", "serve", "quantised", "eagle3", "tool-calls", "weight-updates"),
    "troubleshooting",
)
FIELDS = {
    "tp-size": "tp",
    "attn-dp-size": "dp",
    "ep-size": "ep",
    "pp-size": "pp",
    "nnodes": "nodes",
}
EXAMPLE = re.compile(r"```\n\$ sglang-minimax (topology .*)\n((?:.+\n)+?)```")


def test_the_tables_are_what_the_code_computes() -> None:
    assert topology_tables.rendered(TEXT) == TEXT, "run `python -m ci.topology_tables --write`"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("| 57.68 GB |", "| 57.69 GB |"),  # weights
        ("+33.3 %", "+33.4 %"),  # padding
        ("31,744 B", "63,488 B"),  # KV cache of a token
        ("| 8,204 |", "| 8,192 |"),  # bytes on their way
    ],
)
def test_a_stale_cell_would_show(right: str, wrong: str) -> None:
    stale = TEXT.replace(right, wrong)
    assert stale != TEXT
    assert topology_tables.rendered(stale) == TEXT


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ("ci.lane.memory.BF16_BYTES", 1),  # a cache of half the size
        ("ci.topology_tables.FRACTION", 0.9),  # more room than the page says
        ("ci.topology_tables.HOPPER", 80),  # a GPU without FP8 kernels
    ],
)
def test_other_arithmetic_would_show(
    monkeypatch: pytest.MonkeyPatch, place: str, wrong: float
) -> None:
    monkeypatch.setattr(place, wrong)
    monkeypatch.setattr(topology_tables, "SHAPES", ("tp=8,ep=8",))
    fresh = topology_tables._fit.__wrapped__
    monkeypatch.setattr(topology_tables, "_fit", fresh)
    try:
        tables = [topology_tables.memory.__wrapped__(), topology_tables.traffic.__wrapped__()]
    except ValueError:  # refused: no table at all
        return
    rows = {line for table in tables for line in table.splitlines()}
    assert not rows <= set(TEXT.splitlines())


def test_these_rows_are_on_the_page_without_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology_tables, "SHAPES", ("tp=8,ep=8",))
    tables = [topology_tables.memory.__wrapped__(), topology_tables.traffic.__wrapped__()]
    assert {line for table in tables for line in table.splitlines()} <= set(TEXT.splitlines())


def test_kv_bytes_by_hand() -> None:
    # 62 layers, K and V, 8 heads of 128, BF16: whole, and one head of eight.
    whole = 62 * 2 * 8 * 128 * 2
    assert f"`--tp-size 8 --attn-dp-size 8 --ep-size 8` | 32.40 GB | - | {whole:,} B" in TEXT
    assert f"`--tp-size 8 --ep-size 8` | 28.94 GB | - | {whole // 8:,} B" in TEXT


def sentences() -> Iterator[tuple[str, str]]:
    """(page, a sentence of the code that it quotes)."""
    arch = Architecture.from_config(PUBLISHED)
    asked = SimpleNamespace(custom_logit_processor=None)
    with pytest.raises(ValueError, match="min_p") as refused:
        requests.check_with_draft(asked, {"min_p": 0.1}, "EAGLE3")
    staged = Launch(pp=2, speculative_algorithm="EAGLE3", quantization="fp8")
    yield "eagle3", str(refused.value)
    yield "eagle3", Watch(3).heard(240, 245) or ""
    yield "eagle3", refusals(arch, staged)[0]
    yield "quantised", notes(arch, Launch(tp=8, quantization="fp8"))[0]
    yield "weight-updates", weight_updates_idle()


def weight_updates_idle() -> str:
    source = (DOCS.parent / "sglang_minimax/patches/weight_updates.py").read_text()
    found = re.search(r'"(requests are still running.*?)"\n\s+"(.*?)"\n', source, re.DOTALL)
    assert found
    return found[1] + found[2]


def test_the_sentences_are_those_of_the_code() -> None:
    for page, sentence in sentences():
        assert len(sentence) > 50
        assert sentence in (DOCS / f"{page}.md").read_text(), sentence


@pytest.mark.parametrize("page", OPERATORS)
def test_every_launch_line_is_legal_for_the_published_checkpoint(page: str) -> None:
    text = (DOCS / f"{page}.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"`(--tp-size[^`\n]*)`|(sglang\.launch_server[^\n]*MiniMaxAI[^\n]*)", text)
    assert lines or page in ("tool-calls", "weight-updates", "quantised")
    arch = Architecture.from_config(PUBLISHED)
    for line in map("".join, lines):
        named = dict(re.findall(r"--([a-z-]+) (\d+)", line))
        sizes = {FIELDS[name]: int(size) for name, size in named.items() if name in FIELDS}
        assert refusals(arch, Launch(quantization="fp8", **sizes)) == [], line


@pytest.mark.parametrize("page", OPERATORS)
def test_topology_prints_what_is_shown(page: str) -> None:
    for command, shown in EXAMPLE.findall((DOCS / f"{page}.md").read_text()):
        result = CliRunner().invoke(app, shlex.split(command))
        printed = [line.rstrip() for line in (result.stdout + result.stderr).splitlines()]
        wanted = [line.rstrip() for line in shown.splitlines() if line != "..."]
        assert [line for line in wanted if line not in printed] == []
