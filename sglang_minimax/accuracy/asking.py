"""Many questions at a time, what is answered written at once, and a bar that shows how far it is.

A question that fails is left out of the log, so the next run asks it again.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from sglang_minimax.accuracy.errors import RequestsFailed
from sglang_minimax.accuracy.journal import Entry, Journal
from sglang_minimax.accuracy.settings import Settings


class HasId(Protocol):
    """A question, or whatever else is asked."""

    @property
    def id(self) -> str:
        """What its entry in the log goes by."""


Question = TypeVar("Question", bound=HasId)

#: After so many failures nothing more is asked: the server is gone, or refuses them all.
ENOUGH_FAILURES = 10


def ask_all(
    questions: Sequence[Question],
    answer: Callable[[Question], Entry],
    journal: Journal,
    settings: Settings,
) -> None:
    """Answer those that the journal lacks, `settings.parallel` at a time, and write each.

    answer: asks the server, and gives the question's entry; it raises openai.OpenAIError for a
    request that failed for good, and anything else for what ends the run.
    Raises RequestsFailed with the number of those that failed.
    """
    from openai import OpenAIError

    left = [each for each in questions if each.id not in journal.entries]
    failures: list[OpenAIError] = []
    with progress_bar(len(questions), settings.progress) as advance:
        advance(len(questions) - len(left))
        for outcome in _outcomes(left, lambda each: journal.add(answer(each)), settings.parallel):
            if isinstance(outcome, OpenAIError):
                failures.append(outcome)
            elif outcome is not None:
                raise outcome
            if len(failures) >= ENOUGH_FAILURES:
                break
            advance(1)
    if failures:
        sentence = _sentence(failures, len(questions), settings)
        raise RequestsFailed(sentence, len(failures), len(questions))


def _outcomes(
    questions: Sequence[Question], act: Callable[[Question], None], parallel: int
) -> Iterator[BaseException | None]:
    """What each act ended in, as they end: None, or what it raised.

    Whoever stops listening stops the asking; what is on its way then is not waited for, not even at
    the end of the process: a server that hangs must not hold Ctrl-C back.
    """
    waiting: queue.SimpleQueue[Question] = queue.SimpleQueue()
    outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    stopped = threading.Event()
    for each in questions:
        waiting.put(each)

    def work() -> None:
        while not stopped.is_set():
            try:
                question = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                act(question)
                outcomes.put(None)
            except BaseException as error:
                outcomes.put(error)

    try:
        for _ in range(min(parallel, len(questions))):
            threading.Thread(target=work, daemon=True).start()
        for _ in questions:
            yield outcomes.get()
    finally:
        stopped.set()


def _sentence(failures: Sequence[Exception], asked: int, settings: Settings) -> str:
    first = failures[0]
    why = " ".join(f"{type(first).__name__}: {first}".split())
    stopped = ", and nothing more was asked" if len(failures) >= ENOUGH_FAILURES else ""
    advice = (
        f"the answers are in {settings.log}, and the same command goes on from there"
        if settings.log
        else "with a log, a further run would ask for these alone"
    )
    return f"{len(failures)} of {asked} requests failed{stopped} (first: {why[:300]}); {advice}."


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, off a terminal a line for each tenth; yields what moves it on."""
    if not shown:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(total, console.print).advance
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)


class _Lines:
    """Progress as lines in a log: one for each tenth of `total`."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._total, self._say, self._done = total, say, 0

    def advance(self, count: int) -> None:
        """So many more are done."""
        before, self._done = 10 * self._done // self._total, self._done + count
        if 10 * self._done // self._total > before:
            self._say(f"{self._done} of {self._total}")
