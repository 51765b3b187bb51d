"""What ends a run of a suite."""

from __future__ import annotations

from sglang_minimax.errors import MinimaxError


class AccuracyError(MinimaxError):
    """A suite cannot begin or go on; the message says why in one sentence."""


class RequestsFailed(AccuracyError):
    """Some questions have no answer, so there is no accuracy. failed, asked: how many."""

    def __init__(self, message: str, failed: int, asked: int) -> None:
        super().__init__(message)
        self.failed, self.asked = failed, asked
