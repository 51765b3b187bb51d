"""Every place where we reach into SGLang beyond plain imports: what, why, and when it can go.

A `Patch` replaces a symbol, a `Registration` uses a registry that SGLang offers for the purpose.
Both are data, in `patches/upstream.py` for the model and `platforms/cpu/upstream.py` for the CPU
platform; `plugin.py` attaches them right after their module is imported, `doctor` lists them, and
`tests/contract` resolves each target against the pinned release. Plain imports are found by reading
our own source (`imported_symbols`), so that list cannot go stale. Signatures as of the pinned
release are in `upstream_signatures.json` (written by `python -m sglang_minimax.upstream`).

The standard library only, apart from the functions that say otherwise.
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE_ROOT = Path(__file__).parent
SIGNATURES_FILE = PACKAGE_ROOT / "upstream_signatures.json"

#: The signature of what is neither a function nor a class nor a module.
VALUE = "value"
#: What the signature of a symbol begins with that is gone.
MISSING = "missing: "


class Scope(enum.Enum):
    """When an entry is attached."""

    MODEL = "every process; acts only when the model is MiniMax-M2"
    CPU = "only where our CPU platform is the active one"


@dataclass(frozen=True, slots=True)
class Patch:
    """One SGLang symbol that we replace.

    target: `module:qualified.name` of the symbol.
    replacement: `module:function` of ours; called with the original, returns what takes its place.
    why, how: the defect or wall, and what the replacement does.
    upstream: issue, pull request or source line that shows the need, None if nothing is filed.
    exit: the event after which the entry can be deleted.
    """

    target: str
    replacement: str
    scope: Scope
    why: str
    how: str
    upstream: str | None
    exit: str

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Registration:
    """Something added to one of SGLang's own registries, once `module` has been imported.

    run: `module:function` of ours, called without arguments.
    registry: `module:name` of SGLang's registrar that `run` uses, for the contract test.
    """

    module: str
    run: str
    registry: str
    scope: Scope
    why: str

    @property
    def target(self) -> str:
        return self.registry


def entries() -> tuple[Patch | Registration, ...]:
    """Every entry, in the order in which it is attached."""
    from sglang_minimax.patches.upstream import MODEL_PATCHES, MODEL_REGISTRATIONS
    from sglang_minimax.platforms.cpu.upstream import CPU_PATCHES, CPU_REGISTRATIONS

    return (*MODEL_PATCHES, *MODEL_REGISTRATIONS, *CPU_PATCHES, *CPU_REGISTRATIONS)


def resolve(target: str) -> tuple[Any, str, Any]:
    """Import `module:a.b` and return (owner of b, "b", the raw attribute).

    The raw attribute is the one in the owner's `__dict__` where there is one, so that a
    classmethod or staticmethod is seen as such. Raises ImportError or AttributeError.
    """
    module_name, _, path = target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    value = vars(owner).get(name, None) if hasattr(owner, "__dict__") else None
    return owner, name, value if value is not None else getattr(owner, name)


def imported_symbols() -> set[str]:
    """`module:name` for each `from sglang... import name` in this package."""
    return {symbol for path in PACKAGE_ROOT.rglob("*.py") for symbol in symbols_in(path)}


def symbols_in(path: Path) -> Iterator[str]:
    """Yield `module:name` for each import from SGLang in one source file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (f"{a.name}:" for a in node.names if a.name.split(".")[0] == "sglang")
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            if module.split(".")[0] == "sglang":
                yield from (f"{module}:{alias.name}" for alias in node.names)


def signature_of(target: str) -> str:
    """A comparable description of an SGLang symbol: its signature, or its kind.

    A class is described by its constructor. Default values that are objects are reduced to
    their type, so that addresses do not make two runs differ.
    """
    module_name, _, path = target.partition(":")
    value: Any = importlib.import_module(module_name)
    for name in path.split("."):
        try:
            value = getattr(value, name)
        except AttributeError:  # `from package import submodule`
            value = importlib.import_module(f"{module_name}.{name}")
    while hasattr(value, "__sglang_original__"):  # one that several entries replace
        value = value.__sglang_original__
    if inspect.ismodule(value):
        return "module"
    # How an enumeration is called depends on the version of Python.
    if not callable(value):
        return VALUE
    if isinstance(value, enum.EnumMeta):
        return "enum"
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return f"callable of type {type(value).__name__}"
    return "(" + ", ".join(_parameter(p) for p in signature.parameters.values()) + ")"


def _parameter(parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default is inspect.Parameter.empty:
        return _star(parameter) + parameter.name
    if isinstance(default, (bool, int, float, str, type(None))):
        return f"{parameter.name}={default!r}"
    return f"{parameter.name}=<{type(default).__name__}>"


def _star(parameter: inspect.Parameter) -> str:
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return "*"
    return "**" if parameter.kind is inspect.Parameter.VAR_KEYWORD else ""


def tracked_symbols() -> list[str]:
    """Every SGLang symbol this package depends on, sorted."""
    return sorted({*imported_symbols(), *(entry.target for entry in entries())})


def recorded_signatures() -> dict[str, str]:
    """The signatures of the supported release, as recorded in this package."""
    return json.loads(SIGNATURES_FILE.read_text(encoding="utf-8"))


def current_signatures() -> dict[str, str]:
    """The signatures of the installed SGLang; a symbol that is gone maps to "missing: ..."."""
    found = {}
    for symbol in tracked_symbols():
        try:
            found[symbol] = signature_of(symbol)
        except (ImportError, AttributeError) as error:
            found[symbol] = f"{MISSING}{error}"
    return found


def moved_symbols() -> dict[str, tuple[str, str]]:
    """Each symbol of the installed SGLang that is not as recorded: what was, and what is found.

    What a value is depends on the machine: a name without a kernel for this platform is None, and
    a function elsewhere. It has to be there, no more.
    """
    recorded, current = recorded_signatures(), current_signatures()
    return {
        symbol: (expected, found)
        for symbol, expected in recorded.items()
        if (found := current.get(symbol, expected)) != expected
        and (expected != VALUE or found.startswith(MISSING))
    }


if __name__ == "__main__":
    SIGNATURES_FILE.write_text(json.dumps(current_signatures(), indent=1, sort_keys=True) + "\n")
