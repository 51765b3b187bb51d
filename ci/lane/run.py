"""Run a lane: start the server, run the suites, hold the figures to thresholds, stop everything."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil
from rich.console import Console

from ci.lane import LaneError, junit, needs, suites
from ci.lane.launch import Node, arguments, weights
from ci.lane.outcome import Outcome, SuiteOutcome, VariantOutcome
from ci.lane.schema import Lane
from ci.lane.watch import LAST_LINES, Watch, lines_of, sentence_of
from sglang_minimax.cli.local_server import LocalServer, ServerFailed

RESULT = "result.json"
#: Without a server, on the checkpoint alone.
BEFORE_THE_SERVER = ("validate",)
#: Seconds between two looks at node 0, and looks in vain after which it is done.
LOOK, VAIN = 2.0, 5


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
        if not self.resume and (self.out / RESULT).exists():
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
    """Run the lane and write `result.json` and `junit.xml`. give_up: whether to stop early."""
    lane = asked.lane
    asked.out.mkdir(parents=True, exist_ok=True)
    if not asked.resume:
        # There while the run lasts, so that one that was killed is not taken for none.
        (asked.out / RESULT).touch()
    outcome = Outcome(
        lane=lane.name,
        about=lane.about,
        model=weights(lane.model),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        missing=needs.missing(lane, list(asked.suites), asked.node, asked.port),
    )
    try:
        for variant in asked.variants if not outcome.missing else ():
            outcome.variants.append(VariantOutcome(variant))
            _Runner(asked, outcome.variants[-1], give_up).run()
            if give_up():
                outcome.variants[-1].interrupted = True
                break
    finally:
        outcome.write(asked.out / RESULT)
        junit.write(outcome, asked.out / "junit.xml")
    return outcome


def machine() -> dict[str, str]:
    """What a figure was measured on, as far as it is known without asking the devices."""
    versions = {
        name: importlib.metadata.version(name) for name in ("sglang", "sglang-minimax", "torch")
    }
    return {"host": platform.machine(), "cpus": str(os.cpu_count()), **versions}


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


class _Runner:
    """One variant."""

    def __init__(self, asked: Asked, outcome: VariantOutcome, give_up: Callable[[], bool]) -> None:
        self.asked, self.outcome, self.give_up = asked, outcome, give_up
        self.lane = asked.lane
        self.folder = asked.out / outcome.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.title = f"{self.lane.name} {outcome.name}"
        self.console = Console(stderr=True, highlight=False)

    def run(self) -> None:
        """Everything; what went wrong is in the outcome."""
        early = [name for name in self.asked.suites if name in BEFORE_THE_SERVER]
        if self.asked.node.rank == 0:
            self._suites(early, None)
        with (self.folder / "server.log").open("wb") as log:
            server = LocalServer(
                weights(self.lane.model),
                port=self.asked.port,
                arguments=arguments(self.lane, self.outcome.name, self.asked.node),
                environment=self.lane.environment_of(self.outcome.name),
                log=log,
            )
            self.outcome.command = server.command
            try:
                self._serve(server, [name for name in self.asked.suites if name not in early])
            except ServerFailed as error:
                self.outcome.error = self._failure(error)
            finally:
                server.stop()
        if self.give_up() and self.outcome.error is None:
            self.outcome.error = "it was interrupted."

    def _serve(self, server: LocalServer, names: Sequence[str]) -> None:
        server.start()
        if self.asked.node.rank > 0:
            self._follow(server)
            return
        with Watch(self.folder / "server.log", self.title) as watch:

            def look() -> bool:
                watch.look()
                return self.give_up()

            try:
                ready = server.wait_until_ready(60 * self.lane.start_minutes, give_up=look)
            finally:
                self.outcome.stages = watch.stages
        if ready:
            self._suites(names, server)

    def _suites(self, names: Sequence[str], server: LocalServer | None) -> None:
        for name in names:
            if self.give_up():
                return
            log = self.folder / f"{name}.log"
            self.console.print(f"{self.title}: suite {name} (progress: {log})", markup=False)
            begin = time.monotonic()
            outcome = self._suite(name, server)
            outcome.seconds = round(time.monotonic() - begin, 1)
            self.outcome.suites.append(outcome)
            if server is not None and not _alive(server):
                raise ServerFailed(f"the server ended during the suite {name}.")

    def _suite(self, name: str, server: LocalServer | None) -> SuiteOutcome:
        try:
            url = server.url if server else None
            return suites.run(self.lane, name, url, self.folder, self.give_up)
        except (OSError, ValueError) as error:
            return SuiteOutcome(name, error=f"it could not be run: {error}")

    def _follow(self, server: LocalServer) -> None:
        """On another node: serve until node 0 is done, which closes its address."""
        address = self.asked.node.address or ""
        self.console.print(f"{self.title}: node {self.asked.node.rank}", markup=False)
        begin, seen, vain = time.monotonic(), False, 0
        while not self.give_up() and vain < VAIN:
            if not _alive(server):
                if not seen:
                    raise ServerFailed("the server of this node ended before node 0 was there.")
                return
            answers = _answers(address)
            seen, vain = seen or answers, 0 if answers or not seen else vain + 1
            if not seen and time.monotonic() - begin > 60 * self.lane.start_minutes:
                raise ServerFailed(f"node 0 was not at {address} within the time to start.")
            time.sleep(LOOK)

    def _failure(self, error: ServerFailed) -> str:
        """What the server said, in one sentence; its last lines on stderr."""
        log = self.folder / "server.log"
        text = log.read_text(errors="replace")
        for line in [*lines_of(text)][-LAST_LINES:]:
            self.console.print(f"  {line}", markup=False)
        self.console.print(f"  (all of it: {log})", markup=False)
        said = sentence_of(text)
        return f"{error} It said: {said}" if said else str(error)


def _alive(server: LocalServer) -> bool:
    """Whether the server's processes run; one that has ended and was not waited for does not."""
    for each in server.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            if each.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=LOOK):
            return True
    except OSError:
        return False
