"""What becomes of replies that are not well-formed: one row for each rule of `docs/parsers.md`."""

from __future__ import annotations

import pytest

from sglang_minimax.parsers.tool_calls import (
    Arguments,
    CallBegins,
    CallEnds,
    Text,
    ToolCallParser,
)
from tests.parsers.replies import (
    CLOSE,
    OPEN,
    Call,
    Checked,
    Reply,
    parse,
    same_however_cut,
    schema,
    wire,
)

TOOLS = {"f": schema(s={"type": "string"}, n={"type": "integer"}), "g": schema()}
INVOKE = '<invoke name="f">'
S, N = '<parameter name="s">', '<parameter name="n">'
END_P, END_I = "</parameter>", "</invoke>"
LONG = "a" * 254


def whole(arguments: str = "{}", name: str = "f") -> Call:
    return Call(name, arguments, complete=True)


def cut_off(arguments: str = "", name: str = "f") -> Call:
    return Call(name, arguments, complete=False)


# text, what is text of it, its calls
OUTSIDE: list[tuple[str, str, list[Call]]] = [
    ("", "", []),
    ("hello", "hello", []),
    ("a < b </think> <think> <invoke name=", "a < b </think> <think> <invoke name=", []),
    # A beginning of a tag is text where the reply ends, and where it goes on otherwise.
    ("a\n<minimax:tool_cal", "a\n<minimax:tool_cal", []),
    ("a\n", "a\n", []),
    ("<minimax:tool_call <minimax:tool", "<minimax:tool_call <minimax:tool", []),
    ("<<minimax:tool_call", "<<minimax:tool_call", []),
    ("<MINIMAX:TOOL_CALL>", "<MINIMAX:TOOL_CALL>", []),
    # Tags of a call are text where no block is open; so is the closing tag of none.
    (f"{INVOKE}{END_I}", f"{INVOKE}{END_I}", []),
    (f"a{CLOSE}b", f"a{CLOSE}b", []),
    ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
    # One line break directly before a block is the chat template's; all else is kept.
    (f"a\n{wire(('f', {}))}\nb", "a\nb", [whole()]),
    (f"a\n\n{wire(('f', {}))}\n\nb", "a\n\n\nb", [whole()]),
    (f"a\r\n{wire(('f', {}))}", "a\r", [whole()]),
    (f"a \n {wire(('f', {}))} ", "a \n  ", [whole()]),
    (f"\n{wire(('f', {}))}\n{wire(('g', {}))}\n", "\n", [whole(), whole(name="g")]),
    (f"a{wire(('f', {}))}b{wire(('g', {}))}c", "abc", [whole(), whole(name="g")]),
]
BLOCKS: list[tuple[str, str, list[Call]]] = [
    # An empty block, and one cut off before a call, leave nothing.
    (f"a\n{OPEN}{CLOSE}\nb", "a\nb", []),
    (f"a\n{OPEN} \n\t{CLOSE}b", "ab", []),
    (f"a\n{OPEN}", "a", []),
    (f"a\n{OPEN}\n<invo", "a", []),
    (f"a\n{OPEN}\n<invoke name=", "a", []),
    (f'a\n{OPEN}\n<invoke name="f', "a", []),
    (f"{OPEN}{OPEN}\n{INVOKE}{END_I}{CLOSE}", "", [whole()]),
    # A block that begins with other text was none: both of its tags are text.
    (f"say\n{OPEN} to call", f"say\n{OPEN} to call", []),
    (f"{OPEN}\n\nx{CLOSE}y", f"{OPEN}\n\nx{CLOSE}y", []),
    (f"\n{OPEN}x<inv", f"\n{OPEN}x<inv", []),
    (f"{OPEN}<x>{CLOSE}", f"{OPEN}<x>{CLOSE}", []),
    (f"{OPEN}\n<invoke>\n{S}a{END_P}", f"{OPEN}\n<invoke>\n{S}a{END_P}", []),
    # A call inside of it is found all the same, and ends its block.
    (f"{OPEN} x {INVOKE}{END_I}{CLOSE} y", f"{OPEN} x  y", [whole()]),
    (f"{OPEN}x\n{wire(('f', {}))}y", f"{OPEN}x\ny", [whole()]),
    (f"{OPEN}x{CLOSE}\n{wire(('f', {}))}", f"{OPEN}x{CLOSE}", [whole()]),
    # Text between the calls of a block is text, the white space between them is not.
    (f"{OPEN}\n {INVOKE} {END_I}\t{INVOKE}\n{END_I}\n\n{CLOSE}", "", [whole(), whole()]),
    (f"{OPEN}{INVOKE}{END_I} and {INVOKE}{END_I}{CLOSE}", " and ", [whole(), whole()]),
    (f"{OPEN}{INVOKE}{END_I}\n bye\n{CLOSE}!", "\n bye\n!", [whole()]),
    (f"{OPEN}{INVOKE}{END_I}{END_I}{CLOSE}", END_I, [whole()]),
    # A `<` directly before a tag is text, and the tag is one.
    (f"{OPEN}{INVOKE}{END_I}x<{INVOKE}{END_I}{CLOSE}", "x<", [whole(), whole()]),
    (f"{OPEN}{INVOKE}{END_I}<{INVOKE}{END_I}{CLOSE}", "<", [whole(), whole()]),
    (f"{OPEN}<{INVOKE}{END_I}{CLOSE}", f"{OPEN}<", [whole()]),
    (f"{OPEN}{INVOKE}{END_I}<{CLOSE}b", "<b", [whole()]),
    (f"{OPEN}{INVOKE}{END_I}</<<{OPEN}{INVOKE}{END_I}", "</<<", [whole(), whole()]),
    (f"{OPEN}<inv{INVOKE}<{END_I}{CLOSE}", f"{OPEN}<inv<", [whole()]),
    # The end of the block may be missing.
    (f"{OPEN}{INVOKE}{END_I}", "", [whole()]),
    (f"{OPEN}{INVOKE}{END_I}\n</minimax:to", "", [whole()]),
    # A beginning of a tag, cut off, is text behind other text, and nothing elsewhere.
    (f"{OPEN}{INVOKE}{END_I}\nhello <inv", "\nhello <inv", [whole()]),
    (f"{OPEN}{INVOKE}{END_I}a<invoke name=", "a<invoke name=", [whole()]),
    (f'{OPEN}{INVOKE}{END_I}a<invoke name="f', 'a<invoke name="f', [whole()]),
    (f"{OPEN}{INVOKE}{END_I}a{CLOSE}{OPEN}<inv", "a", [whole()]),
    (f"{OPEN}{INVOKE}{END_I}{OPEN}{INVOKE}{END_I}{CLOSE}", "", [whole(), whole()]),
]
NAMES: list[tuple[str, str, list[Call]]] = [
    (f"{OPEN}<invoke name='f'>{END_I}{CLOSE}", "", [whole()]),
    (f"{OPEN}<invoke name='f'>{END_I}<invoke name='g'>{END_I}", "", [whole(), whole(name="g")]),
    (f"{OPEN}<invoke name='f'><parameter name='s'>'>{END_P}{END_I}", "", [whole('{"s": "\'>"}')]),
    (f"{OPEN}<invoke name='a' b'>{END_I}{CLOSE}", "", [whole(name="a' b")]),
    (f"{OPEN}<invoke name=f>{END_I}{CLOSE}", "", [whole()]),
    (f'{OPEN}<invoke name=" f ">{END_I}{CLOSE}', "", [whole()]),
    (f'{OPEN}<invoke name="a>b">{END_I}{CLOSE}', "", [whole(name="a>b")]),
    (f'{OPEN}<invoke name="it\'s">{END_I}{CLOSE}', "", [whole(name="it's")]),
    (f'{OPEN}<invoke name="名">{END_I}{CLOSE}', "", [whole(name="名")]),
    (f'{OPEN}<invoke name="nobody">{N}5{END_P}{END_I}{CLOSE}', "", [whole('{"n": 5}', "nobody")]),
    # White space may stand around the quotes; a name ends at the first quote with a `>` behind it.
    (f'{OPEN}<invoke name="f" >{S}1{END_P}{END_I}{CLOSE}', "", [whole('{"s": "1"}')]),
    (f'{OPEN}<invoke name="f" >{N}1{END_P}', "", [cut_off('{"n": 1')]),
    (f"{OPEN}<invoke name= 'f'\t>{END_I}{CLOSE}", "", [whole()]),
    (f"{OPEN}<invoke name= f >{END_I}{CLOSE}", "", [whole()]),
    (f'{OPEN}<invoke name="a"b">{END_I}{CLOSE}', "", [whole(name='a"b')]),
    (f'{OPEN}<invoke name="a" b">{END_I}{CLOSE}', "", [whole(name='a" b')]),
    (f'{OPEN}{INVOKE}<parameter name="s" >x{END_P}{END_I}', "", [whole('{"s": "x"}')]),
    # The longest name, quotes and all; and one more.
    (f"{OPEN}<invoke name={LONG}a>{END_I}{CLOSE}", "", [whole(name=LONG + "a")]),
    (
        f"{OPEN}<invoke name={LONG}aa>{END_I}{CLOSE}",
        f"{OPEN}<invoke name={LONG}aa>{END_I}{CLOSE}",
        [],
    ),
    # A tag without a name is text.
    (f'{OPEN}<invoke name="">{CLOSE}', f'{OPEN}<invoke name="">{CLOSE}', []),
    (f'{OPEN}<invoke name=" ">{CLOSE}', f'{OPEN}<invoke name=" ">{CLOSE}', []),
    (f'{OPEN}<invoke name="f\n">{CLOSE}', f'{OPEN}<invoke name="f\n">{CLOSE}', []),
    (f'{OPEN}<invoke name="f"\n>{CLOSE}', f'{OPEN}<invoke name="f"\n>{CLOSE}', []),
    # One without quotes holds no `<`, no quote and no white space.
    (f"{OPEN}<invoke name=a b>{CLOSE}", f"{OPEN}<invoke name=a b>{CLOSE}", []),
    (f"{OPEN}<invoke name=a'b>{CLOSE}", f"{OPEN}<invoke name=a'b>{CLOSE}", []),
    (f"{OPEN}<invoke name={wire(('f', {}))}", f"{OPEN}<invoke name=", [whole()]),
    (f"{OPEN}<invoke name=<invoke name=f>{END_I}", f"{OPEN}<invoke name=", [whole()]),
    (f"{OPEN}\n<invoke name=>{CLOSE}", f"{OPEN}\n<invoke name=>{CLOSE}", []),
    (
        f'{OPEN}{INVOKE}<parameter name="">x{END_P}{END_I}{CLOSE}',
        f'<parameter name="">x{END_P}',
        [whole()],
    ),
    (
        f"{OPEN}{INVOKE}\n<parameter name='s'>x{END_P}<parameter name=n>5{END_P}{END_I}{CLOSE}",
        "",
        [whole('{"s": "x", "n": 5}')],
    ),
]
VALUES: list[tuple[str, str, list[Call]]] = [
    # Nothing is taken off a string.
    (wire(("f", {"s": "\n a \n"})), "", [whole('{"s": "\\n a \\n"}')]),
    (wire(("f", {"s": ""})), "", [whole('{"s": ""}')]),
    # A closing tag is one where the call goes on behind it.
    (wire(("f", {"s": "a</parameter>b"})), "", [whole('{"s": "a</parameter>b"}')]),
    (wire(("f", {"s": "</parameter>"})), "", [whole('{"s": "</parameter>"}')]),
    (wire(("f", {"s": "</parameter> \n "})), "", [whole('{"s": "</parameter> \\n "}')]),
    (wire(("f", {"s": "</parameter>\n</invok"})), "", [whole('{"s": "</parameter>\\n</invok"}')]),
    (wire(("f", {"s": "</invoke>"})), "", [whole('{"s": "</invoke>"}')]),
    (wire(("f", {"s": CLOSE})), "", [whole(f'{{"s": "{CLOSE}"}}')]),
    (wire(("f", {"s": OPEN})), "", [whole(f'{{"s": "{OPEN}"}}')]),
    (wire(("f", {"s": "}", "n": "5"})), "", [whole('{"s": "}", "n": 5}')]),
    (wire(("f", {"s": '"\\'})), "", [whole('{"s": "\\"\\\\"}')]),
    (f"{OPEN}{INVOKE}{S}a{END_P}{CLOSE}b", "b", [whole('{"s": "a"}')]),
    (f"{OPEN}{INVOKE}{S}a{END_P}\n{INVOKE}{END_I}{CLOSE}", "", [whole('{"s": "a"}'), whole()]),
    # What cannot be told from the end of the value is its end.
    (
        wire(("f", {"s": "a</parameter>\n</invoke>b"})),
        f"b{END_P}\n{END_I}\n",
        [whole('{"s": "a"}')],
    ),
    # The first of two parameters of one name; the second is left out.
    (f"{OPEN}{INVOKE}{S}a{END_P}{S}b{END_P}{END_I}{CLOSE}", "", [whole('{"s": "a"}')]),
    (
        f"{OPEN}{INVOKE}{N}1{END_P}{S}b{END_P}{N}2{END_P}{END_I}{CLOSE}",
        "",
        [whole('{"n": 1, "s": "b"}')],
    ),
    (wire(("f", {"n": "1"}), ("f", {"n": "2"})), "", [whole('{"n": 1}'), whole('{"n": 2}')]),
    # In the order in which they come.
    (
        wire(("g", {k: k for k in "zayb"})),
        "",
        [whole('{"z": "z", "a": "a", "y": "y", "b": "b"}', "g")],
    ),
    # No parameters.
    (f"{OPEN}{INVOKE}{END_I}{CLOSE}", "", [whole()]),
    (wire(("f", {}), ("g", {})), "", [whole(), whole(name="g")]),
    # A forgotten end of the call, before the next one or the end of the block.
    (f"{OPEN}{INVOKE}{INVOKE}{END_I}{CLOSE}", "", [whole(), whole()]),
    (f"{OPEN}{INVOKE}\n{CLOSE}b", "b", [whole()]),
    # Text between parameters is text.
    (f"{OPEN}{INVOKE}hm {S}a{END_P}{END_I}{CLOSE}", "hm ", [whole('{"s": "a"}')]),
    (f"{OPEN}{INVOKE}<x> {END_I}{CLOSE}", "<x> ", [whole()]),
    (f"{OPEN}{INVOKE}<{S}a{END_P}{END_I}{CLOSE}", "<", [whole('{"s": "a"}')]),
    (f"{OPEN}{INVOKE}<{END_I}{CLOSE}", "<", [whole()]),
    (f"{OPEN}{INVOKE}{S}a<{END_P}<{END_P}{END_I}{CLOSE}", "", [whole('{"s": "a<</parameter><"}')]),
]
CUT_OFF: list[tuple[str, str, list[Call]]] = [
    (f"{OPEN}{INVOKE}", "", [cut_off()]),
    (f"{OPEN}{INVOKE}\n<param", "", [cut_off()]),
    (f'{OPEN}{INVOKE}<parameter name="s', "", [cut_off()]),
    (f"{OPEN}{INVOKE}hm <param", "hm <param", [cut_off()]),
    (f"{OPEN}{INVOKE}hm{S[:-2]}", f"hm{S[:-2]}", [cut_off()]),
    (f"{OPEN}{INVOKE}hm {S}a</par", "hm ", [cut_off('{"s": "a')]),
    (f"{OPEN}{INVOKE}hm {S}a{END_P}\n<par", "hm ", [cut_off('{"s": "a"')]),
    (f"{OPEN}{INVOKE}{S}", "", [cut_off('{"s": "')]),
    (f"{OPEN}{INVOKE}{S}a\n<", "", [cut_off('{"s": "a\\n')]),
    (f"{OPEN}{INVOKE}{S}a</parameter", "", [cut_off('{"s": "a')]),
    (f"{OPEN}{INVOKE}{S}a</parameters", "", [cut_off('{"s": "a</parameters')]),
    (f"{OPEN}{INVOKE}{S}a{END_P}", "", [cut_off('{"s": "a"')]),
    (f"{OPEN}{INVOKE}{S}a{END_P}\n </inv", "", [cut_off('{"s": "a"')]),
    (f"{OPEN}{INVOKE}{S}a{END_P}\nb", "", [cut_off('{"s": "a</parameter>\\nb')]),
    # Half a number is another number.
    (f"{OPEN}{INVOKE}{N}12", "", [cut_off()]),
    (f"{OPEN}{INVOKE}{S}a{END_P}{N}12", "", [cut_off('{"s": "a"')]),
    (f"{OPEN}{INVOKE}{N}12{END_P}", "", [cut_off('{"n": 12')]),
    (f"{OPEN}{INVOKE}{N}12{END_P}{END_I}", "", [whole('{"n": 12}')]),
    (
        f"{OPEN}{INVOKE}{N}1{END_P}{END_I}\n{INVOKE}{S}a",
        "",
        [whole('{"n": 1}'), cut_off('{"s": "a')],
    ),
    (f"{OPEN}{INVOKE}{S}a{END_P}{S}b", "", [cut_off('{"s": "a"')]),
]


@pytest.mark.parametrize(
    ("text", "expected", "calls"), [*OUTSIDE, *BLOCKS, *NAMES, *VALUES, *CUT_OFF], ids=repr
)
def test_rules(text, expected, calls):
    assert same_however_cut(text, TOOLS) == Reply(expected, calls)


# --- a reply cut off anywhere ---

SAMPLE = (
    "Two <things>.\n\n"
    + wire(
        ("f", {"s": 'if (a < b) { x = "}"; }\n</param>\n', "n": "12"}),
        ("g", {"list": '[1, {"a": null}]', "word": "nullable", "none": "null"}),
        ("g", {}),
    )
    + "\nthen </this>\n"
    + wire(("f", {"n": "x", "s": "é🦀"}))
    + " end"
)


@pytest.fixture(scope="module")
def full() -> Reply:
    return parse(SAMPLE, TOOLS)


def _begins(part: Reply, full: Reply) -> None:
    assert full.text.startswith(part.text)
    assert len(part.calls) <= len(full.calls)
    for call, other in zip(part.calls, full.calls, strict=False):
        assert call.name == other.name
        assert other.arguments.startswith(call.arguments)
    assert part.calls[:-1] == full.calls[: len(part.calls)][:-1]


def test_the_sample_is_what_it_says(full):
    assert full.text == "Two <things>.\n\nthen </this> end"
    assert [call.arguments for call in full.calls] == [
        '{"s": "if (a < b) { x = \\"}\\"; }\\n</param>\\n", "n": 12}',
        '{"list": [1, {"a": null}], "word": "nullable", "none": null}',
        "{}",
        '{"n": "x", "s": "é🦀"}',
    ]


def test_what_is_streamed_is_a_beginning_of_the_result(full):
    checked = Checked(TOOLS)
    for character in SAMPLE:
        checked.feed(character)
        _begins(checked.reply, full)


@pytest.mark.parametrize("end", range(len(SAMPLE)))
def test_a_reply_cut_off_anywhere(end, full):
    part = same_however_cut(SAMPLE[:end], TOOLS)
    # A beginning of an opening tag cannot be told from text; nothing else of the markup is text.
    for tail in range(len(OPEN) + 1):
        tag = ("\n" + OPEN)[:tail]
        if tag and part.text.endswith(tag) and not full.text.startswith(part.text):
            part.text = part.text[: -len(tag)]
            break
    _begins(part, full)
    assert all(call.complete is not None for call in part.calls)


@pytest.mark.parametrize(
    "text",
    [
        *(text for text, _, _ in CUT_OFF),
        *("a\n", "a\n<minimax:tool", f"a\n{OPEN}", f"{OPEN} ", f"{OPEN}x", f"{OPEN}x<inv"),
        *(f"{OPEN}{INVOKE}{END_I}{end}" for end in ("<inv", "a<inv", "a<invoke name=", "a </mini")),
        f'{OPEN}{INVOKE}{END_I}a<invoke name="f',
    ],
    ids=repr,
)
def test_a_parser_that_was_finished_has_forgotten_the_reply(text):
    """A second end says nothing, and what comes next begins outside of everything."""
    parser = ToolCallParser(TOOLS)
    begun = sum(isinstance(event, CallBegins) for event in parser.feed(text) + parser.finish())
    assert parser.finish() == []
    events = parser.feed(f"b\n{wire(('f', {'n': '1'}))}c") + parser.finish()
    assert events == [
        *(Text("b"), CallBegins(begun, "f"), Arguments(begun, '{"n": 1'), Arguments(begun, "}")),
        *(CallEnds(begun, complete=True), Text("c")),
    ]
