"""What a reply costs grows as its length: time, strings that are made, and memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import pytest

from sglang_minimax.parsers.reasoning import ReasoningParser
from sglang_minimax.parsers.tool_calls import ToolCallParser
from tests.parsers.allocations import traced
from tests.parsers.replies import CLOSE, OPEN, every, schema

TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
TOOLS = {"f": schema(**{each: {"type": each} for each in TYPES})}
BEGIN = f'{OPEN}<invoke name="f">'


def value(kind: str, text: str) -> str:
    return f'{BEGIN}<parameter name="{kind}">{text}</parameter></invoke>{CLOSE}'


class Both:
    """The two parsers in a row, as SGLang runs them; what comes out is not kept."""

    def __init__(self) -> None:
        self.reasoning, self.calls = ReasoningParser(), ToolCallParser(TOOLS)

    def feed(self, text: str) -> None:
        parts = self.reasoning.feed(text)
        self.calls.feed(parts.reasoning)
        self.calls.feed(parts.content)

    def finish(self) -> None:
        self.reasoning.finish()
        self.calls.finish()


Make = Callable[[int], str]
SHAPES: dict[str, Make] = {
    "plain text": lambda n: "a" * n,
    "<": lambda n: "<" * n,
    "white space": lambda n: " " * n,
    "line breaks": lambda n: "\n" * n,
    "beginnings of a tag": lambda n: "<minimax:tool_cal" * (n // 17),
    "< in a block": lambda n: OPEN + "<" * n,
    "white space in a block": lambda n: OPEN + " " * n,
    "tags without a name": lambda n: OPEN + "<invoke name=" * (n // 13),
    "opening tags": lambda n: OPEN * (n // len(OPEN)),
    "blocks": lambda n: (OPEN + CLOSE) * (n // 39),
    "calls": lambda n: OPEN + '<invoke name="f"></invoke>' * (n // 26),
    "parameters": lambda n: BEGIN + '<parameter name="a">1</parameter>' * (n // 33),
    "a string": lambda n: value("string", "a" * n),
    "line breaks in a string": lambda n: value("string", "\n" * n),
    "closing tags in a string": lambda n: value("string", "</parameter>" * (n // 12)),
    "tags and space in a string": lambda n: value("string", "</parameter> " * (n // 13)),
    "space behind a tag": lambda n: value("string", "</parameter>" + " " * n),
    "< in a string": lambda n: value("string", "<" * n),
    "a number": lambda n: value("number", "1" * n),
    "an integer": lambda n: value("integer", "1" * n + "." + "0" * n),
    "space of any type": lambda n: value("any", " " * n),
    "space after a word": lambda n: value("any", "true" + " " * n),
    "digits of any type": lambda n: value("any", "1" * n),
    "a list": lambda n: value("array", "[" + "1," * (n // 2) + "1]"),
    "a broken list": lambda n: value("array", '["\n' + '\\"' * (n // 2)),
    "an object": lambda n: value("object", '{"a": "' + "\n" * n + '"}'),
    "brackets": lambda n: value("any", "[" * n),
    "thoughts": lambda n: "a <b\n" * (n // 5) + "</think>\n\nb",
    "space before <think>": lambda n: " " * n + "<think>\na",
}
# What is held back to its end: it may be of another type, or layout.
HELD = (
    *(
        "white space in a block",
        "space behind a tag",
        "a number",
        "an integer",
        "space of any type",
    ),
    *("space after a word", "digits of any type", "a list", "a broken list", "an object"),
    *("brackets", "space before <think>", "white space", "line breaks"),
)

# --- strings that are made, without a clock ---

PIECE = 16
# Of one step: what it looks at is as long as a name, and a list of pieces grows by its eighth.
LITTLE = 8 * 1024
# Where the parsers hand on what they held back: joined once, read once.
MOST_STEPS = 3


@pytest.mark.parametrize("name", SHAPES)
def test_memory_grows_no_faster_than_the_length(name):
    """Nor for a moment: a step that makes a string as long as the text makes time its square.

    Where nothing is held back, memory does not grow at all.
    """
    peaks = []
    for length in (1 << 13, 1 << 15):
        steps, peak = traced(Both().feed, every(SHAPES[name](length), PIECE))
        peaks.append(peak)
        large = [size for size in steps if size > LITTLE]
        assert len(large) <= MOST_STEPS, f"{len(large)} of {len(steps)} steps: {max(large)} bytes"
    short, long = peaks
    assert long <= (5 * short if name in HELD else short) + LITTLE, peaks


@pytest.mark.parametrize("name", SHAPES)
def test_no_buffer_grows_that_is_looked_at_again(name):
    both = Both()
    for piece in every(SHAPES[name](4000), 4):
        both.feed(piece)
        assert len(both.reasoning._rest) <= BUFFER
        assert len(both.calls._rest) <= 2 * BUFFER


# --- time ---

TIMES = 4
# 4 times the text; quadratic work would take 16 times as long. Observed up to 5.
MOST = 8.0
# Below this the clock and the garbage collector are what is measured.
NEGLIGIBLE = 0.05
# What is not looked at again: a name, its quotes, and a tag.
BUFFER = 300


def _seconds(text: str, size: int) -> float:
    cut = every(text, size)
    best = float("inf")
    gc.disable()  # its work grows with all that pytest has loaded
    for _ in range(2):
        both = Both()
        before = time.process_time()
        for piece in cut:
            both.feed(piece)
        both.finish()
        best = min(best, time.process_time() - before)
    gc.enable()
    return best


def _grows_as_the_length(make: Make, length: int, size: int) -> None:
    long = _seconds(make(length * TIMES), size)
    if long > NEGLIGIBLE:
        assert long <= MOST * _seconds(make(length), size) + NEGLIGIBLE


@pytest.mark.parametrize("name", SHAPES)
def test_time_grows_as_the_length(name):
    _grows_as_the_length(SHAPES[name], 10_000, 4)
    _grows_as_the_length(SHAPES[name], 20_000, 1 << 30)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_time_of_half_a_megabyte_grows_as_the_length(name):
    _grows_as_the_length(SHAPES[name], 1 << 17, 4)
    _grows_as_the_length(SHAPES[name], 1 << 17, 1 << 30)
