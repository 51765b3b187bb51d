"""Whether a lane's weights and KV cache fit its devices, by the arithmetic of `inspect`.

The tensors are those that the config announces, under the names and in the types that are
published; the census of `sglang-minimax inspect` deals them to ranks. No torch, no SGLang.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from sglang_minimax.cli.topology import architecture
from sglang_minimax.config import Architecture
from sglang_minimax.legality import Sizes
from sglang_minimax.loading.census import Census
from sglang_minimax.loading.formats.base import FLOATS
from sglang_minimax.loading.headers import Headers, Tensor, without_collector
from sglang_minimax.loading.names import TensorName
from sglang_minimax.loading.report import Placing, spread
from sglang_minimax.loading.slots import Slot, SlotTable, Stage
from sglang_minimax.topology import Topology, rank_shares

#: Stored in fp32, whatever the model's own type: the router, as published.
IN_FP32 = ("gate", "e_score_correction_bias")
#: Bytes of an element of the KV cache, by the name of --kv-cache-dtype; others are the model's.
KV_BYTES = {"fp8_e4m3": 1, "fp8_e5m2": 1}
BF16_BYTES = 2


@dataclass(frozen=True)
class Fit:
    """Bytes of the fullest rank, and what the lane asks of it.

    static: what SGLang may use for weights and cache. kv_token: bytes of a token on a rank.
    asked: tokens that a rank has to hold, those of its attention-DP group.
    """

    memory: int
    fraction: float
    weights: int
    kv_token: int
    asked: int

    @property
    def static(self) -> int:
        """Bytes for weights and KV cache: mem_fraction_static of the device."""
        return int(self.memory * self.fraction)

    @property
    def room(self) -> int:
        """Tokens that fit beside the weights."""
        return max(0, (self.static - self.weights) // self.kv_token)

    @property
    def complaint(self) -> str | None:
        """Why it does not fit, in one sentence; None where it does."""
        if self.weights >= self.static:
            return (
                f"{self.weights / 1e9:.1f} GB of weights a rank do not fit "
                f"{self.fraction:.3g} of {self.memory / 1e9:.0f} GB; use more ranks."
            )
        if self.room < self.asked:
            return (
                f"{self.room:,} tokens of KV cache fit beside {self.weights / 1e9:.1f} GB of "
                f"weights, and the lane asks for {self.asked:,} a rank; use more ranks, fewer "
                "requests, or an FP8 cache."
            )
        return None


def fit(
    folder: Path,
    sizes: Sizes,
    *,
    memory: int,
    fraction: float,
    kv_dtype: str,
    requests: int,
    context: int,
    dp_lm_head: bool = False,
) -> Fit:
    """The arithmetic for the model of `folder` at `sizes`, which have to be legal.

    memory: bytes of a device. fraction: mem_fraction_static. kv_dtype: as resolved.
    """
    census = census_of(folder)
    placing = Placing(sizes, dp_lm_head)
    shares = rank_shares(census.arch, placing.topology, dp_lm_head=dp_lm_head)
    item = KV_BYTES.get(kv_dtype, BF16_BYTES)
    a_group = -(-requests // sizes.dp)
    return Fit(
        memory=memory,
        fraction=fraction,
        weights=spread(census, placing).most_memory,
        kv_token=item * max(share.kv_elements for share in shares),
        asked=a_group * context,
    )


def census_of(folder: Path) -> Census:
    """The tensors that the config of `folder` announces, judged as a checkpoint's would be."""
    # Models of one shape differ in their context, which has no bearing on tensors.
    return _census(replace(architecture(folder), max_position=1))


@lru_cache(maxsize=4)
def _census(arch: Architecture) -> Census:
    nowhere = Path()
    with without_collector():
        tensors = {
            name: Tensor(nowhere, _type(record, slot), slot.shape, 0)
            for record, slot in _slots(arch)
            for name in _names(record, arch)
        }
        return Census(Headers(tensors), arch)


def _slots(arch: Architecture) -> Iterator[tuple[TensorName, Slot]]:
    whole = Topology()
    stage = Stage.of(arch, whole, rank_shares(arch, whole)[0])
    for record, slots in SlotTable(arch, stage).build().items():
        if not slots[0].stored.optional:
            yield record, slots[0]


def _type(record: TensorName, slot: Slot) -> str:
    """As published: scales and router in fp32, plain weights in bf16, the rest as the format is."""
    types = slot.stored.types
    if len(types) == 1:
        return next(iter(types))
    if slot.stored.scale or record.module in IN_FP32 or not types <= FLOATS:
        return "F32"
    return "BF16"


def _names(record: TensorName, arch: Architecture) -> Iterator[str]:
    layer, module, kind, _, projection = record
    path = "model" if layer is None else f"model.layers.{layer}"
    if module == "experts":
        for expert in range(arch.num_experts):
            yield f"{path}.block_sparse_moe.experts.{expert}.{projection}.{kind}"
    elif module == "gate":
        yield f"{path}.block_sparse_moe.gate.{kind}"
    elif module == "e_score_correction_bias":
        yield f"{path}.block_sparse_moe.{module}"
    elif module.endswith(("_proj", "q_norm", "k_norm")):
        yield f"{path}.self_attn.{module}.{kind}"
    else:
        yield f"{module}.{kind}" if module == "lm_head" else f"{path}.{module}.{kind}"
