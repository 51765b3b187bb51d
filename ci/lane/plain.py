"""Text as it can be kept: without what a terminal acts on and XML forbids, and without our paths.

Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

#: ECMA-48: control sequences, strings that end in BEL or ST, and two-byte escapes.
_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(?:\x07|\x1b\\)|[ -/]*[0-~])", re.DOTALL
)
#: All but what XML 1.0 has as `Char`.
_NO_CHARACTER = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|\x7f")


def plain(text: str) -> str:
    """Without escape sequences, and without characters that XML 1.0 has not.

    >>> plain("\\x1b[31mred\\x1b[0m\\x00")
    'red'
    """
    return _NO_CHARACTER.sub("", _ESCAPES.sub("", text))


def lines_of(text: str) -> Iterator[str]:
    """Lines as a terminal would show them: a bar rewrites its own with carriage returns."""
    for line in re.split(r"[\r\n]+", plain(text)):
        if line.strip():
            yield line.rstrip()


def portable(value: Any, places: Iterable[tuple[str, str]]) -> Any:
    """A JSON value in which folders have names that hold elsewhere, too.

    places: (folder, its name); the longest folder goes first. An empty name makes what lies in the
    folder relative.
    """
    ordered = sorted(((f, n) for f, n in places if f.strip("/")), key=lambda each: -len(each[0]))
    if isinstance(value, str):
        for folder, name in ordered:
            value = _renamed(value, folder.rstrip("/"), name)
        return value
    if isinstance(value, Mapping):
        return {key: portable(each, ordered) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(each, ordered) for each in value]
    return value


def _renamed(text: str, folder: str, name: str) -> str:
    """Whole folders alone: /models is not in /models2 nor in /old/models."""
    inside = f"{name}/" if name else ""
    text = re.sub(rf"(?<![\w./~-]){re.escape(folder)}/", lambda _: inside, text)
    return re.sub(rf"(?<![\w./~-]){re.escape(folder)}(?![\w.-])", lambda _: name or ".", text)


def places(
    root: Path, out: Path, variables: Mapping[str, str | None], interpreter: str
) -> list[tuple[str, str]]:
    """What `portable` renames: the repository, the home, the run's own folder, and variables.

    variables: name -> the path that it holds here, if any; shown as `$NAME`.
    """
    named = [(value, f"${name}") for name, value in variables.items() if value]
    home = [(str(Path.home()), "~")]
    kept = [(interpreter, "python")]
    return [*named, (str(out.resolve()), ""), (str(root), ""), *kept, *home]
