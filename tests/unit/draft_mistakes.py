"""Plausible mistakes for the tests of drafts: a function with one piece of its text replaced."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any


def mistaken(function: Callable[..., Any], right: str, wrong: str) -> Callable[..., Any]:
    """`function` with `wrong` in place of `right`, among the names of its own module."""
    text = textwrap.dedent(inspect.getsource(function))
    assert text.count(right) == 1, f"{right!r} is not there once"
    names = dict(vars(sys.modules[function.__module__]))
    exec(compile(text.replace(right, wrong), "<mistake>", "exec"), names)
    return names[function.__name__]
