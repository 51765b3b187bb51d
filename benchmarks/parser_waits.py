"""What another request waits for while a long argument streams: one step of SGLang's chat handler.

All requests of a server share one event loop. A step is what the handler does with one piece of a
reply, from the text to the server-sent events, and nobody else runs meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.function_call.function_call_parser import FunctionCallParser

from benchmarks.parser_runs import PARSERS, Reply, rounded, tools

#: Seconds that an argument of 128 KB may add to the time between two tokens of another request.
AIM_CHARACTERS, AIM_SECONDS = 2**17, 0.020


def steps(name: str, reply: Reply, length: int, budget: float) -> list[float]:
    """Seconds of each step of a streamed reply, in order, until the budget is spent."""
    # Of the handler, the method that parses and writes events; it needs no more than this.
    handler: Any = OpenAIServingChat.__new__(OpenAIServingChat)
    handler.tool_call_parser, handler.reasoning_parser = "minimax-m2", None
    handler.tokenizer_manager = SimpleNamespace(tokenizer=None)
    request = ChatCompletionRequest(
        model="m", messages=[{"role": "user", "content": ""}], tools=tools(), stream=True
    )
    with mock.patch.dict(FunctionCallParser.ToolCallParserEnum, {"minimax-m2": PARSERS[name]}):
        return asyncio.run(_steps(handler, request, reply, length, budget))


async def _steps(
    handler: Any, request: ChatCompletionRequest, reply: Reply, length: int, budget: float
) -> list[float]:
    found: list[float] = []
    parsers: dict[int, Any] = {}
    has_calls: dict[int, bool] = {}
    content = {"meta_info": {"id": "reply"}}
    spent = 0.0
    for piece in reply.pieces(length):
        began = time.perf_counter()
        async for _ in handler._process_tool_call_stream(
            0, piece, parsers, content, request, has_calls, created=0
        ):
            pass
        found.append(time.perf_counter() - began)
        spent += found[-1]
        if spent > budget:
            break
    return found


def summary(name: str, characters: int, length: int, found: list[float]) -> dict[str, Any]:
    """A row: the median step, the one that 99.9 % do not exceed, and the longest, in seconds."""
    ordered = sorted(found)
    return {
        "parser": name,
        "characters": characters,
        "chunk": length,
        "steps": len(ordered),
        "median": rounded(ordered[len(ordered) // 2]),
        "nearly_all": rounded(ordered[int(len(ordered) * 0.999)]),
        "longest": rounded(ordered[-1]),
        "together": rounded(sum(ordered)),
    }
