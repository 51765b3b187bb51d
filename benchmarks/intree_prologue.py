"""The attention prologue as SGLang launches it for MiniMax-M2, as baselines.

What one decode step launches in a layer, between the QKV projection and the attention kernel
(SGLang 0.5.23, CUDA, no environment variable set):

  norm    srt/models/minimax_m2.py, MiniMaxM2QKRMSNorm._forward_naive: q.contiguous(),
          k.contiguous(), one Triton kernel for both sums of squares, at TP > 1 an all-reduce, one
          Triton kernel that applies them into new tensors. Nothing is copied for a single token:
          PyTorch takes one row of a wider matrix for contiguous.
  rotary  srt/layers/rotary_embedding/base.py, RotaryEmbedding.forward_cuda: kernels/ops/attention/
          rope.py, apply_rope_with_cos_sin_cache_inplace on the first 64 dimensions of each head
  store   srt/mem_cache/memory_pool.py, MHATokenToKVPool.set_kv_buffer: kernels/ops/kvcache/
          kvcache.py, store_cache. For an FP8 cache first k.div_(scale), v.div_(scale) and a cast
          of each, five launches in all; Fp8KVCacheMethod gives every layer scale tensors.

The rotary kernel can store K and V as well (fused_args), but only where the rotation is as wide as
a head (csrc/elementwise/rope.cuh checks rope_dim against the stride of a head), so SGLang cannot
use it for this model. `fused_store` runs it with a rotation of all 128 dimensions: another function
of the same traffic, the strongest sequence that could be put together of in-tree's kernels.
The opt-in fused norm (csrc/distributed/tp_qknorm.cuh) refuses a group of one rank and needs its
peers on other GPUs, so it is no baseline of a single one.
"""

from __future__ import annotations

import atexit
import importlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import carry_intree
from benchmarks.prologue_settings import HEAD_DIM, Inputs
from jit_kernels.qk_norm_rope.contract import FP8_TYPES, CacheWrite, Rotation

#: What a baseline leaves: q and k as the attention kernel is given them.
Outcome = tuple[torch.Tensor, torch.Tensor]
Sequence = Callable[[], Outcome]


class NoBaseline(RuntimeError):
    """In-tree's kernels cannot be run here; the message says why."""


@cache
def norm_kernels() -> ModuleType:
    """MiniMax-M2's norm kernels: carried, or taken from the installed SGLang's model file."""
    try:
        return importlib.import_module(carry_intree.NORM_MODULE)
    except ModuleNotFoundError as error:
        if error.name != carry_intree.NORM_MODULE:
            raise NoBaseline(f"the carried norm: {error}") from error
    try:
        # For the life of the process: Triton reads a kernel's source when it first runs.
        folder = Path(tempfile.mkdtemp(prefix="intree-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        carry_intree.write_norm(folder, carry_intree.sglang_root())
    except (carry_intree.Untraceable, OSError, ValueError) as error:
        raise NoBaseline(str(error)) from error
    sys.path.append(str(folder))
    return kernels(carry_intree.NORM_MODULE)


def kernels(name: str) -> Any:
    """A module of in-tree's kernels, installed or carried."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # imports of a large package fail in many ways
        raise NoBaseline(f"{name}: {type(error).__name__}: {error}") from error


def separate(inputs: Inputs) -> Sequence:
    """Norm, then rotary and store where the case has them, as SGLang launches them.

    At TP > 1 the all-reduce is left out, since it needs peers: what remains is this rank's own
    launches, less than SGLang's step takes.
    """
    norm = _norm(inputs)
    rotate = _rope(inputs, fused=False) if inputs.rotation is not None else None
    store = _store(inputs) if inputs.cache is not None else None

    def run() -> Outcome:
        q, k = norm()
        if rotate is not None:
            rotate(q, k)
        if store is not None:
            store(k)
        return q, k

    return run


def fused_store(inputs: Inputs) -> Sequence:
    """Norm, then one kernel for rotary and store; `inputs` must rotate whole heads."""
    if inputs.cache is None or inputs.cache.k_cache.dtype != inputs.k.dtype:
        raise NoBaseline("the fused store writes a cache in the dtype of k alone")
    norm = _norm(inputs)
    rotate = _rope(inputs, fused=True)

    def run() -> Outcome:
        q, k = norm()
        rotate(q, k)
        return q, k

    return run


def _norm(inputs: Inputs) -> Sequence:
    if inputs.setting.device.type != "cuda":
        raise NoBaseline("in-tree's norm kernels are for CUDA")
    found, norm = norm_kernels(), inputs.norm

    def run() -> Outcome:
        q, k = inputs.q.contiguous(), inputs.k.contiguous()
        sums = found.rms_sumsq_serial(q, k)
        tp, eps = inputs.setting.tp, norm.eps
        return found.rms_apply_serial(q, k, norm.q_weight, norm.k_weight, sums, tp, eps)

    return run


def _rope(inputs: Inputs, *, fused: bool) -> Callable[[torch.Tensor, torch.Tensor], None]:
    rope = kernels("sglang.kernels.ops.attention.rope")
    rotation: Rotation | None = inputs.rotation
    assert rotation is not None, "a case without rotation has no rotary kernel"
    tokens, turned = inputs.setting.tokens, rotation.rotary_dim
    arguments = None
    if fused:
        cache: CacheWrite | None = inputs.cache
        assert cache is not None, "a case without cache has no fused store"
        arguments = rope.FusedSetKVBufferArg(
            value=cache.v,
            k_buffer=cache.k_cache.flatten(1),
            v_buffer=cache.v_cache.flatten(1),
            cache_loc=cache.slots,
        )

    def run(q: torch.Tensor, k: torch.Tensor) -> None:
        rope.apply_rope_with_cos_sin_cache_inplace(
            q=q.view(tokens, -1, HEAD_DIM)[..., :turned],
            k=k.view(tokens, -1, HEAD_DIM)[..., :turned],
            cos_sin_cache=rotation.cos_sin_cache,
            positions=rotation.positions,
            is_neox=True,
            fused_args=arguments,
        )

    return run


def _store(inputs: Inputs) -> Callable[[torch.Tensor], None]:
    found = kernels("sglang.kernels.ops.kvcache.kvcache")
    cache: CacheWrite | None = inputs.cache
    assert cache is not None, "a case without cache stores nothing"
    dtype, width = cache.k_cache.dtype, inputs.setting.shard.kv_width
    fp8 = dtype in FP8_TYPES
    # SGLang keeps FP8 buffers as bytes.
    k_cache, v_cache = (x.view(torch.uint8) if fp8 else x for x in (cache.k_cache, cache.v_cache))
    scales = [torch.tensor(x, device=inputs.k.device) for x in (cache.k_scale, cache.v_scale)]

    def run(k: torch.Tensor) -> None:
        v = cache.v
        if fp8:
            k.div_(scales[0])
            v.div_(scales[1])
            k, v = k.to(dtype).view(torch.uint8), v.to(dtype).view(torch.uint8)
        found.store_cache(k.view(-1, width), v, k_cache.flatten(1), v_cache.flatten(1), cache.slots)

    return run


def in_plain_torch(inputs: Inputs) -> Sequence:
    """In-tree's steps and roundings as PyTorch operations, for machines without CUDA.

    In-tree has no such path: its norm kernels are for CUDA, its CPU norm for AMX. Each line is one
    launch above: the same copies, and a rounding to the dtype of q after norm and after rotary.
    """
    norm, rotation, cache = inputs.norm, inputs.rotation, inputs.cache

    def run() -> Outcome:
        q, k = inputs.q.contiguous(), inputs.k.contiguous()
        sums = [x.float().square().sum(-1, keepdim=True) for x in (q, k)]
        q = _scaled(q, sums[0] / norm.q_divisor, norm.q_weight, norm.eps)
        k = _scaled(k, sums[1] / norm.k_divisor, norm.k_weight, norm.eps)
        if rotation is not None:
            angles = rotation.cos_sin_cache.index_select(0, rotation.positions).unsqueeze(1)
            q, k = _turned(q, angles), _turned(k, angles)
        if cache is not None:
            _put(cache.k_cache, cache.slots, k, cache.k_scale)
            _put(cache.v_cache, cache.slots, cache.v, cache.v_scale)
        return q, k

    return run


def _scaled(x: torch.Tensor, mean: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return (x.float() * torch.rsqrt(mean + eps) * weight.float()).to(x.dtype)


def _turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """x [tokens, width] with the leading part of each head turned; angles [tokens, 1, rotary]."""
    heads = x.unflatten(-1, (-1, HEAD_DIM))
    rotary = angles.shape[-1]
    first, second = heads[..., :rotary].float().chunk(2, dim=-1)
    cos, sin = angles.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), heads[..., rotary:]), dim=-1).flatten(-2)


def _put(buffer: torch.Tensor, slots: torch.Tensor, x: torch.Tensor, scale: float) -> None:
    rows = x.unflatten(-1, buffer.shape[1:])
    if buffer.dtype in FP8_TYPES:
        rows = (rows / scale).to(buffer.dtype).view(torch.uint8)
        buffer = buffer.view(torch.uint8)
    buffer[slots] = rows
