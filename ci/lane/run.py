"""Run a lane: look what is missing, run its variants one after the other, write what was found."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from ci.lane import LaneError, junit, needs, resume, suites
from ci.lane.launch import Node, weights
from ci.lane.machine import ROOT, Devices, devices, facts
from ci.lane.outcome import Outcome, VariantOutcome
from ci.lane.plain import places, portable
from ci.lane.schema import Lane
from ci.lane.variant import Launched, Runner

RESULT = "result.json"


@dataclass
class Asked:
    """What is to run. variants, suites: names, empty for all. port: None for any that is free.

    resume: go on with what a run left in `out`; else a folder with a run in it is refused, since
    its answers may be those of another build.
    """

    lane: Lane
    out: Path
    variants: Sequence[str] = ()
    suites: Sequence[str] = ()
    node: Node = field(default_factory=Node)
    port: int | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if not self.resume and resume.holds_a_run(self.out / RESULT):
            raise LaneError(
                f"{self.out} holds a run already; give another --out, or --resume to go on with it."
            )
        for kind, asked, there in (
            ("variant", self.variants, list(self.lane.variants)),
            ("suite", self.suites, list(self.lane.suites)),
        ):
            if unknown := [name for name in asked if name not in there]:
                raise LaneError(
                    f"{self.lane.name} has no {kind} {unknown[0]!r}; it has {', '.join(there)}."
                )
        self.variants = list(self.variants or self.lane.variants)
        self.suites = [name for name in self.lane.suites if name in self.suites or not self.suites]


def run(asked: Asked, give_up: Callable[[], bool]) -> Outcome:
    """Run the lane and write `result.json` and `junit.xml`. give_up: whether to stop early.

    Raises LaneError where the folder cannot be made, or holds a run that cannot be gone on with.
    """
    lane = asked.lane
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaneError(
            f"the folder {asked.out} cannot be made ({error.strerror}); give another --out."
        ) from error
    here = _places(asked)
    found = devices() if lane.hardware.kind != "cpu" else Devices()
    outcome = Outcome(
        lane=lane.name,
        about=lane.about,
        model=portable(weights(lane.model), here),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=facts(found),
    )
    if asked.resume:
        outcome.variants = resume.variants_of(asked.out / RESULT, outcome)
    outcome.missing = needs.missing(lane, list(asked.suites), asked.node, asked.port, found)

    def save() -> None:
        outcome.write(asked.out / RESULT)
        junit.write(outcome, asked.out / "junit.xml")

    # There while the run lasts, so that one that was killed is not taken for none.
    save()
    launched = Launched(lane, asked.out, asked.node, asked.port, give_up, save, here)
    try:
        for name in asked.variants if not outcome.missing else ():
            _run_variant(name, asked, outcome, launched)
            if give_up():
                break
    finally:
        outcome.ended = True
        save()
    return outcome


def _run_variant(name: str, asked: Asked, outcome: Outcome, launched: Launched) -> None:
    """Run what a variant does not have yet, and put it in its place."""
    names = list(asked.suites) if asked.node.rank == 0 else []
    before = next((each for each in outcome.variants if each.name == name), None)
    variant = VariantOutcome(name, node=asked.node.rank)
    if before is None:
        outcome.variants.append(variant)
    else:
        variant.suites = [each for each in before.suites if each.error is None]
        names = [each for each in names if each not in {suite.name for suite in variant.suites}]
        if before.error is None and asked.node.rank == 0 and not names:
            return
        outcome.variants[outcome.variants.index(before)] = variant
    try:
        Runner(launched, variant).run(names)
    except BaseException as error:
        variant.error = f"{type(error).__name__}: {error}"
        raise
    finally:
        variant.interrupted = launched.give_up()


def _places(asked: Asked) -> list[tuple[str, str]]:
    models = [asked.lane.model, *([asked.lane.draft] if asked.lane.draft else [])]
    names = [*(each.override for each in models if each.override), suites.DATA]
    return places(ROOT, asked.out, {name: os.environ.get(name) for name in names}, sys.executable)


@contextlib.contextmanager
def noted_signals() -> Iterator[Callable[[], bool]]:
    """Note SIGINT, SIGTERM and SIGHUP meanwhile; what it yields says whether one has come.

    Noted, not raised: `sglang_minimax.cli.serve` says why.
    """
    noted: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.signal(n, lambda came, _frame: noted.append(came)) for n in numbers}
    try:
        yield lambda: bool(noted)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
