"""Who is timed on the attention prologue: our implementations and in-tree's sequences."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from benchmarks import intree_prologue, virtual_prologue
from benchmarks.intree_prologue import NoBaseline, Sequence
from benchmarks.kernel_timing import Work
from benchmarks.prologue_settings import HEAD_DIM, Inputs, Setting, make
from jit_kernels.choice import KernelUnavailable
from jit_kernels.qk_norm_rope import reference
from jit_kernels.qk_norm_rope.contract import (
    ALONE,
    FP8_TYPES,
    Group,
    Request,
)
from jit_kernels.qk_norm_rope.op import choose

CUDA, TRITON, REFERENCE = "cuda", "triton", "reference"
VIRTUAL, NO_EXCHANGE = "cuda, virtual ranks", "cuda, virtual ranks, no exchange"
IN_TREE, FUSED_STORE = "in-tree", "in-tree, fused store"
PLAIN = "in-tree's steps in PyTorch"
BASELINES = (IN_TREE, FUSED_STORE, PLAIN)

#: Compilers side by side, each of a gigabyte or so.
COMPILERS = 8
#: What the table calls a path -> what it is; the JSON has it too.
WHAT = {
    CUDA: "one launch",
    TRITON: "one launch for one rank, else two and no all-reduce between them",
    REFERENCE: "plain PyTorch",
    VIRTUAL: "all ranks of the group in one launch on this one device: not a multi-GPU figure",
    NO_EXCHANGE: "the same grid with the exchange compiled out: wrong sums, for the difference",
    IN_TREE: "what SGLang launches: copies, sum, apply, rotary, store; no all-reduce at TP > 1",
    FUSED_STORE: "in-tree's norm, then its rotary with K/V store; that kernel needs a rotation of "
    "whole heads, so it computes another function and SGLang cannot use it here",
    PLAIN: "in-tree's steps and roundings as PyTorch operations; in-tree itself needs CUDA",
}


class NotTimed(RuntimeError):
    """The path does not serve the setting here; the message says why."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A call ready to be timed. moved: its useful bytes; graph: whether a CUDA graph can hold it.

    error: relative to the reference, of everything that a first call wrote; None where the path
    is wrong on purpose.
    """

    work: Work
    moved: int
    error: float | None
    graph: bool = True


def paths(setting: Setting) -> tuple[str, ...]:
    """Who is timed on a setting."""
    if setting.device.type != "cuda":
        return (REFERENCE, PLAIN)
    ours = (CUDA,) if setting.tp == 1 else (VIRTUAL, NO_EXCHANGE)
    stores = (FUSED_STORE,) if setting.case.cache_dtype is setting.dtype else ()
    return (*ours, TRITON, REFERENCE, IN_TREE, *stores)


def ready(path: str, setting: Setting) -> Ready:
    """Prepare `path` and run it once beside the reference; NotTimed where it cannot be."""
    try:
        if path in (VIRTUAL, NO_EXCHANGE):
            return _virtual(setting, exchange=path == VIRTUAL)
        inputs = make(setting, rotary_dim=HEAD_DIM if path == FUSED_STORE else None)
        work: Sequence = _sequences(path)(inputs)
        return Ready(work, setting.bytes_moved(), error(inputs, work), graph=path != REFERENCE)
    except (KernelUnavailable, NoBaseline) as refusal:
        raise NotTimed(str(refusal)) from refusal


def compile_ahead(wanted: list[tuple[str, Setting]]) -> None:
    """Compile our CUDA kernels side by side; one after another they would take minutes.

    What does not compile says so when it is its turn.
    """
    kernels = {
        (path, request): None
        for path, setting in wanted
        if path in (CUDA, VIRTUAL, NO_EXCHANGE) and setting.device.type == "cuda"
        for request in (setting.request(),)
    }
    if kernels:
        with ThreadPoolExecutor(min(COMPILERS, os.cpu_count() or 1)) as pool:
            list(pool.map(_compile, kernels))


def _compile(kernel: tuple[str, Request]) -> None:
    path, request = kernel
    with suppress(KernelUnavailable):
        if path == CUDA:
            choose(request, prefer=path)
        else:
            virtual_prologue.compiled(request, exchange=path == VIRTUAL)


def _sequences(path: str) -> Callable[[Inputs], Sequence]:
    if path in (IN_TREE, FUSED_STORE, PLAIN):
        return {
            IN_TREE: intree_prologue.separate,
            FUSED_STORE: intree_prologue.fused_store,
            PLAIN: intree_prologue.in_plain_torch,
        }[path]
    return lambda inputs: _ours(path, inputs)


def alone(setting: Setting) -> Group:
    """The group of a rank without its peers: at TP > 1 the all-reduce returns what it is given."""
    return ALONE if setting.tp == 1 else Group(setting.tp, reduce=lambda sums: sums)


def _ours(path: str, inputs: Inputs) -> Sequence:
    """One of the implementations behind the operator."""
    choice = choose(inputs.setting.request(), prefer=path)
    call = inputs.call(alone(inputs.setting))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        choice.run(call)
        return inputs.q, inputs.k

    return run


def _virtual(setting: Setting, *, exchange: bool) -> Ready:
    stacked = virtual_prologue.stack(setting)
    work = virtual_prologue.prepare(stacked, exchange=exchange)
    if not exchange:
        return Ready(work, stacked.bytes_moved(), None)
    right = virtual_prologue.right_answers(stacked)
    work()
    worst = max(difference(*pair) for pair in zip(stacked.ranks, right, strict=True))
    return Ready(work, stacked.bytes_moved(), worst)


def error(inputs: Inputs, work: Sequence) -> float:
    """What `difference` says of one call of `work`, which may leave q and k in new tensors."""
    right = inputs.copied()
    reference.run(right.call(alone(inputs.setting)))
    q, k = work()
    return difference(replace(inputs, q=q, k=k), right)


def difference(got: Inputs, right: Inputs) -> float:
    """The largest relative error of q, k and the rows written to the caches."""
    pairs = [(got.q, right.q), (got.k, right.k)]
    if got.cache is not None and right.cache is not None:
        slots = got.cache.slots
        pairs.append((_rows(got.cache.k_cache, slots), _rows(right.cache.k_cache, slots)))
        pairs.append((_rows(got.cache.v_cache, slots), _rows(right.cache.v_cache, slots)))
    return max(relative(*pair) for pair in pairs)


def _rows(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """[tokens, kv_heads, head_dim] of a cache; FP8 is indexed as bytes."""
    if cache.dtype in FP8_TYPES:
        return cache.view(torch.uint8)[slots].view(cache.dtype)
    return cache[slots]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want| over all elements (2-norms); infinite where either has a NaN."""
    wanted = want.float()
    found = float((got.float() - wanted).norm() / wanted.norm())
    return found if found == found else float("inf")
