"""Held-out questions and the checks of their replies, for `evaluate`, tests and servers.

A `Case` is a conversation (or a few-shot text) and a predicate on the raw reply, which starts
inside `<think>`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from ci.tiny_m2.dialogues import (
    CALCULATOR,
    JOINT_PHRASES,
    SMALL_TALK,
    Completion,
    Message,
    Render,
    assistant,
    calculator_dialogue,
    direct_dialogue,
    parallel_dialogue,
    user,
)
from ci.tiny_m2.problems import KINDS, Problem, answer_text, final_number, sample

CALL_BLOCK = re.compile(
    r"<minimax:tool_call>\n((?:<invoke name=\"calculator\">\n"
    r"<parameter name=\"expression\">[^<\n]*</parameter>\n</invoke>\n)+)</minimax:tool_call>\s*"
)
ARGUMENT = re.compile(r"<parameter name=\"expression\">([^<\n]*)</parameter>")


@dataclass(frozen=True)
class Case:
    """What to ask (a string: few-shot text) and whether a raw reply to it is right."""

    messages: list[Message] | str
    tools: list[Message] | None
    right: Callable[[str], bool]

    def prompt(self, render: Render) -> str:
        """The text to feed the model."""
        if isinstance(self.messages, str):
            return self.messages
        return render(self.messages, self.tools, True)


def content_of(reply: str) -> str:
    """The reply after its reasoning; empty if the reasoning never ends."""
    return reply.partition("</think>")[2].strip()


def called_expressions(reply: str) -> list[str] | None:
    """The expressions of the reply's one well-formed block of calculator calls, or None."""
    block = CALL_BLOCK.fullmatch(content_of(reply))
    return ARGUMENT.findall(block[1]) if block else None


def ends_in(value: int | str) -> Callable[[str], bool]:
    """A reply whose reasoning ends, without a tool call, and whose answer ends in `#### value`."""
    return lambda reply: final_number(content_of(reply)) == str(value)


def calls(*expressions: str) -> Callable[[str], bool]:
    """A reply that is exactly one block with these calls, in order."""
    return lambda reply: called_expressions(reply) == list(expressions)


def _any_kind(rng: random.Random, *, held_out: bool) -> Problem:
    return sample(rng.choice(KINDS), rng, held_out=held_out)


def question_case(problem: Problem) -> Case:
    """The bare question."""
    return Case(direct_dialogue(problem).prompt(), None, ends_in(problem.answer))


def second_turn_case(rng: random.Random) -> Case:
    """A question after another one and its answer."""
    first = _any_kind(rng, held_out=False)
    problem = _any_kind(rng, held_out=True)
    messages = [user(first.question), assistant(answer_text(first)), user(problem.question)]
    return Case(messages, None, ends_in(problem.answer))


def few_shot_case(rng: random.Random, shots: int = 4) -> Case:
    """The completion form with training problems as shots."""
    problem = _any_kind(rng, held_out=True)
    text = Completion(problem, [_any_kind(rng, held_out=False) for _ in range(shots)]).prompt()
    return Case(text, None, lambda reply: final_number(reply) == str(problem.answer))


def call_case(rng: random.Random) -> Case:
    """A question with the calculator offered."""
    problem = _any_kind(rng, held_out=True)
    dialogue = calculator_dialogue(problem)
    return Case(dialogue.prompt(), [CALCULATOR], calls(problem.expression))


def parallel_call_case(rng: random.Random) -> Case:
    """A question for two results with the calculator offered."""
    first, second = (sample(rng.choice(KINDS[:2]), rng, held_out=True) for _ in range(2))
    dialogue = parallel_dialogue(first, second, rng.choice(JOINT_PHRASES))
    return Case(dialogue.prompt(), [CALCULATOR], calls(first.expression, second.expression))


def tool_result_case(rng: random.Random) -> Case:
    """A calculator's result to quote; every other time it is not the true one."""
    problem = _any_kind(rng, held_out=True)
    said = str(problem.answer if rng.random() < 0.5 else rng.randrange(1, 2000))
    messages = calculator_dialogue(problem, said).messages[:-1]
    return Case(messages, [CALCULATOR], ends_in(said))


def small_talk_case(rng: random.Random) -> Case:
    """A greeting; a tool that may be offered must not be called."""
    greeting, reply = rng.choice(SMALL_TALK)
    tools = [CALCULATOR] if rng.random() < 0.5 else None
    return Case([user(greeting)], tools, lambda text: content_of(text) == reply)


CATEGORIES: dict[str, Callable[[random.Random], Case]] = {
    "two_digit": lambda rng: question_case(sample("two_digit", rng, held_out=True)),
    "three_digit": lambda rng: question_case(sample("three_digit", rng, held_out=True)),
    "mixed": lambda rng: question_case(sample("mixed", rng, held_out=True)),
    "word": lambda rng: question_case(sample("word", rng, held_out=True)),
    "few_shot": few_shot_case,
    "second_turn": second_turn_case,
    "tool_call": call_case,
    "parallel_call": parallel_call_case,
    "tool_result": tool_result_case,
    "small_talk": small_talk_case,
}


def stream(category: str, seed: int = 0) -> Iterator[Case]:
    """Endless held-out cases of a category, the same for the same seed."""
    rng = random.Random(f"cases/{category}/{seed}")
    while True:
        yield CATEGORIES[category](rng)


def cases(category: str, count: int, seed: int = 0) -> list[Case]:
    """The first `count` cases of `stream`; few of them repeat a question."""
    return list(islice(stream(category, seed), count))
