"""GSM8K on a real server with tiny-m2; tests/lanes/test_lane_run.py has the tool calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_minimax.accuracy import run_gsm8k
from sglang_minimax.accuracy.settings import Gsm8kSettings
from sglang_minimax.cli.local_server import LocalServer

pytestmark = pytest.mark.server


def entries(log: Path) -> list[dict]:
    """The log without its heading."""
    return [json.loads(line) for line in log.read_text().splitlines()][1:]


@pytest.mark.parametrize(
    ("endpoint", "shots", "prompt", "least"),
    # tiny-m2 is right in 99.4 % of word problems, and in 94.8 % of four-shot completions
    # (benchmarks/results/tiny_m2_accuracy.json): these 20 give 20 and 20.
    [("chat", 0, "{{question}}", 19), ("completion", 4, None, 17)],
)
def test_gsm8k(
    endpoint: str, shots: int, prompt: str | None, least: int, server: LocalServer, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="the evaluator is not installed: the extra `accuracy`")
    log = tmp_path / "log"
    settings = Gsm8kSettings(
        url=server.url,
        endpoint=endpoint,
        shots=shots,
        prompt=prompt,
        limit=20,
        max_tokens=160,
        log=log,
    )
    result = run_gsm8k(settings)
    rows = entries(log)
    assert len(rows) == 20
    assert result.scores["strict-match"].right >= least
    for name, score in result.scores.items():
        assert score.right == sum(row["right"][name] for row in rows)
    for row in rows:
        assert row["right"]["strict-match"] is (
            row["extracted"]["strict-match"] == row["expected"] and not row["truncated"]
        )
        assert bool(row["reasoning"]) is (endpoint == "chat")
        assert "think>" not in row["reply"] + row["reasoning"]
        assert row["completion_tokens"] > 5
    assert result.server["version"] == "0.5.23"
    assert result.server["tp_size"] == 1
    # A budget that no reply fits in: all are cut off, and none counts.
    cut = run_gsm8k(Gsm8kSettings(**{**settings_of(settings), "max_tokens": 4, "limit": 3}))
    assert cut.figures["truncated_share"] == 1
    assert cut.scores["flexible-extract"].right == 0


def settings_of(settings: Gsm8kSettings) -> dict:
    """The settings again, without their log."""
    return {name: getattr(settings, name) for name in ("url", "endpoint", "shots", "prompt")}


def test_thinking_off(server: LocalServer, tmp_path: Path) -> None:
    """tiny-m2 cannot answer without, but it has no thought and no tag in its answer."""
    pytest.importorskip("lm_eval", reason="the evaluator is not installed: the extra `accuracy`")
    log = tmp_path / "log"
    run_gsm8k(
        Gsm8kSettings(
            url=server.url,
            shots=0,
            prompt="{{question}}",
            thinking=False,
            limit=3,
            max_tokens=60,
            log=log,
        )
    )
    assert all(row["reply"] and not row["reasoning"] for row in entries(log))
    assert all("think>" not in row["reply"] for row in entries(log))
