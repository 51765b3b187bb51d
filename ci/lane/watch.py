"""What a starting server is at, by its own log; and what it said when it failed."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ci.lane.plain import lines_of

#: Stages of a start, in order, each by what SGLang or the plugin prints first in it.
STAGES = (
    ("importing SGLang", re.compile(r"^")),
    ("starting ranks", re.compile(r"server_args=|Init parallel begin")),
    ("loading weights", re.compile(r"Load weight begin|Loading weights")),
    ("allocating the KV cache", re.compile(r"Load weight end|KV Cache is allocated")),
    ("capturing graphs", re.compile(r"Capture .*graph.* begin|Capture .*graph bs")),
    ("opening the port", re.compile(r"Uvicorn running|Application startup complete")),
    ("warming up", re.compile(r"Prefill batch|POST /(generate|v1)")),
    ("ready", re.compile(r"fired up and ready to roll")),
)
_SHARE = re.compile(r"Loading weights:\s+(\d+)%|Loading safetensors.*?\s(\d+)%")
_SENTENCE = re.compile(r"^(?:sglang-minimax: .*|[A-Za-z_.]*(?:Error|Exception|Exit|Failed)\b.*)$")
_STAMP = re.compile(r"^\[[^\]]*\]\s*")
#: Lines shown of a server that failed.
LAST_LINES = 20


@dataclass(frozen=True)
class Progressed:
    """Where a server is. stage: index in STAGES. share: of the weights, 0 to 1, where known."""

    stage: int = 0
    share: float | None = None

    @property
    def words(self) -> str:
        """For people."""
        return STAGES[self.stage][0]


def after(line: str, now: Progressed) -> Progressed:
    """Where the server is once it has printed `line`; it never goes back.

    >>> after("[...] Load weight begin. avail mem=1 GB", Progressed()).words
    'loading weights'
    """
    for stage in range(len(STAGES) - 1, now.stage, -1):
        if stage and STAGES[stage][1].search(line):
            now = Progressed(stage)
            break
    found = _SHARE.search(line)
    if found and now.words == "loading weights":
        return Progressed(now.stage, int(found[1] or found[2]) / 100)
    return now


def sentence_of(log: str) -> str | None:
    """The one line of a failed server's log that says why: ours, or the last exception's."""
    found = [line for line in lines_of(log) if _SENTENCE.match(_STAMP.sub("", line))]
    ours = [line for line in found if "sglang-minimax: " in line]
    chosen = (ours or found)[-1:]
    return _STAMP.sub("", chosen[0]) if chosen else None


class Watch:
    """Follows a log file, and shows on stderr what it says: a bar, or a line for each stage."""

    def __init__(self, log: Path, title: str) -> None:
        self._log, self._title = log, title
        self._at, self._rest = 0, ""
        self._now = Progressed()
        self._begin = time.monotonic()
        self.stages: dict[str, float] = {self._now.words: 0.0}
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task(self._text(), total=None)
            self._bar.start()
        else:
            self._say()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.look()
        if self._bar is not None:
            self._bar.stop()

    def look(self) -> None:
        """Read what is new, and show it."""
        before = self._now
        with self._log.open("rb") as log:
            log.seek(self._at)
            new = log.read()
        self._at += len(new)
        *lines, self._rest = re.split(r"[\r\n]", self._rest + new.decode(errors="replace"))
        for line in (*lines, self._rest):
            self._now = after(line, self._now)
        if self._now.stage != before.stage:
            self.stages[self._now.words] = round(time.monotonic() - self._begin, 1)
        if self._bar is not None:
            share = self._now.share
            total = None if share is None else 1.0
            self._bar.update(
                self._task, description=self._text(), total=total, completed=share or 0
            )
        elif self._now.stage != before.stage or _tenths(self._now) > _tenths(before):
            self._say()

    def _text(self) -> str:
        tenths = _tenths(self._now)
        share = f" {10 * tenths} %" if tenths and self._bar is None else ""
        return f"{self._title}: {self._now.words}{share}"

    def _say(self) -> None:
        seconds = time.monotonic() - self._begin
        self._console.print(f"{self._text()} ({seconds:.0f} s)", markup=False)


def _tenths(now: Progressed) -> int:
    """Whole tenths of the weights: off a terminal each is a line."""
    return int(10 * (now.share or 0) + 1e-9)
