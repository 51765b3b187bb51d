"""The exchange plan of a launch: one path to the experts and back, decided before ranks start.

`plan_for` depends on the architecture and the arguments alone, so every rank works out the same.
Which launches there is no plan for is `support.refusals`' answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from sglang_minimax.moe_exchange import backends, rules, rules_runner
from sglang_minimax.moe_exchange.moves import Batch, Move, moves
from sglang_minimax.moe_exchange.paths import SGLANG, Movement, Path, Rows
from sglang_minimax.moe_exchange.payload import Payload
from sglang_minimax.moe_exchange.rules_runner import Runner
from sglang_minimax.topology import Topology

if TYPE_CHECKING:
    from sglang_minimax.config import Architecture
    from sglang_minimax.support import Launch

#: Rows up to which SGLang fuses an all-reduce (layer_boundary/residual/add_norm.py,
#: FUSE_ALLREDUCE_MAX_BATCH_SIZE).
FUSED_ROWS = 2048


class Combine(StrEnum):
    """How the experts' outputs become complete."""

    NONE = "nothing"
    ALL_REDUCE = "all-reduce"
    FUSED = "all-reduce fused with residual add and norm"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_TO_ALL = "all-to-all"


@dataclass(frozen=True, slots=True)
class ExchangePlan:
    """What is decided, and why each of it.

    runner: SGLang's name of the experts' kernels that will run. payload: what travels to the
    experts. prices: what the path costs elsewhere, and what nobody knows of it, one sentence each.
    """

    path: Path
    why: str
    runner: str
    runner_why: str
    combine: Combine
    combine_why: str
    payload: Payload
    prices: tuple[str, ...] = ()

    def layer(self, topology: Topology, batch: Batch, group: int = 0) -> list[Move]:
        """The collectives of a layer, in order, on a rank of an attention-DP group."""
        return moves(topology, self.path, self.payload, batch, group)


def plan_for(arch: Architecture, launch: Launch) -> ExchangePlan:
    """The plan of a launch that `refusals` has nothing against."""
    path, why = rules.choose(arch, launch)
    return _made(arch, launch, path, why)


def default_of_sglang(arch: Architecture, launch: Launch) -> ExchangePlan:
    """What SGLang would do by itself with the same arguments but its backend, to compare with."""
    launch = replace(launch, moe_a2a_backend="none", moe_exchange=None)
    return _made(arch, launch, SGLANG, "SGLang's default")


def _made(arch: Architecture, launch: Launch, path: Path, why: str) -> ExchangePlan:
    runner = rules_runner.runner_of(arch, launch)
    combine, combine_why = _combine(launch, path)
    rows = path.rows
    if path.movement is Movement.SGLANG and gathers_fp4(arch, launch, runner):
        rows = Rows.FP4
    payload = Payload(
        rows, arch.hidden_size, arch.top_k, launch.item_bytes, experts=_physical(arch, launch)
    )
    prices = tuple(rules.prices(launch, path))
    return ExchangePlan(path, why, *runner, combine, combine_why, payload, prices)


def _physical(arch: Architecture, launch: Launch) -> int:
    return arch.num_experts + launch.ep_redundant


def gathers_fp4(arch: Architecture, launch: Launch, runner: Runner) -> bool:
    """Whether SGLang's own exchange gathers FP4 rows.

    Source: srt/layers/moe/utils.py (should_use_flashinfer_cutlass_moe_fp4_allgather).
    """
    return (
        launch.dp > 1
        and launch.ep == launch.dp
        and launch.moe_a2a_backend in rules.FREE
        and runner.name == rules_runner.FI_CUTLASS
        and rules_runner.has_fp4_inputs(arch)
        and not launch.no_fp4_allgather
    )


def _combine(launch: Launch, path: Path) -> tuple[Combine, str]:
    if path.movement is Movement.GATHER:
        return Combine.REDUCE_SCATTER, "sums go to the rows' owners only, padded alike or not"
    if path.movement is Movement.ALL_TO_ALL:
        return Combine.ALL_TO_ALL, "outputs go back to the rows' owners, who add them up"
    if path.movement is Movement.BACKEND:
        return Combine.ALL_TO_ALL, f"inside the kernels of {path.backend}"
    if launch.tp == 1:
        return Combine.NONE, "one rank has complete sums"
    if launch.dp > 1:
        if launch.tp == launch.dp == launch.ep:
            return Combine.REDUCE_SCATTER, "a rank for each attention-DP group and EP group"
        return (
            Combine.REDUCE_SCATTER,
            "where SGLang pads all groups alike; elsewhere an all-reduce, of which it keeps a part",
        )
    fused, fusion_why = backends.fusion_after_experts(launch)
    if not fused:
        return Combine.ALL_REDUCE, fusion_why
    return Combine.FUSED, f"{fusion_why}, up to {FUSED_ROWS} rows; not measured for MiniMax-M2"
