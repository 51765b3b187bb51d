"""SGLang's view of the tool-call parser: the same calls streamed and at once, none repaired."""

from __future__ import annotations

import gc
import logging
import time

import pytest
from sglang.srt.entrypoints.openai.protocol import Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser

from sglang_minimax.parsers.tool_detector import MinimaxM2Detector

TOOLS = [
    Tool.model_validate(
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}},
        }
    )
]


def call(value: str, name: str = "f") -> str:
    return f'<invoke name="{name}">\n<parameter name="a">{value}</parameter>\n</invoke>\n'


TEXT = f"x\n<minimax:tool_call>\n{call('}')}{call('y')}</minimax:tool_call>z"


def parser() -> FunctionCallParser:
    found = FunctionCallParser(TOOLS, "minimax-m2")
    assert type(found.detector) is MinimaxM2Detector
    return found


@pytest.mark.parametrize("length", [1, 5, 1000])
def test_streamed_and_at_once(length: int) -> None:
    whole = parser().parse_non_stream(TEXT)
    assert [(each.tool_index, each.name, each.parameters) for each in whole[1]] == [
        (0, "f", '{"a": "}"}'),
        (1, "f", '{"a": "y"}'),
    ]
    assert whole[0] == "xz"
    streaming = parser()
    pieces = [TEXT[start : start + length] for start in range(0, len(TEXT), length)]
    results = [streaming.parse_stream_chunk(each) for each in pieces]
    results.append(streaming.parse_stream_end())
    assert "".join(text for text, _ in results) == "xz"
    items = [item for _, calls in results for item in calls]
    for index in (0, 1):
        mine = [item for item in items if item.tool_index == index]
        assert [bool(item.name) for item in mine] == [True] + [False] * (len(mine) - 1)
        assert mine[0].parameters == "", "the name comes first"
        assert "".join(item.parameters for item in mine) == whole[1][index].parameters


def test_nothing_for_sglang_to_repair() -> None:
    """Its chat handler adds to the last call what these lists say is missing."""
    found = parser()
    found.parse_stream_chunk(TEXT[:-40])
    assert found.detector.prev_tool_call_arr == found.detector.streamed_args_for_tool == []


def test_a_call_is_incomplete_until_it_ends() -> None:
    """Also where nobody asks for the end: an aborted stream."""
    found = parser()
    found.parse_stream_chunk(TEXT[: TEXT.index("}")])
    assert found.detector.incomplete_tool_call_indices == {0}
    found.parse_stream_chunk(TEXT[TEXT.index("}") : TEXT.index("y")])
    assert found.detector.incomplete_tool_call_indices == {1}
    found.parse_stream_chunk(TEXT[TEXT.index("y") :])
    assert found.detector.incomplete_tool_call_indices == set()


def test_a_call_that_is_cut_off_stays_incomplete() -> None:
    """Behind the end of the reply too; SGLang reads the finish reason off it."""
    found = parser()
    found.parse_stream_chunk(TEXT[: TEXT.index("y")])
    found.parse_stream_end()
    assert found.detector.incomplete_tool_call_indices == {1}
    whole = parser()
    whole.parse_non_stream(TEXT[: TEXT.index("y")])
    assert whole.detector.incomplete_tool_call_indices == {1}


@pytest.mark.parametrize("streamed_before", [True, False])
def test_a_whole_reply_begins_anew(streamed_before: bool) -> None:
    """Whatever the same detector was given before."""
    found = MinimaxM2Detector()
    cut = TEXT[: TEXT.index("y")]
    if streamed_before:
        found.parse_streaming_increment(cut, TOOLS)
    else:
        found.detect_and_parse(cut, TOOLS)
    assert found.incomplete_tool_call_indices == {1}
    result = found.detect_and_parse("plain", TOOLS)
    assert (result.normal_text, result.calls) == ("plain", [])
    assert found.incomplete_tool_call_indices == set()
    result = found.detect_and_parse(TEXT, TOOLS)
    assert (result.normal_text, [each.tool_index for each in result.calls]) == ("xz", [0, 1])


def test_only_an_opening_tag_may_be_a_call() -> None:
    """SGLang warns of each other reply that it is told to parse."""
    assert parser().has_tool_call(TEXT)
    for text in ("", "a < b", "<minimax:tool>", call("1"), "</minimax:tool_call>"):
        assert not parser().has_tool_call(text)


def test_an_unknown_function_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    text = f"<minimax:tool_call>{call('1', 'g')}</minimax:tool_call>"
    with caplog.at_level(logging.WARNING):
        _, (found,) = parser().parse_non_stream(text)
    assert (found.name, found.parameters) == ("g", '{"a": 1}')
    assert [record.args for record in caplog.records] == [("g",)]


@pytest.mark.slow
def test_many_pieces_at_once_take_linear_time() -> None:
    """Arguments come in a piece for each closing tag that was none.

    Without the garbage collector, whose passes grow with everything that pytest has loaded.
    """
    gc.collect()
    gc.disable()
    try:
        assert seconds(160_000) < 8 * seconds(40_000)
    finally:
        gc.enable()


def seconds(count: int) -> float:
    """CPU time of a reply with so many pieces, the best of three."""
    text = f"<minimax:tool_call>{call('</parameter>x' * count)}</minimax:tool_call>"
    found = []
    for _ in range(3):
        began = time.process_time()
        parser().parse_non_stream(text)
        found.append(time.process_time() - began)
    return min(found)
