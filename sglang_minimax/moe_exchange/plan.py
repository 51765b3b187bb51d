"""The exchange plan of a launch: one path to the experts and back, decided before ranks start."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sglang_minimax.config import Architecture
from sglang_minimax.moe_exchange.paths import FORCEABLE, SGLANG, Movement, Path, Rows
from sglang_minimax.moe_exchange.payload import Payload
from sglang_minimax.support import Launch


class Combine(StrEnum):
    """How the experts' outputs become complete."""

    ALL_REDUCE = "all-reduce"
    FUSED = "all-reduce fused with residual add and norm"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_TO_ALL = "all-to-all"


@dataclass(frozen=True, slots=True)
class ExchangePlan:
    """What is decided. runner: SGLang's name of the experts' kernels that will run."""

    path: Path
    why: str
    runner: str
    combine: Combine
    payload: Payload


def plan_for(arch: Architecture, launch: Launch) -> ExchangePlan:
    """The plan of a launch that `refusals` has nothing against."""
    path, why = SGLANG, "every rank has all rows without attention DP"
    if launch.moe_exchange is not None:
        path, why = FORCEABLE[launch.moe_exchange], "asked for"
    elif launch.dp > 1:
        rows = Rows.FP8 if arch.expert_unit == 128 else Rows.PLAIN
        path, why = Path(Movement.GATHER, rows), "attention DP"
    combine = Combine.ALL_REDUCE if path is SGLANG else Combine.REDUCE_SCATTER
    payload = Payload(path.rows, arch.hidden_size, arch.top_k)
    return ExchangePlan(path, why, "triton", combine, payload)
