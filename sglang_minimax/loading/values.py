"""What torch knows of a tensor that headers do not: its values; and how headers spell its type."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import torch

from sglang_minimax.loading.formats.base import StoredTensor
from sglang_minimax.loading.ledger import Placement

#: Types of the safetensors format. One that is not here has no parameter to go to.
TYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SPELLED = {dtype: name for name, dtype in TYPES.items()}


def spelled(dtype: torch.dtype) -> str:
    """How a header spells a type; torch's own name for one that headers do not have."""
    return _SPELLED.get(dtype, str(dtype))


def header_type(tensor: torch.Tensor) -> str:
    """How a header would spell the type of `tensor`."""
    return spelled(tensor.dtype)


def invalid_values(
    stored: StoredTensor, tensor: torch.Tensor, matrix: tuple[int, int] = (0, 0)
) -> str | None:
    """What is wrong with the values of a tensor; None where nothing is, or they are not there.

    matrix: rows and columns, for a tensor that must say the same.
    """
    if not stored.judged or tensor.is_meta or not tensor.numel():
        return None
    if stored.dimensions:
        said = tensor.flatten().tolist()
        return None if said == list(matrix) else f"says {said}, expected {list(matrix)}"
    if stored.only is not None and not bool((tensor == stored.only).all()):
        return f"has other values than {stored.only}, which SGLang's kernels take for granted"
    if not stored.scale:
        return None
    if tensor.dtype == torch.uint8:  # powers of two as exponents: 255 is NaN, nothing is zero
        return "has scales that are NaN" if bool((tensor == 255).any()) else None
    low, high = torch.aminmax(tensor.float())
    # A NaN makes every comparison false.
    enough = low >= 0 if stored.zero_ok else low > 0
    if enough and high < float("inf"):
        return None
    least = "of at least 0" if stored.zero_ok else "above 0"
    return f"has scales from {low.item()} to {high.item()}, expected finite numbers {least}"


class SharedValues:
    """Compares what several matrices write to one parameter, of which SGLang keeps the last."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, int | None], tuple[str, bytes]] = {}

    def conflict(self, name: str, placement: Placement, held: torch.Tensor) -> str | None:
        """How tensor `name` differs from one before it; None where it does not, or may.

        held: the box of the placement.
        """
        slot = placement.slot
        # One number for each of q, k and v has room for each; w1 and w3 share theirs.
        roomy = slot.stored.shared and not slot.stored.axes and not slot.experts
        alone = slot.shard is None or roomy
        if not slot.stored.equal or alone or held.is_meta:
            return None
        values = held.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = blake2b(values.tobytes()).digest()
        key = (slot.parameter, placement.record.expert)
        first, before = self._first.setdefault(key, (name, digest))
        if digest == before:
            return None
        return f"differs from {first}, but SGLang has one {slot.stored.kind} for both"
