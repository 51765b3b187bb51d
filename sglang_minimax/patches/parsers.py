"""Our parsers under the names that SGLang's options know."""

from __future__ import annotations

TOOL_CALL_NAME = "minimax-m2"
REASONING_NAMES = ("minimax", "minimax-append-think")


def register_tool_calls() -> None:
    """`--tool-call-parser minimax-m2`, in each process that imports SGLang's registry."""
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    from sglang_minimax.parsers.tool_detector import MinimaxM2Detector

    FunctionCallParser.ToolCallParserEnum[TOOL_CALL_NAME] = MinimaxM2Detector


def register_reasoning() -> None:
    """`--reasoning-parser minimax` and `minimax-append-think`, likewise."""
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    from sglang_minimax.parsers.reasoning_detector import (
        MinimaxAppendThinkDetector,
        MinimaxDetector,
    )

    detectors = (MinimaxDetector, MinimaxAppendThinkDetector)
    ReasoningParser.DetectorMap.update(zip(REASONING_NAMES, detectors, strict=True))
