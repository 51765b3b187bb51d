"""The names of the numbers that each suite comes to, so that a lane cannot ask for another."""

from __future__ import annotations

from sglang_minimax.accuracy import serving, tools

#: The filters of lm-eval's GSM8K task, and what `accuracy.gsm8k` sums up beside them.
GSM8K = frozenset(
    {
        *("strict-match", "flexible-extract", "questions", "truncated", "truncated_share"),
        *("truncated_matches", "prompt_tokens", "completion_tokens", "longest_completion"),
        *("answered_before", "seconds"),
    }
)
TOOLS = frozenset(
    {
        *tools.SCORES,
        *("cases", "truncated", "truncated_share", "prompt_tokens", "completion_tokens"),
        *("answered_before", "seconds"),
    }
)
NAMES = {"gsm8k": GSM8K, "tools": TOOLS, "serving": frozenset(serving.FIGURES)}
