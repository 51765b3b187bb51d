"""What a function returns in a process of its own, since SGLang's state is global."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from sglang_minimax.validation.engine_process import preload


def forked(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns, or raises, in a fork with SGLang loaded."""
    preload()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def child() -> None:
        try:
            there.send(function(*arguments))
        except BaseException as error:
            there.send(error)

    process = context.Process(target=child)
    process.start()
    assert here.poll(120), "no answer"
    answer = here.recv()
    process.join()
    if isinstance(answer, BaseException):
        raise answer
    return answer
