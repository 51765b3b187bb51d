"""Memory of one device that all ranks of a group can address: one adapter over PyTorch's module.

`torch.distributed._symmetric_memory` is private and has moved: this is the only place that touches
it, and it uses what releases 2.11 and 2.14 share. What differs, and what we do about it:

* the group: 2.11 takes its name, 2.14 a name or the group. We pass the name.
* `enable_symm_mem_for_group`: needed before 2.9, deprecated in 2.14. We never call it.
* `empty`: newer releases cut tensors out of a pool, so that a handle's `buffer_ptrs` may be those
  of a whole block and `offset` the tensor's place in it. We add the offset where our own address
  shows that it is needed.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch

MODULE = "torch.distributed._symmetric_memory"


class SymmetricMemoryUnavailable(RuntimeError):
    """The ranks cannot address each other's memory; one sentence that says why."""


@dataclass(frozen=True)
class SharedBuffer:
    """One rank's end of a buffer that exists on every rank of a group.

    local: this rank's tensor, on the device. pointers: for each rank in order of the group, the
    address of its buffer as this process sees it. handle: keeps the mappings alive.
    """

    local: torch.Tensor
    pointers: tuple[int, ...]
    handle: Any


def _module() -> Any:
    return importlib.import_module(MODULE)


def unavailable(device: torch.device) -> str:
    """Why this process cannot take part, before anything is allocated; empty where it can."""
    if device.type != "cuda":
        return f"symmetric memory needs CUDA devices, this rank computes on {device.type}"
    if torch.version.hip is not None:
        return "symmetric memory is used on NVIDIA devices only, this is a ROCm build of PyTorch"
    try:
        module = _module()
    except Exception as error:  # whatever a private module may raise while it is imported
        return f"PyTorch {torch.__version__} has no symmetric memory ({error})"
    missing = [name for name in ("empty", "rendezvous") if not hasattr(module, name)]
    if missing:
        return f"symmetric memory of PyTorch {torch.__version__} has no {' and no '.join(missing)}"
    return ""


def allocate(size: int, device: torch.device) -> torch.Tensor:
    """[size] bytes on the device, uninitialised, that can be shared. Local: no rank waits."""
    module = _module()
    return module.empty(size, dtype=torch.uint8, device=device)


def share(local: torch.Tensor, group: Any) -> SharedBuffer:
    """Exchange addresses with the other ranks. Collective; blocks the host until all have called.

    local: from `allocate`, of one size on all ranks. group: a torch.distributed ProcessGroup.
    Raises SymmetricMemoryUnavailable where there is no direct path (no NVLink or P2P access).
    """
    module = _module()
    try:
        handle = module.rendezvous(local, group.group_name)
    except Exception as error:  # CUDA errors, store time-outs: whatever the driver says
        raise SymmetricMemoryUnavailable(f"sharing a buffer failed ({error})") from error
    if handle is None:
        raise SymmetricMemoryUnavailable("PyTorch did not take the buffer for symmetric memory")
    return SharedBuffer(local, _addresses(local, handle, group.size(), group.rank()), handle)


def _addresses(local: torch.Tensor, handle: Any, size: int, rank: int) -> tuple[int, ...]:
    blocks = [int(pointer) for pointer in handle.buffer_ptrs]
    if len(blocks) != size or handle.rank != rank:
        raise SymmetricMemoryUnavailable(
            f"PyTorch shared the buffer as rank {handle.rank} of {len(blocks)}, "
            f"this is rank {rank} of {size}"
        )
    if not all(blocks):
        raise SymmetricMemoryUnavailable("a peer's buffer has no address on this device")
    offset = local.data_ptr() - blocks[rank]
    # A tensor inside a block: the same place in each, since all ranks allocate alike.
    if offset not in (0, getattr(handle, "offset", 0)):
        raise SymmetricMemoryUnavailable(
            f"the buffer lies {offset} bytes into its block, PyTorch says {handle.offset}"
        )
    return tuple(block + offset for block in blocks)
