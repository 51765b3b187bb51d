"""Lanes: what a machine has to serve, how well, and who says so.

A lane is a file in `ci/lanes`: hardware, model, launch arguments, suites and thresholds. `python -m
ci.lane list|check|run|compare`; docs/lanes.md says how.
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path

from sglang_minimax.errors import MinimaxError

#: Where the lane files are, and the config directories that `check` uses in place of checkpoints.
LANES = Path(__file__).parents[1] / "lanes"
CONFIGS = LANES / "configs"


class LaneError(MinimaxError):
    """A lane file or a result cannot be used; the message says why in one sentence."""


class Exit(IntEnum):
    """How `run` ends. `check` and `compare` use the same numbers."""

    PASS = 0
    FAIL = 1
    COULD_NOT_RUN = 2
    INTERRUPTED = 130  # as shells have it for Ctrl-C
