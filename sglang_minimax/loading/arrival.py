"""Did every expert of this rank arrive? A mark in each slice, which loading must overwrite.

SGLang's expert loader finds out by itself whether this rank holds an expert, and returns without a
word where it thinks not. So before the first load one element of each (expert, projection) slice is
set to a NaN of all ones, a value that no sound checkpoint has, and after it none may be left. The
cost does not depend on the size of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from sglang_minimax.loading.slots import Slots

# All ones are a NaN in these.
MARKABLE = frozenset(
    {torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2}
)
MARKED_KINDS = frozenset({"weight", "weight_scale_inv"})
ALL_ONES = 0xFF

Parameters = Mapping[str, torch.nn.Parameter]


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """What one rank holds of each layer's experts: how many, and how many rows of w1 and w3."""

    experts: int
    rows: int


class Arrival:
    """The marks in one rank's expert parameters."""

    def __init__(self, slots: Slots) -> None:
        """Take note of the expert slots; nothing is written yet."""
        self._places = [
            (slot.parameter, slot.shard)
            for name, group in slots.items()
            for slot in group
            if slot.experts and name.kind in MARKED_KINDS
        ]

    def lacking(self, parameters: Parameters, share: ExpertShare, hidden: int) -> Iterator[str]:
        """Expert weights with less room than this rank's share; padding may make them larger."""
        for name in dict.fromkeys(name for name, _ in self._places if name.endswith("_weight")):
            parameter = parameters.get(name)
            if parameter is None or parameter.dtype not in MARKABLE:
                continue
            matrices = 2 if name.endswith("w13_weight") else 1
            wanted = share.experts * matrices * share.rows * hidden
            if parameter.shape[0] != share.experts or parameter.numel() < wanted:
                yield (
                    f"{name} is {list(parameter.shape)}, expected {share.experts} experts with "
                    f"{wanted} elements"
                )

    def mark(self, parameters: Parameters) -> None:
        """Set one element of every slice to all ones; destroys what is there."""
        for _, _, slices in self._slices(parameters):
            slices.fill_(ALL_ONES)

    def untouched(self, parameters: Parameters) -> Iterator[str]:
        """The slices whose mark is still there, after a load."""
        for name, shard, slices in self._slices(parameters):
            left = slices.eq(ALL_ONES).all(dim=-1).nonzero().flatten().tolist()
            for expert in left:
                yield f"{shard} of local expert {expert} in {name} (nothing was written, or NaN)"

    def _slices(self, parameters: Parameters) -> Iterator[tuple[str, str | None, torch.Tensor]]:
        """(parameter, projection, the bytes [experts, bytes] of the first element of its slices).

        w1 begins a packed parameter, w3 its second half (or the other way round).
        """
        for name, shard in self._places:
            parameter = parameters.get(name)
            if parameter is None or parameter.is_meta or parameter.dtype not in MARKABLE:
                continue
            data = parameter.data
            if data.dim() != 3 or not data.is_contiguous():
                continue
            row = data.shape[1] // 2 if shard == "w3" else 0
            yield name, shard, data.view(torch.uint8)[:, row, : data.element_size()]
