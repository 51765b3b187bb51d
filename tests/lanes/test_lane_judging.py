"""Thresholds, results on disk, JUnit and drift: arithmetic and records, nothing is started."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from ci.lane import Exit, LaneError, junit
from ci.lane import compare as comparing
from ci.lane.outcome import Judged, Outcome, SuiteOutcome, VariantOutcome, judge, judged, read
from ci.lane.plain import lines_of, portable
from ci.lane.schema import Figure, Suite
from ci.lane.watch import STAGES, Progressed, Watch, after, sentence_of
from sglang_minimax.accuracy.asking import progress_bar
from sglang_minimax.accuracy.results import Result, Score


def figure(**values: Any) -> Figure:
    return Figure(note="n", source="s", **values)


@pytest.mark.parametrize(
    ("better", "threshold", "value", "verdict"),
    [
        ("higher", 0.9, 0.9, "held"),
        ("higher", 0.9, 0.8999, "missed"),
        ("higher", 0.9, 0.95, "held"),
        ("lower", 20.0, 20.0, "held"),
        ("lower", 20.0, 20.1, "missed"),
        ("lower", 20.0, 5.0, "held"),
        ("higher", None, 0.1, "reported"),
        ("higher", None, None, "reported"),
        ("higher", 0.9, None, "absent"),
        ("higher", 0.9, float("nan"), "missed"),
    ],
)
def test_a_value_is_held_to_its_threshold(
    better: Any, threshold: float | None, value: float | None, verdict: str
) -> None:
    found = judge("x", figure(better=better, threshold=threshold), value)
    assert found.verdict == verdict


def result(right: int = 30, asked: int = 32) -> dict[str, Any]:
    """As the suites of `sglang_minimax.accuracy` write it."""
    scores = {"flexible-extract": Score(right, asked)}
    figures = {"output_throughput": 100.0, "accept_length": None}
    return Result("gsm8k", {}, "2026-01-01", {}, scores, figures).as_dict()


def suite(**figures: Figure) -> Suite:
    named = {name.replace("_extract", "-extract"): value for name, value in figures.items()}
    return Suite(limit_minutes=1.0, figures=named)


def test_a_result_of_a_suite_is_judged_by_name() -> None:
    asked = suite(
        flexible_extract=figure(threshold=0.9),
        output_throughput=figure(threshold=200.0),
        accept_length=figure(threshold=1.8),
        nothing=figure(),
    )
    found = judged("gsm8k", asked, result())
    assert [each.verdict for each in found.figures] == ["held", "missed", "absent", "reported"]
    assert found.figures[0].value == 30 / 32
    assert found.figures[0].interval == Score(30, 32).interval
    assert found.figures[1].interval is None
    assert not found.passed
    assert judged("gsm8k", suite(flexible_extract=figure(threshold=0.9)), result()).passed


def outcome(right: int = 30, error: str | None = None, missing: Any = ()) -> Outcome:
    asked = suite(flexible_extract=figure(threshold=0.9), output_throughput=figure(better="higher"))
    suites = [judged("gsm8k", asked, result(right))]
    if error:
        suites.append(SuiteOutcome("tools", error=error))
    variants = [] if missing else [VariantOutcome("tp2", ["python"], suites)]
    return Outcome("example", "about", "model", "2026-01-01", {}, [*missing], variants, ended=True)


def test_the_status_of_a_run() -> None:
    interrupted, killed, idle, follower = outcome(), outcome(), outcome(), outcome()
    interrupted.variants[0].interrupted = True
    assert (interrupted.status, interrupted.words) == (Exit.INTERRUPTED, "interrupted")
    killed.ended = False
    assert (killed.status, killed.words) == (Exit.FAIL, "not ended")
    idle.variants[0].suites = []
    assert idle.status == Exit.FAIL
    follower.variants = [VariantOutcome("tp2", node=1)]
    assert follower.status == Exit.PASS
    assert replace(outcome(), variants=[]).status == Exit.FAIL
    assert outcome().status == Exit.PASS
    assert outcome(right=20).status == Exit.FAIL
    assert outcome(error="it ended.").status == Exit.FAIL
    assert outcome(missing=["no GPU."]).status == Exit.COULD_NOT_RUN
    dead = outcome()
    dead.variants[0].error = "the server ended."
    assert dead.status == Exit.FAIL


def test_a_result_comes_back_from_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    for each in (outcome(), outcome(right=20, error="x."), outcome(missing=["no GPU."])):
        each.write(path)
        assert read(path) == each
    assert json.loads(path.read_text())["status"] == "could not run"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 2, "variants": []}'])
def test_what_is_no_result_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(LaneError):
        read(path)


def test_junit_says_what_failed_and_why(tmp_path: Path) -> None:
    bad = outcome(right=20, error="it ended with status 1.")
    junit.write(bad, tmp_path / "junit.xml")
    root = ET.parse(tmp_path / "junit.xml").getroot()
    (found,) = root
    counts = {name: int(found.get(name, "")) for name in ("tests", "failures", "errors")}
    assert counts == {"tests": 5, "failures": 1, "errors": 1}
    (failure,) = root.iter("failure")
    assert failure.get("message") == "0.625 against a threshold of 0.9"
    (error,) = root.iter("error")
    assert error.get("message") == "it ended with status 1."
    good = junit.document(outcome())
    assert not [*good.iter("failure"), *good.iter("error")]
    (missing,) = junit.document(outcome(missing=["no GPU."])).iter("error")
    assert missing.get("message") == "no GPU."
    (killed,) = junit.document(replace(outcome(), ended=False)).iter("error")
    assert killed.get("message") == "it has not ended."


RED = "\x1b[1;31mValueError\x1b[0m: \x1b]0;title\x07bad\x00 \ufffe\ud800 ü 漢 \U0001f600"


def test_what_a_terminal_acts_on_does_not_break_the_xml(tmp_path: Path) -> None:
    """A log in colours would be no XML, and CI would show nothing of the run."""
    junit.write(outcome(error=RED), tmp_path / "junit.xml")
    (error,) = ET.parse(tmp_path / "junit.xml").getroot().iter("error")
    assert error.get("message") == "ValueError: bad  ü 漢 \U0001f600"
    assert [*lines_of(f"a\r\n{RED}\n\x1b[K\n")] == ["a", "ValueError: bad  ü 漢 \U0001f600"]
    assert sentence_of(f"x\n{RED}\n") == "ValueError: bad  ü 漢 \U0001f600"


def test_a_result_has_no_folders_of_this_machine() -> None:
    places = [
        *(("/home/me", "~"), ("/home/me/repo", ""), ("/home/me/repo/.venv/bin/python", "python")),
        *(("/models/m27", "$MODEL"), ("/out", "")),
    ]
    kept = {
        "command": ["/home/me/repo/.venv/bin/python", "-m", "x", "--model-path", "/models/m27"],
        "log": "/out/tp2/gsm8k.jsonl",
        "data": ("/home/me/data", "/home/me/repo/a", "/models/m27b", "/x/out/1", "openai/gsm8k"),
        "shots": 5,
    }
    assert portable(kept, places) == {
        "command": ["python", "-m", "x", "--model-path", "$MODEL"],
        "log": "tp2/gsm8k.jsonl",
        "data": ["~/data", "a", "/models/m27b", "/x/out/1", "openai/gsm8k"],
        "shots": 5,
    }


# --- drift ---


def test_drift_of_a_share_has_its_intervals() -> None:
    near, far = (
        comparing.compare(outcome(30), outcome(29)),
        comparing.compare(outcome(30), outcome(5)),
    )
    share = near[0]
    assert share.change == pytest.approx(-1 / 32)
    assert (share.apart, far[0].apart) == (False, True)
    throughput = near[1]
    assert (throughput.change, throughput.apart, throughput.is_loss) == (0.0, None, False)


@pytest.mark.parametrize(
    ("before", "after", "lost"), [(30, 31, False), (30, 20, True), (20, 19, False), (20, 30, False)]
)
def test_only_a_threshold_that_held_can_be_lost(before: int, after: int, lost: bool) -> None:
    found = comparing.compare(outcome(before), outcome(after))
    assert any(each.is_loss for each in found) == lost


@pytest.mark.parametrize(("threshold", "right", "lost"), [(0.5, 20, True), (None, 30, False)])
def test_the_threshold_is_that_of_the_first_run(
    threshold: float | None, right: int, lost: bool
) -> None:
    """One that was lowered, or taken away, hides no loss and is none."""
    lowered = outcome(right)
    figures = lowered.variants[0].suites[0].figures
    value, interval = figures[0].value, figures[0].interval
    figures[0] = judge("flexible-extract", figure(threshold=threshold), value, interval)
    assert lowered.status == Exit.PASS
    found = comparing.compare(outcome(30), lowered)
    assert [each.is_loss for each in found] == [lost, False]


def test_a_figure_that_is_gone_was_lost() -> None:
    """A suite that crashes must not look like one that held."""
    gone = outcome()
    gone.variants[0].suites = [SuiteOutcome("gsm8k", error="it ended.")]
    found = comparing.compare(outcome(), gone)
    assert [each.is_loss for each in found] == [True, False]


def test_what_else_differs_is_said() -> None:
    one, other = outcome(), outcome()
    one.variants[0].command = ["python", "--port", "1", "--tp-size", "2"]
    other.variants[0].command = ["python", "--port", "7", "--tp-size", "2"]
    for each, log in ((one, "a"), (other, "b")):
        each.variants[0].suites[0].result["settings"] = {"log": log, "shots": 5}
    assert comparing.differences(one, other) == []
    other.model, other.machine = "another", {"torch": "2"}
    other.variants[0].command[-1] = "4"
    other.variants[0].suites[0].result["settings"]["shots"] = 8
    assert comparing.differences(one, other) == [
        "model: model before, another after.",
        "tp2 command: python --tp-size 2 before, python --tp-size 4 after.",
        "tp2 gsm8k shots: 5 before, 8 after.",
        "machine torch: nothing before, 2 after.",
    ]


def test_two_lanes_are_not_compared() -> None:
    with pytest.raises(LaneError, match="compare two runs of one lane"):
        comparing.compare(outcome(), replace(outcome(), lane="other"))


def test_an_interval_touches_at_its_end() -> None:
    one = Judged("x", "held", 0.5, (0.4, 0.6))
    other = Judged("x", "held", 0.7, (0.6, 0.8))
    assert comparing.Drift("v", "s", one, other).apart is False


# --- what a server says while it starts ---

LOG = """[2026-11-22 04:12:28] server_args={'model_path': 'x'}
[2026-11-22 04:12:29 TP0] Load weight begin. avail mem=16.06 GB
Loading weights:   0%|          | 0.00/7.46M\rLoading weights:  45%|####  | 3.4/7.46M
[2026-11-22 04:12:29 TP0] Load weight end. elapsed=0.14 s
[2026-11-22 04:12:29 TP0] KV Cache is allocated. dtype: torch.bfloat16
[2026-11-22 04:12:40 TP0] Capture decode CUDA graph begin.
[2026-11-22 04:12:50] INFO:     Uvicorn running on http://127.0.0.1:31823
[2026-11-22 04:12:50] The server is fired up and ready to roll!
"""


def test_progress_follows_the_log() -> None:
    now, seen = Progressed(), []
    for line in lines_of(LOG):
        now = after(line, now)
        seen.append((now.words, now.share))
    words = list(dict.fromkeys(each for each, _ in seen))
    everything = [name for name, _ in STAGES if name not in ("importing SGLang", "warming up")]
    assert words == everything
    assert ("loading weights", 0.45) in seen


def test_off_a_terminal_every_tenth_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loading 230 GB takes long; a log without a line looks like a hang."""
    log = tmp_path / "server.log"
    log.write_text("")
    with Watch(log, "lane tp8") as watch:
        for text in ("Load weight begin\n", *(f"Loading weights: {n:3}%|\r" for n in range(101))):
            with log.open("a") as file:
                file.write(text)
            watch.look()
    said = [line.rpartition(" (")[0] for line in capsys.readouterr().err.splitlines()]
    loading = "lane tp8: loading weights"
    shares = [f"{loading} {n} %" for n in range(10, 101, 10)]
    assert said == ["lane tp8: importing SGLang", loading, *shares]


def test_a_suite_says_in_its_log_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """A bar in a file is seen at its end alone."""
    with progress_bar(40, True) as advance:
        advance(3)
        for _ in range(37):
            advance(1)
    assert capsys.readouterr().err.splitlines() == [f"{n} of 40" for n in range(4, 41, 4)]


def test_progress_never_goes_back() -> None:
    """A rank that lags behind prints what others are done with."""
    now = after("KV Cache is allocated", Progressed())
    assert after("[TP3] Load weight begin.", now) == now
    assert after("Loading weights:  10%|", now).share is None


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        ("a\nsglang-minimax: use --ep-size 8.\nTraceback\nSystemExit: 1\n", "use --ep-size 8"),
        ("[2026-11-22 04:12:28] sglang-minimax: no.\nb\n", "sglang-minimax: no."),
        (
            "Traceback (most recent call last):\n  x\nValueError: bad\nRuntimeError: worse\n",
            "worse",
        ),
        ("torch.OutOfMemoryError: 80 GB\nlast line\n", "torch.OutOfMemoryError: 80 GB"),
    ],
)
def test_the_sentence_of_a_server_that_failed(log: str, sentence: str) -> None:
    found = sentence_of(log)
    assert found is not None
    assert sentence in found


def test_a_log_without_a_reason_has_none() -> None:
    assert sentence_of("hello\nworld\n") is None
