"""The log of a run: what was asked, then one line a question. It is also the state of the run.

The first line is `{"suite", "identity", "server"}`; each further one has an `id`. A run that was
killed goes on behind the last whole line.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sglang_minimax.accuracy.errors import AccuracyError

Entry = dict[str, Any]


class Journal:
    """One log, open for one run. `entries`: by id, those of before and those of now.

    path: None keeps the log only as long as the run. heading: what a log to go on with has to begin
    with; the names in it are what a message names where it does not.
    Raises AccuracyError for a log of another run, one that another process writes, or no log.
    """

    def __init__(self, path: Path | None, heading: Mapping[str, Any]) -> None:
        self._lock = threading.Lock()
        self._name = str(path)
        self._file = _opened(path)
        try:
            self.entries = self._read(json.loads(json.dumps(heading)))
        except BaseException:
            self._file.close()
            raise
        self.found = len(self.entries)

    def add(self, entry: Entry) -> None:
        """Write one entry, which has an `id`, in one piece. Threads may call this."""
        with self._lock:
            self._write(entry)
            self.entries[str(entry["id"])] = entry

    def close(self) -> None:
        """End the run; the lock goes with the file."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, heading: dict[str, Any]) -> dict[str, Entry]:
        text = self._file.read()
        end = text.rfind(b"\n") + 1
        first, *lines = text[:end].splitlines() or [b""]
        if end == 0 and not _line(heading).startswith(text):
            raise self._no_log(1)
        if end and (different := _differences(self._parsed(1, first), heading)):
            raise AccuracyError(
                f"{self._name} is the log of another run: {different}; give another --log."
            )
        parsed = [self._parsed(number, line) for number, line in enumerate(lines, start=2)]
        # A line that a kill cut off is asked again.
        self._file.truncate(end)
        self._file.seek(end)
        if end == 0:
            self._write(heading)
        return {str(entry.get("id")): entry for entry in parsed}

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self._no_log(number)
        return found

    def _no_log(self, number: int) -> AccuracyError:
        return AccuracyError(f"line {number} of {self._name} is none of a log; give another --log.")

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(_line(entry))
        self._file.flush()


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _opened(path: Path | None) -> IO[bytes]:
    if path is None:
        return tempfile.TemporaryFile()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
    except OSError as error:
        raise AccuracyError(f"the log {path} cannot be written: {error.strerror}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise AccuracyError(
            f"another run is writing {path}; wait for it, or give another --log."
        ) from error
    return file


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs, as `shots 5 there, 0 now`; empty for the same."""
    there, now = _flat(found), _flat(wanted)
    names = [name for name in {**there, **now} if there.get(name) != now.get(name)]
    return ", ".join(f"{name} {there.get(name)} there, {now.get(name)} now" for name in names)


def _flat(heading: Mapping[str, Any]) -> dict[str, Any]:
    """The names of its groups beside those of itself."""
    groups = {name: value for name, value in heading.items() if isinstance(value, dict)}
    plain = {name: value for name, value in heading.items() if name not in groups}
    return plain | {name: value for group in groups.values() for name, value in group.items()}
