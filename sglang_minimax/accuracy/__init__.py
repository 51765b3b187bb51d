"""Accuracy and speed of a live server that speaks OpenAI's protocol. Never imports SGLang or torch.

`run_gsm8k`, `run_tools` and `run_bench_serving` are the entry points; each takes its settings from
`settings.py` and returns a `Result` from `results.py`, or raises AccuracyError with one sentence
(RequestsFailed where requests failed, with their number). `Result.metrics` is the flat table of
names and numbers for thresholds. What the evaluator needs is the extra `accuracy`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_minimax.accuracy.results import Result
    from sglang_minimax.accuracy.settings import Gsm8kSettings, ServingSettings, ToolSettings

_ASSETS = Path(__file__).parent.parent / "assets"

#: The bundled GSM8K-format folder: `test.jsonl` (200 questions) and `train.jsonl` (for the shots).
ARITHMETIC = _ASSETS / "arithmetic"

#: The bundled cases of the tool-call suite.
TOOL_CALLS = _ASSETS / "tool_calls" / "cases.jsonl"


def run_gsm8k(settings: Gsm8kSettings) -> Result:
    """Ask the questions and judge the replies with the evaluator's GSM8K task.

    Scores: `strict-match`, `flexible-extract`. Figures: `truncated_share`, tokens, seconds, ...
    """
    from sglang_minimax.accuracy.gsm8k import run

    return run(settings)


def run_tools(settings: ToolSettings) -> Result:
    """Ask the cases whole and streamed, and compare the calls that come back.

    Scores: `well-formed`, `correct`, `streamed-well-formed`, `streamed-correct`, `streamed-same`.
    """
    from sglang_minimax.accuracy.tools import run

    return run(settings)


def run_bench_serving(settings: ServingSettings) -> Result:
    """Run SGLang's `sglang.benchmark.serving` and read its figures.

    Figures: `request_throughput`, `output_throughput`, `median_ttft_ms`, `p99_ttft_ms`, the same
    of `tpot` and `itl`, `accept_length`, ...
    """
    from sglang_minimax.accuracy.serving import run

    return run(settings)
