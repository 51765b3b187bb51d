"""The ways from attention to the experts and back, by the names that operators use.

A path is how rows move, and in which form they travel:

  sglang       SGLang's own: every rank of the stage sees the rows of all, and outputs are summed
  gather       ours: a rank routes its own rows, which are gathered with their ids and weights;
               the outputs are summed and scattered to the rows' owners in one reduce-scatter
  all-to-all   ours, over torch.distributed: a row goes to the ranks that hold its experts
  backend      SGLang's dispatcher for --moe-a2a-backend: DeepEP and its like
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

#: SGLang's name for an exchange that is not its own (MoeA2ABackend.CUSTOMIZED): ours run behind it.
CUSTOMIZED = "customized"


class Movement(StrEnum):
    """How rows get to the experts and back."""

    SGLANG = "sglang"
    GATHER = "gather"
    ALL_TO_ALL = "all-to-all"
    BACKEND = "backend"


class Rows(StrEnum):
    """In which form rows travel to the experts. Outputs come back in the model's dtype."""

    PLAIN = "plain"
    FP8 = "fp8"
    FP4 = "fp4"


@dataclass(frozen=True, slots=True)
class Path:
    """A way to the experts and back. `backend` names SGLang's where the movement is BACKEND."""

    movement: Movement
    rows: Rows = Rows.PLAIN
    backend: str = ""

    @property
    def name(self) -> str:
        """As in SGLANG_MINIMAX_MOE: "gather-fp8"; SGLang's name for its backends."""
        if self.movement is Movement.BACKEND:
            return self.backend
        suffix = "" if self.rows is Rows.PLAIN else f"-{self.rows}"
        return f"{self.movement}{suffix}"

    @property
    def is_ours(self) -> bool:
        """Whether our dispatcher moves the rows, behind SGLang's backend CUSTOMIZED."""
        return self.movement in (Movement.GATHER, Movement.ALL_TO_ALL)


SGLANG = Path(Movement.SGLANG)
#: What SGLANG_MINIMAX_MOE can ask for, by name.
FORCEABLE = {
    path.name: path
    for path in (
        SGLANG,
        *(Path(Movement.GATHER, rows) for rows in Rows),
        *(Path(Movement.ALL_TO_ALL, rows) for rows in (Rows.PLAIN, Rows.FP8)),
    )
}
