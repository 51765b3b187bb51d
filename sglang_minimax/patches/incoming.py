"""Weights that a call brings, in whatever form, as (name, tensor) pairs, or a LoadError.

What comes here was written by a client: nothing of it is taken for granted.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.model_executor.model_runner_components.weight_updater import LocalSerializedTensor
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

from sglang_minimax.errors import LoadError

Pairs = list[tuple[str, torch.Tensor]]

BUCKET = "flattened_bucket"
DIRECT = "direct"
TENSOR_FORMATS = (None, DIRECT, BUCKET)
GROUP_FORMATS = (None, BUCKET)
# Those of SGLang's default loader that read safetensors, each rank by itself: one that fails must
# not leave others in a collective, as with fastsafetensors and instanttensor.
DISK_FORMATS = ("auto", "safetensors")


def check_format(load_format: Any, known: tuple[Any, ...]) -> None:
    """Raise LoadError for a format whose tensors cannot be judged before they are written."""
    if load_format not in known:
        choices = ", ".join("none" if name is None else name for name in known)
        raise LoadError(
            f"load_format {load_format!r} of a weight update cannot be checked before it is "
            f"written; use one of: {choices}."
        )


def from_payload(payload: Any, load_format: str | None, rank: int) -> Pairs:
    """The tensors of one rank's deserialised payload. Raises LoadError.

    payload: (name, tensor) pairs, or a bucket: {"flattened_tensor", "metadata"}.
    rank: whose share of a tensor that was serialised for each rank apart.
    """
    if load_format == BUCKET:
        return _sound(_unpacked(payload))
    if not isinstance(payload, (list, tuple)):
        raise LoadError(f"a weight update must bring a list of pairs, not a {_kind(payload)}.")
    return _sound([_own_share(pair, rank) for pair in payload])


def _own_share(pair: Any, rank: int) -> Any:
    if isinstance(pair, (list, tuple)) and len(pair) == 2:
        name, tensor = pair
        if isinstance(tensor, LocalSerializedTensor):
            if not 0 <= rank < len(tensor.values):
                raise LoadError(f"{name} has {len(tensor.values)} shares, none for rank {rank}.")
            return name, tensor.get(rank)
    return pair


def _unpacked(payload: Any) -> list[Any]:
    try:
        flat, metadata = payload["flattened_tensor"], payload["metadata"]
        for entry in metadata:
            lies = (entry.start_idx, entry.end_idx)
            size = torch.Size(entry.shape).numel() * entry.dtype.itemsize
            if not 0 <= lies[0] <= lies[1] <= flat.numel() or lies[1] - lies[0] != size:
                raise LoadError(
                    f"{entry.name} is {list(entry.shape)} of {entry.dtype}, {size} bytes, but lies "
                    f"at {lies[0]} to {lies[1]} of a bucket of {flat.numel()}."
                )
        return FlattenedTensorBucket(flattened_tensor=flat, metadata=metadata).reconstruct_tensors()
    except (TypeError, KeyError, AttributeError, RuntimeError, ValueError) as error:
        raise LoadError(f"the bucket of a weight update is not in order: {error}.") from error


def _sound(pairs: list[Any]) -> Pairs:
    """The pairs, all of them a name and a tensor with data."""
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise LoadError(f"a weight update must bring (name, tensor) pairs, not {pair!r:.80}.")
        name, tensor = pair
        if not isinstance(tensor, torch.Tensor):
            raise LoadError(f"{name} is a {_kind(tensor)}, expected a tensor.")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise LoadError(f"{name} is {tensor.layout} on {tensor.device}, expected dense data.")
    return [(name, tensor) for name, tensor in pairs]


def from_announcement(names: list[str], dtypes: list[Any], shapes: list[list[int]]) -> Pairs:
    """Announced tensors on the meta device. Raises LoadError where they cannot be received."""
    if not len(names) == len(dtypes) == len(shapes) or not names:
        raise LoadError(
            f"the call announces {len(names)} names, {len(dtypes)} types and {len(shapes)} shapes; "
            "each tensor needs one of each, and there must be one at least."
        )
    pairs = []
    for name, kind, shape in zip(names, dtypes, shapes, strict=True):
        dtype = kind if isinstance(kind, torch.dtype) else getattr(torch, str(kind), None)
        if not isinstance(dtype, torch.dtype):
            raise LoadError(f"{name} is announced as {kind!r}, which is no type of torch.")
        if any(not isinstance(size, int) or size < 0 for size in shape):
            raise LoadError(f"{name} is announced as {shape}, which is no shape.")
        pairs.append((name, torch.empty(shape, dtype=dtype, device="meta")))
    return pairs


def _kind(value: Any) -> str:
    return type(value).__name__
