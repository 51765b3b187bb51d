"""The shipped tokenizer and chat template, as a client and a server meet them."""

from __future__ import annotations

import json
import random

import pytest

from ci.tiny_m2.cases import calls, content_of
from ci.tiny_m2.dialogues import (
    CALCULATOR,
    Stream,
    assistant,
    calculator_dialogue,
    tool_result,
    user,
)
from ci.tiny_m2.evaluate import chat_renderer
from ci.tiny_m2.problems import sample
from ci.tiny_m2.tokenizer import CONTROL_TOKENS, TAG_TOKENS, renderer, template_text

ANY_TEXT = (
    "héllo, 你好 🙂\t tabs\r\n  and   blanks ",
    'f(x) = {"a": [1, 2.5], \'b\': null} <xml attr="v"/>',
    "a ,b . c 's don't",
    "\x00\x7f\u200d\U0001f468\u200d\U0001f469",
    "",
)


@pytest.fixture(scope="module")
def render(tokenizer):
    return chat_renderer(tokenizer)


@pytest.mark.parametrize("text", ANY_TEXT)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_bytes_as_text_round_trip(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(
            chr(rng.choice((rng.randrange(1, 256), rng.randrange(0x3000, 0xA000))))
            for _ in range(20)
        )
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("tag", TAG_TOKENS)
def test_a_tag_is_one_token_that_skip_special_tokens_keeps(tokenizer, tag):
    ids = tokenizer.encode(f"x{tag}y")
    assert len(ids) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"x{tag}y"


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_a_control_token_is_one_special_token(tokenizer, token):
    ids = tokenizer.encode(token)
    assert ids == [CONTROL_TOKENS.index(token)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""


def test_every_digit_is_its_own_token(tokenizer):
    digits = [tokenizer.decode([i]) for i in tokenizer.encode("1234567890 + 42=7")]
    assert [d for d in digits if any(c.isdigit() for c in d)] == list("1234567890427")
    assert not any(len(t) > 1 and any(c.isdigit() for c in t) for t in tokenizer.get_vocab()), (
        "a merge joins digits"
    )


def test_nothing_is_added_by_itself(tokenizer):
    ids = tokenizer.encode("Hello")
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)


def test_shipped_template_is_the_source(tokenizer, checkpoint):
    assert tokenizer.chat_template == template_text()
    assert (checkpoint / "chat_template.jinja").read_text(encoding="utf-8") == template_text()


def test_saved_tokenizer_renders_as_in_training(render):
    stream, trained = Stream("render"), renderer()
    for _ in range(50):
        item = next(stream)
        if hasattr(item, "messages"):
            arguments = item.messages, item.tools, False
            assert render(*arguments) == trained(*arguments)


def test_segments_are_the_rendered_dialogue_cut_at_the_replies(render):
    dialogue = calculator_dialogue(sample("two_digit", random.Random(0)))
    segments = list(dialogue.segments(render))
    whole = render(dialogue.messages, dialogue.tools, False)
    assert "".join(text for text, _ in segments) + "\n" == whole
    assert [trained for _, trained in segments] == [False, True, False, True]
    assert all(text.endswith("[e~[") for text, trained in segments if trained)


def test_segments_tokenize_as_a_server_sees_them(tokenizer, render):
    dialogue = calculator_dialogue(sample("three_digit", random.Random(0)))
    segments = [text for text, _ in dialogue.segments(render)]
    pieces = [i for text in segments for i in tokenizer.encode(text)]
    assert pieces == tokenizer.encode("".join(segments))


def test_prompt_with_the_calculator_stays_short(tokenizer, render):
    prompt = render([user("What is 23 + 45?")], [CALCULATOR], True)
    assert len(tokenizer.encode(prompt)) <= 110
    assert len(tokenizer.encode(render([user("What is 23 + 45?")], None, True))) <= 35


def test_plain_prompt(render):
    assert render([user("Hi")], None, True) == (
        "]~!b[]~b]system\nYou are a helpful assistant.[e~[\n]~b]user\nHi[e~[\n]~b]ai\n<think>\n"
    )


def test_system_message_replaces_the_default(render):
    text = render([{"role": "system", "content": "Be brief."}, user("Hi")], None, True)
    assert text.startswith("]~!b[]~b]system\nBe brief.[e~[\n]~b]user\n")
    assert "helpful" not in text


def test_content_may_come_in_parts(render):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 2?"}]
    assert render([{"role": "user", "content": parts}], None, True) == render(
        [user("What is 1 + 2?")], None, True
    )


def test_tools_render_the_same_wrapped_or_bare_and_without_engine_fields(render):
    """Servers pass the function alone and add fields such as `strict`; the model saw neither."""
    function = CALCULATOR["function"]
    wanted = render([user("Hi")], [CALCULATOR], True)
    assert render([user("Hi")], [function], True) == wanted
    assert render([user("Hi")], [function | {"strict": False}], True) == wanted
    line = next(row for row in wanted.splitlines() if row.startswith("<tool>"))
    assert json.loads(line.removeprefix("<tool>").removesuffix("</tool>")) == function


def test_call_renders_in_the_wire_format_that_the_checks_parse(render):
    text = render([user("q"), assistant("", "r", ["1 + 2", "3 - 1"])], [CALCULATOR], False)
    reply = text.rpartition("]~b]ai\n")[2].removesuffix("[e~[\n")
    assert calls("1 + 2", "3 - 1")(reply)
    assert not calls("1 + 2")(reply)
    assert not calls("1 + 2", "3 - 1")(reply.replace("</invoke>", "", 1))


def test_arguments_that_are_not_strings_render_as_json(render):
    call = {"function": {"name": "f", "arguments": {"n": 3, "b": True, "o": {"k": [1]}, "s": "é"}}}
    text = render(
        [user("q"), {"role": "assistant", "content": None, "tool_calls": [call]}], None, False
    )
    for line in ('n">3<', 'b">true<', 'o">{"k": [1]}<', 's">é<'):
        assert f'<parameter name="{line}/parameter>' in text


def test_tool_results_share_one_turn(render):
    messages = [
        user("q"),
        assistant("", None, ["1", "2"]),
        tool_result("1", 0),
        tool_result("2", 1),
    ]
    assert render(messages, None, True).endswith(
        "]~b]tool\n<response>1</response>\n<response>2</response>[e~[\n]~b]ai\n<think>\n"
    )


def test_reasoning_is_kept_after_the_last_user_message_only(render):
    messages = [user("a"), assistant("one", "OLD"), user("b"), assistant("", "NEW", ["1"])]
    text = render(messages, None, False)
    assert "OLD" not in text
    assert "<think>\nNEW\n</think>\n\n<minimax:tool_call>" in text
    inline = [user("a"), assistant("<think>\nNEW\n</think>\n\ntwo")]
    assert render(inline, None, False).endswith("<think>\nNEW\n</think>\n\ntwo[e~[\n")
    assert content_of("x</think>\n\ntwo") == "two"
