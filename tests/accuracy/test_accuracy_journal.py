"""The log as the state of a run: killed, torn, of another run, written twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sglang_minimax.accuracy import ARITHMETIC
from sglang_minimax.accuracy.errors import AccuracyError
from sglang_minimax.accuracy.journal import Journal
from tests.accuracy.conftest import Serve
from tests.accuracy.fake_server import Body, Said, question_of

HEADING = {"suite": "gsm8k", "identity": {"shots": 5, "seed": 0}, "server": {"tp_size": 1}}


def test_what_was_written_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log"
    with Journal(path, HEADING) as journal:
        journal.add({"id": "1", "reply": "\ud800\u2028é\n"})
    with Journal(path, HEADING) as journal:
        assert journal.entries == {"1": {"id": "1", "reply": "\ud800\u2028é\n"}}
        assert journal.found == 1
        journal.add({"id": "2"})
        assert journal.found == 1
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_torn_line_is_as_if_never_written(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "log"
    with Journal(path, HEADING) as journal:
        journal.add({"id": "1", "text": "a" * 20})
        journal.add({"id": "2", "text": "b" * 20})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Journal(path, HEADING) as journal:
        assert set(journal.entries) == {"1"}
        journal.add({"id": "2", "text": "b" * 20})
    assert path.read_bytes() == whole


def test_a_torn_first_line_is_a_new_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('{"suite": "gs')
    with Journal(path, HEADING) as journal:
        assert journal.entries == {}
    assert json.loads(path.read_text()) == HEADING


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"identity": {"shots": 0, "seed": 0}}, "shots 5 there, 0 now"),
        ({"identity": {"shots": 5, "seed": 0, "limit": 3}}, "limit None there, 3 now"),
        ({"server": {"tp_size": 8}}, "tp_size 1 there, 8 now"),
        ({"suite": "tools"}, "suite gsm8k there, tools now"),
    ],
)
def test_the_log_of_another_run_is_left_alone(tmp_path: Path, other: Any, words: str) -> None:
    path = tmp_path / "log"
    with Journal(path, HEADING) as journal:
        journal.add({"id": "1"})
    before = path.read_bytes()
    with pytest.raises(AccuracyError, match=words):
        Journal(path, HEADING | other)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["not a log\n", "[1]\n", '{"suite": "gsm8k"}\n'])
def test_another_file_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(AccuracyError, match="give another --log"):
        Journal(path, HEADING)
    assert path.read_text() == content


def test_a_file_without_an_end_of_line_is_left_alone(tmp_path: Path) -> None:
    """It is no torn log: the first line of one begins as ours do."""
    path = tmp_path / "notes.txt"
    path.write_text("do not lose me")
    with pytest.raises(AccuracyError, match="give another --log"):
        Journal(path, HEADING)
    assert path.read_text() == "do not lose me"


def test_two_runs_do_not_write_one_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with Journal(path, HEADING), pytest.raises(AccuracyError, match="another run is writing"):
        Journal(path, HEADING)
    Journal(path, HEADING).close()


def test_a_log_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(AccuracyError, match="cannot be written"):
        Journal(tmp_path, HEADING)


def test_without_a_log_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Journal(None, HEADING) as journal:
        journal.add({"id": "1"})
        assert set(journal.entries) == {"1"}
    assert list(tmp_path.iterdir()) == []


# --- a run that is killed ------------------------------------------------------------------

ROWS = [json.loads(line) for line in (ARITHMETIC / "test.jsonl").open()][:8]
RIGHT = {row["question"]: row["answer"].rpartition("#### ")[2] for row in ROWS}


class Holding:
    """Answers right, and holds on to the sixth question until it is let go."""

    def __init__(self) -> None:
        self.reached, self.free = threading.Event(), threading.Event()

    def __call__(self, body: Body) -> Said:
        question = question_of(body)
        if question == ROWS[5]["question"]:
            self.reached.set()
            self.free.wait(300)
        return Said(f"#### {RIGHT[question]}")


def command(url: str, log: Path, *more: str) -> list[str]:
    """The suite as a user runs it."""
    return [
        *(sys.executable, "-m", "sglang_minimax.cli.main", "accuracy", "gsm8k", "--url", url),
        *("--data", "arithmetic", "--limit", str(len(ROWS)), "--shots", "0", "--parallel", "1"),
        *("--log", str(log), *more),
    ]


def stop(answer: Holding, url: str, log: Path, how: signal.Signals) -> tuple[int, str]:
    """A run that is stopped at the sixth question: its status and what it said."""
    answer.reached.clear()
    with subprocess.Popen(
        command(url, log),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert answer.reached.wait(180)
        begin = time.monotonic()
        process.send_signal(how)
        _, said = process.communicate(timeout=60)
        # It does not wait for the request that hangs.
        assert time.monotonic() - begin < 50
    assert "Traceback" not in said
    return process.returncode, said


def times(asked: Sequence[str]) -> list[int]:
    """How often each row was asked."""
    return [asked.count(row["question"]) for row in ROWS]


def test_a_run_that_was_stopped_goes_on(serve: Serve, tmp_path: Path) -> None:
    """By Ctrl-C."""
    pytest.importorskip("lm_eval", reason="the evaluator is not installed: the extra `accuracy`")
    from sglang_minimax.accuracy import run_gsm8k
    from sglang_minimax.accuracy.settings import Gsm8kSettings

    answer = Holding()
    server, log = serve(answer), tmp_path / "log"
    status, said = stop(answer, server.url, log, signal.SIGINT)
    assert status == 130
    assert f"stopped; --log {log} goes on from there" in said
    answer.free.set()
    again = Gsm8kSettings(url=server.url, limit=len(ROWS), shots=0, log=log)
    found = run_gsm8k(again)
    assert found.scores["strict-match"].right == len(ROWS)
    assert found.figures["answered_before"] == 5
    assert times(server.questions()) == [1, 1, 1, 1, 1, 2, 1, 1]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(serve: Serve, tmp_path: Path) -> None:
    """Stopped by Ctrl-C, gone on, killed, and gone on to the end; each as a user does it."""
    pytest.importorskip("lm_eval", reason="the evaluator is not installed: the extra `accuracy`")
    answer = Holding()
    server, log, result = serve(answer), tmp_path / "log", tmp_path / "result.json"
    assert stop(answer, server.url, log, signal.SIGINT)[0] == 130
    assert stop(answer, server.url, log, signal.SIGKILL)[0] == -signal.SIGKILL
    # A question on its way may have left half a line.
    with log.open("ab") as file:
        file.write(b'{"id": "5", "quest')
    answer.free.set()
    again = subprocess.run(
        command(server.url, log, "--json", str(result)), capture_output=True, timeout=240
    )
    assert again.returncode == 0, again.stderr.decode()
    found = json.loads(result.read_text())
    assert found["scores"]["strict-match"]["right"] == len(ROWS)
    assert found["figures"]["answered_before"] == 5
    assert times(server.questions()) == [1, 1, 1, 1, 1, 3, 1, 1]


def test_a_resume_that_forgets_asks_again(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake that the count above is for."""
    pytest.importorskip("lm_eval", reason="the evaluator is not installed: the extra `accuracy`")
    from sglang_minimax.accuracy import run_gsm8k
    from sglang_minimax.accuracy.settings import Gsm8kSettings

    server = serve(lambda body: Said("#### 1"))
    settings = Gsm8kSettings(url=server.url, limit=4, shots=0, log=tmp_path / "log")
    for _ in range(2):
        run_gsm8k(settings)
    assert len(server.asked) == 4
    ours = Journal._read

    def forgets(self: Journal, heading: dict[str, Any]) -> dict[str, Any]:
        ours(self, heading)
        return {}

    monkeypatch.setattr(Journal, "_read", forgets)
    run_gsm8k(settings)
    assert len(server.asked) == 8
