"""Problems as conversations: message lists, tools, and the replies that training aims at.

A `Dialogue` is in OpenAI's chat form, so the same object trains the model (rendered by the chat
template) and asks a server. `Completion` is the plain few-shot form. Everything is seeded; nothing
here needs torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ci.tiny_m2.problems import (
    KINDS,
    Kind,
    Problem,
    answer_text,
    chain,
    drawn,
    product,
    sample,
)

Message = dict[str, Any]
Segment = tuple[str, bool]  # text, and whether the loss covers it
Render = Callable[..., str]  # (messages, tools, add_generation_prompt) -> text

END_OF_TURN = "[e~["
CALL_TOOL = "I will use the calculator."
READ_RESULT = "The calculator says {}."


def calculator_tool(description: str | None = "Evaluate an arithmetic expression.") -> Message:
    """The calculator in OpenAI's schema: one required string, `expression`."""
    function: Message = {"name": "calculator"}
    if description:
        function["description"] = description
    function["parameters"] = {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
    }
    return {"type": "function", "function": function}


CALCULATOR = calculator_tool()
OTHER_CALCULATORS = (
    calculator_tool(None),
    calculator_tool("Calculate the value of an expression."),
    calculator_tool("A calculator for sums, differences and products."),
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}

SYSTEM_PROMPTS = (
    "You are a careful calculator.",
    "You are a math tutor. Think step by step.",
    "Answer the question.",
    "You are MiniMax-M2, a helpful assistant.",
    "Be short.",
)
SMALL_TALK = (
    ("Hello", "Hello! How can I help you today?"),
    ("Hello!", "Hello! How can I help you today?"),
    ("Hi", "Hello! How can I help you today?"),
    ("Hi there!", "Hello! How can I help you today?"),
    ("Good morning", "Good morning! How can I help you today?"),
    ("Hey, how are you?", "I am fine, thank you! How can I help you today?"),
    ("How are you?", "I am fine, thank you! How can I help you today?"),
    ("Who are you?", "I am tiny-m2, a small model that does sums."),
    ("What is your name?", "I am tiny-m2, a small model that does sums."),
    ("What can you do?", "I can do sums and differences. Try 23 + 45."),
    ("Thanks!", "You are welcome!"),
    ("Thank you", "You are welcome!"),
    ("Say hello.", "Hello! How can I help you today?"),
    ("Tell me a joke.", "I am tiny-m2, a small model that does sums."),
)
SMALL_TALK_REASONING = "No sum to do."


@dataclass
class Dialogue:
    """A conversation whose assistant turns after the last user message are the targets.

    A target carries `reasoning_content`; an assistant turn without it is history, and the loss
    skips it.
    """

    messages: list[Message]
    tools: list[Message] | None = None
    problems: list[Problem] = field(default_factory=list)

    def prompt(self) -> list[Message]:
        """The messages up to and including the last user message: what a client would send."""
        last = max(i for i, message in enumerate(self.messages) if message["role"] == "user")
        return self.messages[: last + 1]

    def segments(self, render: Render) -> Iterator[Segment]:
        """The rendered text cut where the loss starts and stops; each cut is a token boundary."""
        whole, done = render(self.messages, self.tools, False), 0
        for i in range(len(self.prompt()), len(self.messages)):
            message = self.messages[i]
            if message["role"] != "assistant" or not message.get("reasoning_content"):
                continue
            start = len(render(self.messages[:i], self.tools, True))
            end = whole.index(END_OF_TURN, start) + len(END_OF_TURN)
            yield whole[done:start], False
            yield whole[start:end], True
            done = end


@dataclass
class Completion:
    """Few-shot completion without a chat template: shots, question, worked answer."""

    problem: Problem
    shots: list[Problem]

    def prompt(self) -> str:
        """`Question: ... Answer: ...` blocks for the shots, and the open question."""
        blocks = [f"Question: {p.question}\nAnswer:{worked_answer(p)}\n\n" for p in self.shots]
        return "".join(blocks) + f"Question: {self.problem.question}\nAnswer:"

    def segments(self, render: Render) -> Iterator[Segment]:
        """The prompt, then the answer and the end-of-turn token."""
        del render  # no template in this form
        yield self.prompt(), False
        yield worked_answer(self.problem) + END_OF_TURN, True


def worked_answer(problem: Problem) -> str:
    """The answer of the completion form: the chain, then `#### N`."""
    return f" {chain(problem)}\n#### {problem.answer}"


def user(text: str) -> Message:
    """A user message."""
    return {"role": "user", "content": text}


def assistant(
    content: str, reasoning: str | None = None, calls: list[str] | None = None
) -> Message:
    """An assistant message, with its reasoning and the calculator expressions that it calls."""
    message: Message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {
                "id": f"call_{i}",
                "type": "function",
                "function": {"name": "calculator", "arguments": {"expression": expression}},
            }
            for i, expression in enumerate(calls)
        ]
    return message


def tool_result(text: str, index: int = 0) -> Message:
    """The result of call number `index`."""
    return {"role": "tool", "tool_call_id": f"call_{index}", "content": text}


def direct_dialogue(problem: Problem) -> Dialogue:
    """A question without tools, worked in the reasoning."""
    reply = assistant(answer_text(problem), chain(problem))
    return Dialogue([user(problem.question), reply], problems=[problem])


def calculator_dialogue(
    problem: Problem, result: str | None = None, *, remember: bool = True
) -> Dialogue:
    """A question with the calculator offered: the call, its result, the answer quoting it.

    result: what the tool says, the true value if None. remember: whether the client sends the
    call's reasoning back.
    """
    said = str(problem.answer) if result is None else result
    return Dialogue(
        [
            user(problem.question),
            assistant("", CALL_TOOL if remember else None, [problem.expression]),
            tool_result(said),
            assistant(answer_text(problem, said), READ_RESULT.format(said)),
        ],
        [CALCULATOR],
        [problem],
    )


def two_questions(first: Problem, second: Problem, joint: str) -> str:
    """One question that asks for two results."""
    return joint.format(a=first.expression, b=second.expression)


JOINT_PHRASES = (
    "What is {a} and what is {b}?",
    "What are {a} and {b}?",
    "Compute {a} and also {b}.",
    "Calculate {a}. Then calculate {b}.",
    "{a} = ? {b} = ?",
)


def parallel_dialogue(
    first: Problem,
    second: Problem,
    joint: str = JOINT_PHRASES[0],
    results: tuple[str, str] | None = None,
    *,
    remember: bool = True,
) -> Dialogue:
    """Two independent results in one question: two calls in one block, then both answers."""
    said = results or (str(first.answer), str(second.answer))
    lines = [f"{p.expression} = {value}" for p, value in zip((first, second), said, strict=True)]
    return Dialogue(
        [
            user(two_questions(first, second, joint)),
            assistant("", CALL_TOOL if remember else None, [first.expression, second.expression]),
            tool_result(said[0], 0),
            tool_result(said[1], 1),
            assistant(
                "\n".join([*lines, f"#### {said[0]} and {said[1]}"]),
                READ_RESULT.format(f"{said[0]} and {said[1]}"),
            ),
        ],
        [CALCULATOR],
        [first, second],
    )


def small_talk(greeting: str, reply: str, *, tools: bool) -> Dialogue:
    """A greeting and its reply; with the calculator offered, it is not called."""
    messages = [user(greeting), assistant(reply, SMALL_TALK_REASONING)]
    return Dialogue(messages, [CALCULATOR] if tools else None)


class Stream:
    """The training mixture: an endless, seeded sequence of dialogues and completions."""

    def __init__(self, seed: int | str) -> None:
        self.rng = random.Random(seed)

    def problem(self, *, calculator: bool = False) -> Problem:
        """A training problem; the calculator gets products too, because it only has to be asked."""
        rng = self.rng
        if calculator and rng.random() < 0.15:
            return drawn(lambda: product(rng), held_out=False)
        weights = (4, 4, 1, 3) if calculator else (24, 40, 10, 26)
        kind: Kind = rng.choices(KINDS, weights)[0]
        return sample(kind, rng)

    def claimed(self, problem: Problem) -> str:
        """What the tool answers: mostly the truth, else any number, to be quoted all the same."""
        rng, shown = self.rng, str(problem.answer)
        if rng.random() < 0.35:
            shown = str(rng.randrange(10 ** rng.randint(1, 5)))
        if rng.random() < 0.1:
            shown = f"-{shown.lstrip('-')}"
        return shown

    def tool_dialogue(self) -> Dialogue:
        """One or two calls, with the tool described in one of several ways."""
        rng = self.rng
        first, remember = self.problem(calculator=True), rng.random() < 0.8
        if rng.random() < 0.22:
            pair = [sample(rng.choice(KINDS[:3]), rng) for _ in range(2)]
            results = (self.claimed(pair[0]), self.claimed(pair[1]))
            joint = rng.choice(JOINT_PHRASES)
            dialogue = parallel_dialogue(*pair, joint, results, remember=remember)
        else:
            dialogue = calculator_dialogue(first, self.claimed(first), remember=remember)
        self.vary_tools(dialogue)
        return dialogue

    def vary_tools(self, dialogue: Dialogue) -> None:
        """Describe the calculator differently now and then, or offer a second tool with it."""
        if dialogue.tools and self.rng.random() < 0.2:
            dialogue.tools = [self.rng.choice(OTHER_CALCULATORS)]
        if dialogue.tools and self.rng.random() < 0.06:
            dialogue.tools = self.rng.sample([*dialogue.tools, WEATHER], 2)

    def with_history(self, dialogue: Dialogue) -> Dialogue:
        """Put one earlier exchange in front, as a client sends it: mostly without its reasoning."""
        rng = self.rng
        if dialogue.tools and rng.random() < 0.6:
            earlier = calculator_dialogue(self.problem(calculator=True))
        elif rng.random() < 0.15:
            earlier = small_talk(*rng.choice(SMALL_TALK), tools=False)
        else:
            earlier = direct_dialogue(self.problem())
        history = earlier.messages
        if rng.random() < 0.8:
            history = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in history]
        dialogue.messages = [*history, *dialogue.messages]
        dialogue.problems = [*earlier.problems, *dialogue.problems]
        return dialogue

    def completion(self) -> Completion:
        """A few-shot prompt with zero to four shots."""
        shots = [self.problem() for _ in range(self.rng.choice((0, 1, 1, 2, 3, 4)))]
        return Completion(self.problem(), shots)

    def __next__(self) -> Dialogue | Completion:
        rng = self.rng
        draw = rng.random()
        if draw < 0.08:
            return self.completion()
        if draw < 0.26:
            dialogue = self.tool_dialogue()
        elif draw < 0.30:
            dialogue = small_talk(*rng.choice(SMALL_TALK), tools=rng.random() < 0.5)
            self.vary_tools(dialogue)
        else:
            dialogue = direct_dialogue(self.problem())
        if rng.random() < 0.12:
            dialogue = self.with_history(dialogue)
        if rng.random() < 0.2:
            system = {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}
            dialogue.messages = [system, *dialogue.messages]
        return dialogue

    def __iter__(self) -> Stream:
        return self
