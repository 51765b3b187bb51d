"""How a caller gets the fastest implementation of an operator that can serve it, and hears why.

An implementation is a name, `refusal(request)`, which says why it cannot serve a request or None,
and `prepare(request)`, which compiles what it needs (KernelUnavailable with the compiler's message
where that fails) and returns what runs it. An operator lists its implementations fastest first,
its reference, which refuses nothing, last. Where either raises something else, that too only passes
the implementation over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

RequestT = TypeVar("RequestT")
RunT = TypeVar("RunT")


class KernelUnavailable(RuntimeError):
    """An implementation cannot serve the request; the message says why."""


# Without slots: Python 3.11 cannot call Implementation[...] where the class is frozen and has them.
@dataclass(frozen=True)
class Implementation(Generic[RequestT, RunT]):
    """One way to serve a call: a name, a test of a request, and what makes it ready."""

    name: str
    refusal: Callable[[RequestT], str | None]
    prepare: Callable[[RequestT], RunT]


@dataclass(frozen=True)
class Choice(Generic[RunT]):
    """The implementation that serves a request, ready to run, and why it and not a faster one."""

    name: str
    why: str
    run: RunT


def choose(
    operator: str,
    implementations: Sequence[Implementation[RequestT, RunT]],
    request: RequestT,
    prefer: str | None = None,
) -> Choice[RunT]:
    """Return the first of `implementations` that can serve `request`, compiled.

    operator: what messages call it ("attention prologue"). prefer: the name of the only
    implementation to consider. Raises KernelUnavailable where that is unknown, refuses the request
    or does not compile.
    """
    if prefer is not None:
        return _preferred(operator, implementations, request, prefer)
    passed_over: list[str] = []
    for implementation in implementations:
        try:
            run = _ready(implementation, request)
        except KernelUnavailable as error:
            passed_over.append(f"{implementation.name}: {error}")
            continue
        return Choice(implementation.name, "; ".join(passed_over) or "the fastest", run)
    raise KernelUnavailable(f"no implementation of the {operator}: " + "; ".join(passed_over))


def _preferred(
    operator: str,
    implementations: Sequence[Implementation[RequestT, RunT]],
    request: RequestT,
    name: str,
) -> Choice[RunT]:
    known = {implementation.name: implementation for implementation in implementations}
    if name not in known:
        raise KernelUnavailable(f"no {operator} is called {name!r}; known: {', '.join(known)}")
    try:
        return Choice(name, "asked for", _ready(known[name], request))
    except KernelUnavailable as error:
        raise KernelUnavailable(f"the {operator} {name!r} cannot be used: {error}") from error


def _ready(implementation: Implementation[RequestT, RunT], request: RequestT) -> RunT:
    try:
        refusal = implementation.refusal(request)
        if refusal is None:
            return implementation.prepare(request)
    except KernelUnavailable:
        raise
    except Exception as error:  # one that nobody foresaw must not end a server that can do without
        raise KernelUnavailable(one_line(error)) from error
    raise KernelUnavailable(refusal)


def one_line(error: BaseException) -> str:
    """The type of an error and its message. KernelUnavailable is a sentence without its name.

    >>> one_line(ValueError("one\\n  two")), one_line(KernelUnavailable("no nvcc"))
    ('ValueError: one two', 'no nvcc')
    """
    name = "" if isinstance(error, KernelUnavailable) else f"{type(error).__name__}: "
    return " ".join(f"{name}{error}".split())
