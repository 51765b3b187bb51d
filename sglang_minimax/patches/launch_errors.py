"""A user's mistake at launch is one sentence and an exit status, not a stack trace a rank."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from sglang_minimax.errors import MinimaxError

logger = logging.getLogger(__name__)

#: What a scheduler process exits with after it has said what is wrong (EX_CONFIG of sysexits.h).
LAUNCH_REFUSED = 78


def one_sentence(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `Scheduler.__init__`: the sentence of a MinimaxError, then exit LAUNCH_REFUSED.

    SystemExit passes through SGLang's `except Exception`, which would print a trace and signal
    the parent; the engine notices the closed pipe instead and goes through `stop_quietly`. A
    data-parallel controller does not look at its pipes, so under one SGLang's way is kept.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(self, *args, **kwargs)
        except MinimaxError as error:
            if not error.is_told_elsewhere:
                logger.error("%s", error)
            if under_controller():
                raise
            raise SystemExit(LAUNCH_REFUSED) from error

    return __init__


def under_controller() -> bool:
    """Whether this scheduler answers to a data-parallel controller instead of the engine."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().num_dp_ranks > 1


def stop_quietly(
    original: Callable[[int, Any], RuntimeError],
) -> Callable[[int, Any], RuntimeError]:
    """Wrap `_scheduler_died_error(rank, proc)`: no trace when the rank has said it all."""

    @functools.wraps(original)
    def _scheduler_died_error(rank: int, proc: Any) -> RuntimeError:
        error = original(rank, proc)
        if proc.exitcode == LAUNCH_REFUSED:
            raise SystemExit("sglang-minimax: the server was not started; see the error above.")
        return error

    return _scheduler_died_error
