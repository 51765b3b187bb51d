"""Lane files: where they are, and what is wrong with one, by line and field."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from ci.lane import LANES, LaneError
from ci.lane.schema import Lane


def names() -> list[str]:
    """The lanes there are, by name."""
    return sorted(path.stem for path in LANES.glob("*.yaml"))


def find(name: str) -> Lane:
    """The lane of that name, or of that file. Raises LaneError."""
    if name.endswith((".yaml", ".yml")):
        return load(Path(name))
    if name not in names():
        raise LaneError(f"there is no lane {name!r}; there are {', '.join(names())}.")
    return load(LANES / f"{name}.yaml")


def load(path: Path) -> Lane:
    """Read a lane file. Raises LaneError with the first complaint, its line and its field."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise LaneError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise LaneError(f"{path} line {line} is not YAML: {error.problem}.") from error
    if not isinstance(content, dict):
        raise LaneError(f"{path} holds no lane: its top level has to be a mapping.")
    _refuse_repeated(path, tree)
    try:
        lane = Lane.model_validate(content)
    except ValidationError as error:
        raise LaneError(_complaint(path, tree, error)) from error
    if lane.name != path.stem:
        raise LaneError(f"{path} names its lane {lane.name!r}; file and name have to be the same.")
    return lane


def _refuse_repeated(path: Path, node: yaml.Node | None) -> None:
    """YAML would take the last of two equal keys without a word."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise LaneError(f"{path} line {line}: {key.value} is there twice; remove one.")
            seen.add(key.value)
            _refuse_repeated(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_repeated(path, value)


def _complaint(path: Path, tree: yaml.Node | None, error: ValidationError) -> str:
    # A key that is misspelt is missing, too; its own line says more.
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    field = [str(part) for part in first["loc"] if part != "[key]"]
    if first["type"] == "extra_forbidden":
        said = "there is no such key; remove it or correct its name"
    elif first["type"] == "missing":
        said = "the lane has to say this"
    else:
        said = first["msg"].removeprefix("Value error, ").rstrip(".")
    where = ".".join(field)
    line = _line(tree, field or _named(said))
    more = len(error.errors()) - 1
    rest = f" ({more} more)" if more else ""
    return f"{path} line {line}: {f'{where}: ' if where else ''}{said}{rest}."


def _named(said: str) -> list[str]:
    """The field that a complaint about the whole file begins with, as `suites.gsm8k: ...` does."""
    head = said.split(":", 1)[0]
    return head.split(".") if " " not in head else []


def _line(node: yaml.Node | None, field: Sequence[str]) -> int:
    """The line of the deepest part of a field that is there, from 1."""
    line = 1 if node is None else node.start_mark.line + 1
    for part in field:
        found = None
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == part), None)
        elif isinstance(node, yaml.SequenceNode) and part.isdigit():
            found = next(((v, v) for v in node.value[int(part) : int(part) + 1]), None)
        if found is None:
            return line
        line, node = found[0].start_mark.line + 1, found[1]
    return line
