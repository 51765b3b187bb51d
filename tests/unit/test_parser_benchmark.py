"""The parser benchmark: what it says of its figures, and that it runs. No timing here."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks import (
    bench_parsers,
    common,
    parser_plot,
    parser_runs,
    parser_table,
    parser_waits,
    readme,
)
from benchmarks.parser_runs import CONTENTS, IN_TREE, OURS, PARSERS, Reply, Run
from benchmarks.parser_table import Row

ROOT = Path(__file__).parents[2]
BUDGET = 60.0


@pytest.mark.parametrize("name", CONTENTS)
def test_a_content_has_its_length_in_bytes(name: str) -> None:
    text = parser_runs.content(name, 2048)
    assert len(text.encode()) == 2048
    assert text.startswith(CONTENTS[name])


def test_the_code_is_what_makes_parsers_stumble() -> None:
    text = parser_runs.content("code", 2048)
    assert text.count("}") > text.count("{") + 1
    assert all(character in text for character in "<\"'\\\n")
    assert text.endswith("\n")
    assert not re.search("</?(parameter|invoke|minimax)", text)


@pytest.mark.parametrize("length", [1, 4, 64, 10_000])
def test_pieces_are_the_reply(length: int) -> None:
    reply = Reply(parser_runs.content("code", 100))
    opening, *pieces = reply.pieces(length)
    assert opening == "<minimax:tool_call>"
    assert opening + "".join(pieces) == reply.text()
    assert all(len(piece) == length for piece in pieces[:-1])


def test_what_has_arrived_is_of_the_value() -> None:
    reply = Reply("0123456789")
    start = reply.text().index("0123456789")
    assert [reply.arrived(start + n) for n in (-9, 0, 1, 10, 40)] == [0, 0, 1, 10, 10]


def calls(value: Any, command: str = "make test") -> list[tuple[str, str]]:
    return [
        ("write_file", json.dumps({"content": value})),
        ("run", json.dumps({"command": command})),
    ]


def test_verdicts() -> None:
    reply = Reply("a\n")
    assert reply.verdict(calls("a\n")) == "right"
    assert reply.verdict(calls("a")) == reply.verdict(calls("a\n", "make")) == "another value"
    assert reply.verdict(calls("a\n")[:1]) == reply.verdict([]) == "other calls"
    (name, arguments), command = calls("a\n")
    assert reply.verdict([(name, arguments[:-1]), command]) == "not JSON"


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("length", [1, 4, 64])
def test_ours_is_right_and_gives_text_at_once(content: str, length: int) -> None:
    reply = Reply(parser_runs.content(content, 1000))
    run = parser_runs.stream(OURS, reply, length, BUDGET)
    assert run.verdict == "right"
    assert run.stopped_at is None
    assert run.first_after is not None
    assert 0 < run.first_after <= length
    assert run.first_seconds is not None
    assert 0 < run.first_seconds <= run.seconds
    assert 0 < run.longest <= run.seconds


def test_in_tree_is_what_the_documentation_says() -> None:
    """Not a wish: a release of SGLang that mends this changes what we say of it."""
    code, prose = (Reply(parser_runs.content(name, 1000)) for name in ("code", "prose"))
    found = parser_runs.stream(IN_TREE, code, 4, BUDGET)
    assert (found.verdict, found.first_after) == ("not JSON", 1000)
    assert parser_runs.stream(IN_TREE, prose, 4, BUDGET).verdict == "right"
    assert parser_runs.whole(IN_TREE, code).verdict == "another value"
    assert parser_runs.whole(IN_TREE, prose).verdict == "right"
    assert parser_runs.whole(OURS, code).verdict == "right"


@pytest.mark.parametrize("name", PARSERS)
def test_each_parser_is_the_one_that_is_named(name: str) -> None:
    before = parser_runs.FunctionCallParser.ToolCallParserEnum["minimax-m2"]
    assert type(parser_runs.parser(name).detector) is PARSERS[name]
    assert parser_runs.FunctionCallParser.ToolCallParserEnum["minimax-m2"] is before


class Clock:
    """CPU time that goes on by a second whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def process_time(self) -> float:
        self.now += 1.0
        return self.now


def test_a_run_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parser_runs, "time", Clock())
    reply = Reply(parser_runs.content("prose", 1000))
    run = parser_runs.stream(IN_TREE, reply, 4, 100.0)
    # The opening tag, then 100 pieces of 4, of which the first 59 characters are before the value.
    before = reply.text().index(reply.value) - len("<minimax:tool_call>")
    assert run.stopped_at == 400 - before
    assert (run.seconds, run.longest) == (101.0, 1.0)
    assert (run.verdict, run.first_after, run.first_seconds) == ("", None, None)


def test_slow_cells_are_not_repeated() -> None:
    ran: list[str] = []

    def run(name: str) -> Run:
        ran.append(name)
        return Run(9.0 if name == IN_TREE else 0.1, 0.1, 1, 0.1, "right")

    found = bench_parsers.several(run, 3)
    assert ran == [IN_TREE, OURS, OURS, OURS]
    assert [len(runs) for runs in found.values()] == [1, 3]


def test_spreads() -> None:
    assert parser_runs.spread([3.0, 1.0, 2.0]) == {"median": 2, "least": 1, "most": 3, "runs": 3}
    assert parser_runs.spread([4.0, 1.0])["median"] == 2.5


def row(parser: str, seconds: float, *, characters: int = 2**17, **more: Any) -> Row:
    """What a parser that is right took."""
    return {
        "content": "code",
        "chunk": 4,
        "characters": characters,
        "parser": parser,
        "cpu_seconds": parser_runs.spread([seconds]),
        "longest_increment": parser_runs.spread([seconds / 100]),
        "first_after": 2,
        "first_seconds": parser_runs.spread([seconds / 1000]),
        "stopped_at": None,
        "result": "right",
    } | more


def stopped(seconds: float, **more: Any) -> Row:
    """In-tree's row of a run that was stopped at 100,000 characters."""
    none: Row = {"first_after": None, "first_seconds": None, "result": "", "stopped_at": 100_000}
    return row(IN_TREE, seconds, **none | more)


def test_the_lines_of_the_table() -> None:
    in_tree = row(IN_TREE, 20.0, characters=2**13, first_after=2**13, result="not JSON")
    rows = [in_tree, row(OURS, 0.25, characters=2**13), stopped(60.01), row(OURS, 1.0)]
    costs, firsts, steps, results = (
        [line[n : n + 2] for line in parser_table.lines(rows, BUDGET)] for n in (1, 3, 5, 7)
    )
    assert [line[0] for line in parser_table.lines(rows, BUDGET)] == ["8 KB", "128 KB"]
    assert costs == [("20 s", "250 ms"), ("> 60 s (stopped at 97 KB)", "1 s")]
    assert firsts == [("8 KB, 20 ms", "2 characters, 0.25 ms"), ("none came", "2 characters, 1 ms")]
    assert steps == [("200 ms", "2.5 ms"), ("600 ms", "10 ms")]
    assert results == [("not JSON", "right"), ("none", "right")]
    assert len(parser_table.HEAD) == 9


@pytest.mark.parametrize(
    ("value", "text"),
    [(60.4, "60 s"), (1.26, "1.3 s"), (0.9996, "1 s"), (0.016, "16 ms"), (0.00016, "0.16 ms")],
)
def test_seconds_have_two_digits(value: float, text: str) -> None:
    assert parser_table.seconds(value) == text


def test_the_aim_is_judged_by_its_worst_content() -> None:
    prose = row(OURS, 0.6, content="prose")
    assert bench_parsers.aim([row(OURS, 0.4), row(IN_TREE, 9.0)]).startswith("met: 128 KB")
    assert bench_parsers.aim([row(OURS, 0.4), prose]).startswith("NOT MET: ")
    assert bench_parsers.aim([row(OURS, 0.1, characters=2**11)]).startswith("not measured: ")


def test_the_cost_of_a_character() -> None:
    rows = [row(OURS, 0.002, characters=1000), row(OURS, 0.004, characters=2048), stopped(9.0)]
    rows.append(row(OURS, 0.001, characters=2048, content="prose"))
    table = bench_parsers.linear_table(rows)
    assert [str(column.header) for column in table.columns] == ["", "1,000 characters", "2 KB"]
    assert [list(column.cells) for column in table.columns] == [
        ["code, chunks of 4", "prose, chunks of 4"],
        ["2.000", ""],
        ["1.953", "0.488"],
    ]


def test_the_readmes_rows_are_code_in_small_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [stopped(60.0), row(OURS, 0.25)]
    rows += [each | {"content": "prose"} for each in rows] + [each | {"chunk": 1} for each in rows]
    stamp = {"date": "today", "machine": "a machine", "command": "a command"}
    data = {"provenance": stamp, "budget": BUDGET, "rows": rows}
    (tmp_path / "parsers.json").write_text(json.dumps(data))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    head, _, line, *rest = readme.parsers().splitlines()
    assert head.startswith("| argument | CPU, in-tree | ours |")
    assert line.startswith("| 128 KB | > 60 s (stopped at 97 KB) | 250 ms | none came |")
    assert rest[0] == ""
    assert rest[1].startswith("today, a machine, `a command`, [parsers.json]")


def test_what_was_stopped_is_drawn_as_such(tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row(IN_TREE, 1.0, characters=2**13), row(OURS, 0.1, characters=2**13)]
    rows += [stopped(60.0), row(OURS, 0.5)]
    figure, axis = pyplot.subplots()
    parser_plot.panel(axis, rows, "cpu_seconds", 1.0)
    assert [text.get_text() for text in axis.texts] == ["stopped"]
    (cross,) = (line for line in axis.lines if line.get_marker() == "x")
    place = [*cross.get_xdata(), *cross.get_ydata()]  # type: ignore[misc]
    assert place == [100_000, 60.0], "not where it would have ended"
    assert axis.get_xscale() == axis.get_yscale() == "log"
    pyplot.close(figure)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command in this process, whose objects stay the garbage collector's."""
    monkeypatch.setattr(gc, "freeze", lambda: None)
    return bench_parsers.main


def test_it_runs_and_writes_what_it_says(tmp_path: Path) -> None:
    module = "benchmarks.bench_parsers"
    sizes = ("--characters", "256", "--characters", "1024")
    run = subprocess.run(
        [sys.executable, "-m", module, *sizes, "--runs", "2", "--results", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-2:] == ["parsers.json", "parsers.png"]
    data = json.loads((tmp_path / "parsers.json").read_text())
    assert (tmp_path / "parsers.png").stat().st_size > 1000
    assert data["provenance"]["command"].startswith(f"python -m {module} --characters 256")
    assert [each.partition(":")[0] for each in data["aims"]] == ["not measured"] * 2
    assert len(data["rows"]) == len(data["not_streaming"]) == 2 * 2 * 2
    for found in data["rows"] + data["not_streaming"]:
        assert found["cpu_seconds"]["runs"] == 2
        assert found["cpu_seconds"]["median"] > 0
        assert found["parser"] == IN_TREE or found["result"] == "right"


@pytest.mark.parametrize(
    "part", [{"characters": [64]}, {"characters": [64], "chunk": [4], "content": ["prose"]}]
)
def test_a_part_does_not_replace_a_result(
    part: dict[str, Any], main: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    result = common.RESULTS / "parsers.json"
    before = result.read_bytes() if result.exists() else None
    main(**part, runs=1)
    assert "nothing written: a part is not a result" in capsys.readouterr().out
    assert (result.read_bytes() if result.exists() else None) == before


def test_an_unknown_content_is_refused(main: Callable[..., None]) -> None:
    with pytest.raises(typer.BadParameter, match="there are code, prose"):
        main(content=["poetry"])


def test_what_is_recorded_is_whole() -> None:
    """Every length with both parsers, and nothing of ours that is wrong."""
    data = json.loads((common.RESULTS / "parsers.json").read_text())
    shown = [row for row in data["rows"] if row["chunk"] == parser_table.CHUNK]
    for content in CONTENTS:
        mine = [row for row in shown if row["content"] == content]
        assert [(r["characters"], r["parser"]) for r in mine] == [
            (n, name) for n in bench_parsers.CHARACTERS for name in PARSERS
        ]
    ours = [r for r in data["rows"] + data["not_streaming"] if r["parser"] == OURS]
    assert {r["result"] for r in ours} == {"right"}
    assert data["aims"] == [
        bench_parsers.aim(data["rows"]),
        bench_parsers.waits_aim(data["waits"]),
    ]


def test_what_is_recorded_meets_its_aims() -> None:
    """The figures of the committed file, beside the words that name them."""
    data = json.loads((common.RESULTS / "parsers.json").read_text())
    assert [each.partition(":")[0] for each in data["aims"]] == ["met", "met"], data["aims"]
    costs = [
        row["cpu_seconds"]["median"]
        for row in data["rows"]
        if (row["parser"], row["characters"], row["chunk"]) == (OURS, 128 * 1024, 4)
    ]
    assert len(costs) == len(CONTENTS)
    assert max(costs) < 0.5
    (longest,) = (
        row["longest"]
        for row in data["waits"]
        if (row["parser"], row["characters"], row["chunk"]) == (OURS, 128 * 1024, 4)
    )
    assert longest <= 0.020


def test_the_documentation_names_what_is_recorded() -> None:
    """In-tree's longest step in the chat handler, which is within the aim as well."""
    data = json.loads((common.RESULTS / "parsers.json").read_text())
    rows = {row["parser"]: row for row in data["waits"]}
    text = " ".join((ROOT / "docs/benchmarks-parsers.md").read_text().split())
    assert rows[IN_TREE]["steps"] == rows[OURS]["steps"], "in-tree did not come to the end"
    for name, row in rows.items():
        figures = (row["median"], row["nearly_all"], row["longest"], row["together"])
        shown = " | ".join(parser_table.seconds(each) for each in figures)
        assert f"| {name} | {row['steps']:,} | {shown} |" in text
    assert rows[IN_TREE]["longest"] <= parser_waits.AIM_SECONDS
    longest = parser_table.seconds(rows[IN_TREE]["longest"])
    assert f"In-tree's recorded {longest} meets it as well" in text


def test_the_steps_of_the_chat_handler_are_those_of_the_reply() -> None:
    """Each piece is a step, in either parser's run, until the budget is spent."""
    reply = Reply(parser_runs.content("code", 512))
    pieces = len(list(reply.pieces(4)))
    for name in (IN_TREE, OURS):
        assert len(parser_waits.steps(name, reply, 4, budget=60)) == pieces
        assert len(parser_waits.steps(name, reply, 4, budget=0)) == 1
    row = parser_waits.summary(OURS, 512, 4, [0.003, 0.001, 0.002])
    assert (row["median"], row["longest"], row["together"]) == (0.002, 0.003, 0.006)


def test_the_longest_step_judges_the_wait() -> None:
    row = parser_waits.summary(OURS, parser_waits.AIM_CHARACTERS, 4, [0.001, 0.019])
    assert bench_parsers.waits_aim([row]).startswith("met: ")
    assert bench_parsers.waits_aim([row, {**row, "longest": 0.021}]).startswith("NOT MET: ")
    assert bench_parsers.waits_aim([]).startswith("not measured: ")
