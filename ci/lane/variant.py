"""One variant of a lane: start its server, run suites against it, stop everything."""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from ci.lane import suites
from ci.lane.launch import Node, arguments, weights
from ci.lane.outcome import SuiteOutcome, VariantOutcome
from ci.lane.plain import lines_of, portable
from ci.lane.schema import Lane
from ci.lane.watch import LAST_LINES, Watch, sentence_of
from sglang_minimax.cli.local_server import LocalServer, ServerFailed

#: Seconds between two looks at node 0, and looks after which it is done, or stays.
LOOK, VAIN = 2.0, 5


@dataclass(frozen=True)
class Launched:
    """What the variants of a run have in common.

    port: None for any that is free. give_up: whether to stop early. save: writes the result so far.
    places: folders of this machine and what they are called in a result.
    """

    lane: Lane
    out: Path
    node: Node
    port: int | None
    give_up: Callable[[], bool]
    save: Callable[[], None]
    places: Sequence[tuple[str, str]]


class Runner:
    """One variant on this node: `run` fills in the outcome it was given."""

    def __init__(self, launch: Launched, outcome: VariantOutcome) -> None:
        self.launch, self.outcome, self.give_up = launch, outcome, launch.give_up
        self.lane, self.node = launch.lane, launch.node
        self.folder = launch.out / outcome.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.title = f"{self.lane.name} {outcome.name}"
        self.console = Console(stderr=True, highlight=False)

    def run(self, names: Sequence[str]) -> None:
        """Serve, and run these suites; what went wrong is in the outcome."""
        log = self.folder / "server.log"
        _put_aside(log)
        with log.open("wb") as file:
            server = LocalServer(
                weights(self.lane.model),
                port=self.launch.port,
                arguments=arguments(self.lane, self.outcome.name, self.node),
                environment=self.lane.environment_of(self.outcome.name),
                log=file,
            )
            self.outcome.command = self._portable(server.command)
            try:
                self._serve(server, names)
            except ServerFailed as error:
                self.outcome.error = self._failure(error)
            finally:
                server.stop()
        if self.give_up() and self.outcome.error is None:
            self.outcome.error = "it was interrupted."

    def _serve(self, server: LocalServer, names: Sequence[str]) -> None:
        server.start()
        if self.node.rank > 0:
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

    def _suites(self, names: Sequence[str], server: LocalServer) -> None:
        for name in names:
            if self.give_up():
                return
            log = self.folder / f"{name}.log"
            self.console.print(f"{self.title}: suite {name} (progress: {log})", markup=False)
            begin = time.monotonic()
            outcome = self._suite(name, server.url)
            outcome.seconds = round(time.monotonic() - begin, 1)
            self.outcome.suites.append(outcome)
            self.launch.save()
            if not _alive(server):
                raise ServerFailed(f"the server ended during the suite {name}.")

    def _suite(self, name: str, url: str) -> SuiteOutcome:
        variant = self.outcome.name
        try:
            found = suites.run(self.lane, variant, name, url, self.folder, self.give_up)
        except (OSError, ValueError) as error:
            return SuiteOutcome(name, error=f"it could not be run: {error}")
        found.result = self._portable(found.result)
        return found

    def _portable(self, value: Any) -> Any:
        """As it may stand in a result: without this machine's folders."""
        return portable(value, self.launch.places)

    def _follow(self, server: LocalServer) -> None:
        """On another node: serve until node 0 is done, which closes its address."""
        address = self.node.address or ""
        self.console.print(f"{self.title}: node {self.node.rank}", markup=False)
        begin, seen, vain = time.monotonic(), False, 0
        while not self.give_up() and vain < VAIN:
            if not _alive(server):
                if not seen:
                    raise ServerFailed("the server of this node ended before node 0 was there.")
                if self._node_0_stays(address):
                    raise ServerFailed("the server of this node ended, and node 0 still served.")
                return
            answers = _answers(address)
            seen, vain = seen or answers, 0 if answers or not seen else vain + 1
            if not seen and time.monotonic() - begin > 60 * self.lane.start_minutes:
                raise ServerFailed(f"node 0 was not at {address} within the time to start.")
            time.sleep(LOOK)

    def _node_0_stays(self, address: str) -> bool:
        """Whether node 0 goes on; one that is stopped loses its ranks first, then its address."""
        for _ in range(VAIN):
            if self.give_up() or not _answers(address):
                return False
            time.sleep(LOOK)
        return True

    def _failure(self, error: ServerFailed) -> str:
        """What the server said, in one sentence; its last lines on stderr."""
        log = self.folder / "server.log"
        text = log.read_text(errors="replace")
        for line in [*lines_of(text)][-LAST_LINES:]:
            self.console.print(f"  {line}", markup=False, soft_wrap=True)
        self.console.print(f"  (all of it: {log})", markup=False, soft_wrap=True)
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


def _put_aside(log: Path) -> None:
    """Keep the log of a run that is gone on with, as server-1.log, server-2.log, ..."""
    if log.is_file() and log.stat().st_size:
        number = next(n for n in itertools.count(1) if not log.with_stem(f"server-{n}").exists())
        log.rename(log.with_stem(f"server-{number}"))
