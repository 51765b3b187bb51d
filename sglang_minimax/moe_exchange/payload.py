"""What travels with a token to its experts: one row of bytes, and where each part of it lies.

Ids and weights travel with the row, so that the router sees it before it is rounded, and so that
one collective carries everything. The numbers of a quantised row are those of the runner's kernels:

  fp8   e4m3, a scale for each 128 columns: fp32, or a power of two in one byte (ue8m0)
  fp4   e2m1, two to a byte, an e4m3 scale for each 16 columns under one global scale
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_minimax.moe_exchange.paths import Rows
from sglang_minimax.shards import exact_div

#: Columns that share a scale.
FP8_GROUP = 128
FP4_BLOCK = 16
#: Bytes of an expert's id and of its weight: int32 and fp32, as SGLang's TopK has them.
CHOICE_BYTES = 8
#: Parts begin at multiples of so many bytes, so that they can be read in their own type.
ALIGNMENT = 4


@dataclass(frozen=True, slots=True)
class Payload:
    """The parts of one row, in this order: values, scales, ids, weights.

    values, scales: bytes. top_k: experts a token, of `experts`. Raises TopologyError where columns
    do not come in whole groups.
    """

    rows: Rows
    hidden: int
    top_k: int
    item_bytes: int = 2
    scale_bytes: int = 4
    experts: int = 256

    @property
    def values(self) -> int:
        """Bytes of the row itself."""
        if self.rows is Rows.FP8:
            return self.hidden
        if self.rows is Rows.FP4:
            return exact_div(self.hidden, 2, "columns over columns a byte")
        return self.hidden * self.item_bytes

    @property
    def groups(self) -> int:
        """Scales of a row, 0 for a plain one."""
        if self.rows is Rows.FP8:
            return exact_div(self.hidden, FP8_GROUP, "columns over columns a scale")
        if self.rows is Rows.FP4:
            return exact_div(self.hidden, FP4_BLOCK, "columns over columns a scale")
        return 0

    @property
    def scales(self) -> int:
        """Bytes of the scales, without what aligns the next part."""
        return self.groups * (1 if self.rows is Rows.FP4 else self.scale_bytes)

    @property
    def ids_at(self) -> int:
        """Where the ids begin; the weights follow them."""
        return -(-(self.values + self.scales) // ALIGNMENT) * ALIGNMENT

    @property
    def bytes(self) -> int:
        """Bytes of everything that travels to the experts for one token."""
        return self.ids_at + self.top_k * CHOICE_BYTES
