"""Every state that a model can reach, breadth first, and the shortest way to the first wrong one.

A model is a start and its steps. It says itself when a step breaks a rule (`Broken`) and when
everything begun has ended (`at_rest`). What the search adds: it tries every order of steps, so a
model without a counterexample has none within its bounds, and it walks the graph backwards to show
that rest can be reached from every state.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

State = Any  # hashable
Label = tuple[str | int, ...]  # names a step; unique among the steps of one state


@dataclass(frozen=True, slots=True)
class Broken:
    """Where a step leads that the protocol must never take, and which promise it breaks."""

    promise: str
    how: str


class Model(Protocol):
    """What can be explored. States are immutable and equal when nothing can tell them apart."""

    def start(self) -> State: ...

    def steps(self, state: State) -> Iterator[tuple[Label, State | Broken]]: ...

    def at_rest(self, state: State) -> bool: ...


class TooManyStates(Exception):
    """The search was given up: nothing is shown."""


@dataclass(frozen=True, slots=True)
class Counterexample:
    """The labels from the start to the broken promise, as few as there are."""

    labels: tuple[Label, ...]
    broken: Broken


@dataclass(frozen=True, slots=True)
class Result:
    """What a search found. `depth` is the largest number of steps on a shortest way."""

    states: int
    steps: int
    depth: int
    counterexample: Counterexample | None


def explore(model: Model, most_states: int = 3_000_000) -> Result:
    """Search all states of `model`, up to the first broken promise.

    A step that breaks a promise ends the search; so does, once all states are known, one from which
    rest cannot be reached. Raises TooManyStates beyond `most_states`.
    """
    start = model.start()
    number = {start: 0}
    frontier = [start]
    came_from = array("q", [-1])
    by: list[Label] = [()]
    sources, targets = array("q"), array("q")  # one entry a step
    depth = 0

    def way_to(state: int) -> tuple[Label, ...]:
        labels: list[Label] = []
        while came_from[state] >= 0:
            labels.append(by[state])
            state = came_from[state]
        return tuple(reversed(labels))

    def found(labels: tuple[Label, ...], broken: Broken) -> Result:
        example = Counterexample(labels, broken)
        return Result(len(number), len(sources), depth, example)

    resting = array("q")
    while frontier:
        following: list[State] = []
        for state in frontier:
            here = number[state]
            if model.at_rest(state):
                resting.append(here)
            for label, after in model.steps(state):
                if isinstance(after, Broken):
                    return found((*way_to(here), label), after)
                there = number.get(after)
                if there is None:
                    there = number[after] = len(number)
                    if there >= most_states:
                        raise TooManyStates(f"{most_states} states and more")
                    came_from.append(here)
                    by.append(label)
                    following.append(after)
                sources.append(here)
                targets.append(there)
        frontier = following
        depth += bool(frontier)
    stranded = _cannot_reach(resting, sources, targets, len(number))
    if stranded is not None:
        return found(way_to(stranded), Broken("termination", "rest cannot be reached any more"))
    return Result(len(number), len(sources), depth, None)


def _cannot_reach(
    goals: array[int], sources: array[int], targets: array[int], n: int
) -> int | None:
    """Return the first of n states from which no goal can be reached, None where there is none."""
    before: list[list[int]] = [[] for _ in range(n)]
    for source, target in zip(sources, targets, strict=True):
        before[target].append(source)
    reaches = bytearray(n)
    waiting = list(goals)
    for goal in waiting:
        reaches[goal] = 1
    while waiting:
        for source in before[waiting.pop()]:
            if not reaches[source]:
                reaches[source] = 1
                waiting.append(source)
    missing = reaches.find(0)
    return None if missing < 0 else missing
