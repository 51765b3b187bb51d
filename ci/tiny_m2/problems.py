"""Arithmetic problems with worked answers: seeded, pure Python, split into train and held-out.

The split is by operation, not by sentence: `is_held_out(a, op, b)` hashes the operands, and a
training problem never contains a held-out operation in any of its steps, whatever the words around
it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Operator = Literal["+", "-", "*"]
Kind = Literal["two_digit", "three_digit", "mixed", "word"]

KINDS: tuple[Kind, ...] = ("two_digit", "three_digit", "mixed", "word")
HELD_OUT_SHARE = 10  # one operation in ten is held out


@dataclass(frozen=True)
class Step:
    """One operation on two non-negative numbers."""

    a: int
    op: Operator
    b: int

    @property
    def result(self) -> int:
        """The value of `a op b`."""
        if self.op == "+":
            return self.a + self.b
        return self.a - self.b if self.op == "-" else self.a * self.b

    @property
    def held_out(self) -> bool:
        """Whether training never sees this operation."""
        return is_held_out(self.a, self.op, self.b)

    def __str__(self) -> str:
        return f"{self.a} {self.op} {self.b}"


@dataclass(frozen=True)
class Problem:
    """A question, the operations that answer it, and the calculator expression for them."""

    question: str
    steps: tuple[Step, ...]
    expression: str
    kind: Kind

    @property
    def answer(self) -> int:
        """The number that the answer ends in, after `####`."""
        return self.steps[-1].result

    @property
    def held_out(self) -> bool:
        """Whether any step is held out of training."""
        return any(step.held_out for step in self.steps)


@lru_cache(maxsize=1 << 20)
def is_held_out(a: int, op: str, b: int) -> bool:
    """Whether `a op b` belongs to the held-out tenth; the same on every platform."""
    digest = hashlib.blake2b(f"{a}{op}{b}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def add_columns(a: int, b: int) -> list[str]:
    """Column sums of a + b from the units up, each with the carry it received.

    >>> add_columns(345, 128)
    ['5+8=13', '4+2+1=7', '3+1=4']
    """
    columns, carry = [], 0
    digits_a, digits_b = str(a)[::-1], str(b)[::-1]
    for i in range(max(len(digits_a), len(digits_b))):
        terms = [digits[i] for digits in (digits_a, digits_b) if i < len(digits)]
        terms += ["1"] if carry else []
        total = sum(map(int, terms))
        columns.append(f"{'+'.join(terms)}={total}")
        carry = total // 10
    return columns


def subtract_columns(a: int, b: int) -> list[str]:
    """Column differences of a - b from the units up; a borrowing column has its ten added.

    >>> subtract_columns(345, 128)
    ['15-8=7', '4-2-1=1', '3-1=2']
    """
    if a < b:
        raise ValueError(f"{a} - {b} is negative; the worked form covers a >= b only")
    columns, borrow = [], 0
    digits_a, digits_b = str(a)[::-1], str(b)[::-1]
    for i, digit in enumerate(digits_a):
        taken = [digits_b[i]] if i < len(digits_b) else []
        taken += ["1"] if borrow else []
        top = int(digit)
        borrow = int(top < sum(map(int, taken)))
        top += 10 * borrow
        columns.append(f"{'-'.join([str(top), *taken])}={top - sum(map(int, taken))}")
    return columns


def worked_step(step: Step) -> str:
    """The worked form of one sum or difference.

    >>> worked_step(Step(345, "+", 128))
    '345+128: 5+8=13, 4+2+1=7, 3+1=4 => 473'
    """
    columns = (add_columns if step.op == "+" else subtract_columns)(step.a, step.b)
    return f"{step.a}{step.op}{step.b}: {', '.join(columns)} => {step.result}"


def chain(problem: Problem) -> str:
    """The reasoning for a problem: its worked steps, one a line."""
    return "\n".join(map(worked_step, problem.steps))


def answer_text(problem: Problem, value: int | str | None = None) -> str:
    """The final answer, ending in `#### N`; `value` (a tool's) replaces the true number."""
    shown = problem.answer if value is None else value
    if problem.kind == "word":
        return f"The answer is {shown}.\n#### {shown}"
    return f"{problem.expression} = {shown}\n#### {shown}"


SUM_PHRASES = (
    "What is {a} + {b}?",
    "{a} + {b} = ?",
    "Compute {a} + {b}.",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
    "Calculate {a} + {b}",
    "How much is {a} plus {b}?",
    "Please add {b} to {a}.",
    "{a} + {b}",
    "Can you tell me what {a} + {b} is?",
    "Solve: {a} + {b}",
    "What do you get if you add {a} and {b}?",
)
DIFFERENCE_PHRASES = (
    "What is {a} - {b}?",
    "{a} - {b} = ?",
    "Compute {a} - {b}.",
    "Subtract {b} from {a}.",
    "What is the difference of {a} and {b}?",
    "Calculate {a} - {b}",
    "How much is {a} minus {b}?",
    "Please take {b} away from {a}.",
    "{a} - {b}",
    "Can you tell me what {a} - {b} is?",
    "Solve: {a} - {b}",
    "What do you get if you subtract {b} from {a}?",
)
PRODUCT_PHRASES = (
    "What is {a} * {b}?",
    "{a} * {b} = ?",
    "Compute {a} * {b}.",
    "Multiply {a} and {b}.",
    "How much is {a} times {b}?",
    "Calculate {a} * {b}",
)
PHRASES: dict[str, tuple[str, ...]] = {
    "+": SUM_PHRASES,
    "-": DIFFERENCE_PHRASES,
    "*": PRODUCT_PHRASES,
}

NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Max", "Emma", "Leo", "Nina", "Omar", "Rosa")
OBJECTS = (
    "apples", "books", "pens", "stamps", "cards", "coins",
    "shells", "eggs", "cookies", "stickers", "marbles", "flowers",
)  # fmt: skip

# (question, operators): {a} op {b}, then op {c}
WORD_TEMPLATES: tuple[tuple[str, str], ...] = (
    ("{n} has {a} {o}. {m} gives {n} {b} more. How many {o} does {n} have now?", "+"),
    ("{n} has {a} {o} and buys {b} more. How many {o} does {n} have?", "+"),
    (
        "There are {a} {o} in one box and {b} {o} in another box. How many {o} are there in total?",
        "+",
    ),
    ("{n} found {a} {o} and {m} found {b} {o}. How many {o} did they find together?", "+"),
    ("A shop sold {a} {o} on Monday and {b} {o} on Tuesday. How many {o} did it sell in all?", "+"),
    ("{n} read {a} pages last week and {b} pages this week. How many pages did {n} read?", "+"),
    ("{n} has {a} {o}. {m} has {b} more {o} than {n}. How many {o} does {m} have?", "+"),
    ("{n} had {a} {o} and gave {b} to {m}. How many {o} does {n} have left?", "-"),
    ("There were {a} {o} in a box. {n} took {b} of them. How many {o} are left in the box?", "-"),
    ("A shop had {a} {o} and sold {b}. How many {o} are left?", "-"),
    ("{n} has {a} {o} and {m} has {b}. How many more {o} does {n} have than {m}?", "-"),
    ("{n} needs {a} {o} and has {b}. How many more {o} does {n} need?", "-"),
    ("A bus had {a} people. At a stop {b} people got off. How many people are on the bus?", "-"),
    ("{n} had {a} dollars and spent {b} dollars. How many dollars are left?", "-"),
    ("{n} has {a} {o}, buys {b} more and gives {c} to {m}. How many {o} does {n} have now?", "+-"),
    (
        "A bus had {a} people. Then {b} people got off and {c} people got on. "
        "How many people are on the bus?",
        "-+",
    ),
    (
        "{n} found {a} {o} on Monday, {b} on Tuesday and {c} on Friday. "
        "How many {o} did {n} find in all?",
        "++",
    ),
    ("A shop had {a} {o}. It sold {b} on Monday and {c} on Tuesday. How many {o} are left?", "--"),
    (
        "{n} had {a} dollars, spent {b} dollars and then got {c} dollars from {m}. "
        "How many dollars does {n} have now?",
        "-+",
    ),
    (
        "There are {a} {o} in one box and {b} in another. {n} takes {c} of them. "
        "How many {o} are left?",
        "+-",
    ),
)


def number(rng: random.Random, digits: int) -> int:
    """A uniform number of exactly `digits` digits (one digit: 1 to 9)."""
    return rng.randrange(10 ** (digits - 1), 10**digits)


def operation(rng: random.Random, op: Operator, digits: tuple[int, int]) -> Step:
    """A random `a op b` with the given digit counts; differences are never negative."""
    a, b = number(rng, digits[0]), number(rng, digits[1])
    if op == "-" and a < b:
        a, b = b, a
    return Step(a, op, b)


def direct(rng: random.Random, kind: Kind) -> Problem:
    """A bare sum or difference in one of many phrasings."""
    op: Operator = rng.choice("+-")  # type: ignore[assignment]
    sizes = {"two_digit": (2, 2), "three_digit": (3, 3)}
    digits = sizes.get(kind) or rng.choice(((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2)))
    step = operation(rng, op, digits)
    question = rng.choice(PHRASES[op]).format(a=step.a, b=step.b)
    return Problem(question, (step,), str(step), kind)


def product(rng: random.Random) -> Problem:
    """A product, for the calculator only: it has no worked form."""
    step = operation(rng, "*", (rng.randint(1, 3), rng.randint(1, 3)))
    question = rng.choice(PRODUCT_PHRASES).format(a=step.a, b=step.b)
    return Problem(question, (step,), str(step), "mixed")


def word(rng: random.Random) -> Problem:
    """A word problem of one or two steps with numbers of one to three digits."""
    template, operators = rng.choice(WORD_TEMPLATES)
    sizes = rng.choice(((2, 2), (2, 2), (2, 1), (3, 2), (3, 3)))
    steps = [operation(rng, operators[0], sizes)]  # type: ignore[arg-type]
    if len(operators) == 2:
        third = number(rng, rng.choice((1, 2, 2)))
        if operators[1] == "-":
            third = rng.randint(1, max(1, min(third, steps[0].result)))
        steps.append(Step(steps[0].result, operators[1], third))  # type: ignore[arg-type]
    name, other = rng.sample(NAMES, 2)
    question = template.format(
        n=name, m=other, o=rng.choice(OBJECTS), a=steps[0].a, b=steps[0].b, c=steps[-1].b
    )
    expression = " ".join([str(steps[0]), *(f"{s.op} {s.b}" for s in steps[1:])])
    return Problem(question, tuple(steps), expression, "word")


def drawn(make: Callable[[], Problem], *, held_out: bool) -> Problem:
    """Draw from `make` until a problem is on the wanted side and never goes below zero."""
    while True:
        problem = make()
        negative = any(step.op == "-" and step.result < 0 for step in problem.steps)
        if problem.held_out == held_out and not negative:
            return problem


def sample(kind: Kind, rng: random.Random, *, held_out: bool = False) -> Problem:
    """One problem of a kind, from the training side or, with `held_out`, from the other."""
    make = (lambda: word(rng)) if kind == "word" else (lambda: direct(rng, kind))
    return drawn(make, held_out=held_out)


def held_out_problems(kind: Kind, count: int, seed: int = 0) -> list[Problem]:
    """`count` held-out problems with distinct questions, the same ones for the same seed."""
    rng = random.Random(f"held-out/{kind}/{seed}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = sample(kind, rng, held_out=True)
        found.setdefault(problem.question, problem)
    return list(found.values())


def final_number(text: str) -> str | None:
    """What follows the last `####` of a reply, or None: `'12 + 5 = 17\\n#### 17'` gives `'17'`."""
    _, mark, tail = text.rpartition("####")
    return tail.strip() if mark else None
