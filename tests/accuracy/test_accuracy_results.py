"""Intervals, settings and the written result."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from scipy.stats import binomtest

from sglang_minimax.accuracy.errors import AccuracyError
from sglang_minimax.accuracy.results import Z_95, Result, Score, wilson
from sglang_minimax.accuracy.settings import Gsm8kSettings, ServingSettings, ToolSettings

COUNTS = [(0, 1), (1, 1), (0, 20), (20, 20), (19, 20), (187, 200), (1000, 1319), (1, 1319)]


def normal(right: int, asked: int) -> tuple[float, float]:
    """The textbook interval, which is not Wilson's: no width at 0 and 1, and over 1 beside it."""
    share = right / asked
    spread = Z_95 * math.sqrt(share * (1 - share) / asked)
    return share - spread, share + spread


def without_shift(right: int, asked: int) -> tuple[float, float]:
    """Wilson's width around the share itself."""
    low, high = wilson(right, asked)
    share = right / asked
    return share - (high - low) / 2, share + (high - low) / 2


def agrees(interval: object, right: int, asked: int) -> bool:
    """Whether it is scipy's interval, but for the rounding of doubles."""
    found = binomtest(right, asked).proportion_ci(0.95, method="wilson")
    return interval(right, asked) == pytest.approx((found.low, found.high), abs=1e-12)  # type: ignore[operator]


@pytest.mark.parametrize(("right", "asked"), COUNTS)
def test_the_interval_is_scipys(right: int, asked: int) -> None:
    assert agrees(wilson, right, asked)


@pytest.mark.parametrize("wrong", [normal, without_shift])
def test_other_intervals_are_noticed(wrong: object) -> None:
    assert not all(agrees(wrong, right, asked) for right, asked in COUNTS)


@pytest.mark.parametrize(("right", "asked"), [(1, 0), (0, 0), (3, 2), (-1, 2)])
def test_no_interval_of_what_is_no_share(right: int, asked: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        wilson(right, asked)


def test_a_result_is_written_whole_and_read_by_names(tmp_path: Path) -> None:
    result = Result(
        "gsm8k",
        Gsm8kSettings(api_key="a secret").as_dict(),
        "2026-01-01T00:00:00+00:00",
        {"tp_size": 8},
        {"strict-match": Score(3, 4)},
        {"truncated_share": 0.25, "accept_length": None},
    )
    path = tmp_path / "new" / "result.json"
    result.write(path)
    text = path.read_text()
    found = json.loads(text)
    assert found["scores"]["strict-match"]["share"] == 0.75
    assert found["figures"]["accept_length"] is None
    assert result.metrics == {"strict-match": 0.75, "truncated_share": 0.25}
    assert "secret" not in text
    assert [each.name for each in path.parent.iterdir()] == ["result.json"]


def test_no_path_of_the_machine_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Gsm8kSettings(data="/d/gsm8k", log=tmp_path / "logs" / "a", prompt="/{{question}}")
    assert Result("gsm8k", settings.as_dict(), "", {}).as_dict()["settings"] == {
        **settings.as_dict(),
        "data": "gsm8k",
        "log": "logs/a",
    }
    serving = ServingSettings(tokenizer="/m/tiny", data="a/b", arguments=("--lora-path", "/l/x"))
    found = Result("bench", serving.as_dict(), "", {"model_path": "/m/tiny", "url": "http://h/v"})
    written = found.as_dict()
    assert written["settings"]["arguments"] == ["--lora-path", "x"]
    assert (written["settings"]["tokenizer"], written["settings"]["data"]) == ("tiny", "a/b")
    assert written["server"] == {"model_path": "tiny", "url": "http://h/v"}
    bundled = Result("tools", ToolSettings().as_dict(), "", {}).as_dict()["settings"]
    assert bundled["cases"] == "cases.jsonl"


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (Gsm8kSettings, {"limit": 0}, "limit is 0"),
        (Gsm8kSettings, {"shots": -1}, "shots is -1"),
        (Gsm8kSettings, {"parallel": 0}, "parallel is 0"),
        (Gsm8kSettings, {"temperature": -0.1}, "temperature is -0.1"),
        (Gsm8kSettings, {"top_p": 0.0}, "top_p is 0"),
        (Gsm8kSettings, {"timeout": 0}, "timeout is 0"),
        (Gsm8kSettings, {"url": "localhost:30000"}, "http://"),
        (Gsm8kSettings, {"endpoint": "responses"}, "chat or completion"),
        (Gsm8kSettings, {"endpoint": "completion", "thinking": False}, "no chat template"),
        (ToolSettings, {"max_tokens": 0}, "max_tokens is 0"),
        (ServingSettings, {"prompts": 0}, "prompts is 0"),
        (ServingSettings, {"rate": 0.0}, "rate is 0"),
        (ServingSettings, {"range_ratio": 2.0}, "range_ratio is 2"),
        (ServingSettings, {"limit_s": -1.0}, "limit_s is -1"),
    ],
)
def test_settings_that_make_no_sense(kind: type, values: dict, words: str) -> None:
    with pytest.raises(AccuracyError, match=words):
        kind(**values)


def test_settings_are_json() -> None:
    settings = ServingSettings(log=Path("a/log"), arguments=("--warmup-requests", "2"))
    found = json.loads(json.dumps(settings.as_dict()))
    assert (found["log"], found["arguments"]) == ("a/log", ["--warmup-requests", "2"])
