"""The portable implementation of the attention prologue: Triton, on any GPU that it compiles for.

One launch where the group is one rank, otherwise two around the group's all-reduce: the sums of
squares, [tokens, 2], and everything else. q, k and v are read where they lie: any row stride, any
alignment, any head count. The kernels are in `triton_kernels`; with TRITON_INTERPRET=1 set before
Triton is imported they run interpreted, on the CPU. Not yet run on hardware.
"""

from __future__ import annotations

import importlib
import importlib.util
import struct
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from jit_kernels.choice import KernelUnavailable
from jit_kernels.qk_norm_rope.contract import (
    FP8_TYPES,
    CacheWrite,
    Call,
    Group,
    Norm,
    Request,
    Rotation,
)

NAME = "triton"

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Bits of the mantissa, bias of the exponent.
FP8_FORMATS = {torch.float8_e4m3fn: (3, 7), torch.float8_e5m2: (2, 15)}
# What a program may hold of q, heads padded to a power of two: 32 values in each of 1024 threads.
LARGEST_ROW = 32768
# Values of q a thread, and warps that are enough for a program. Chosen by reasoning, not measured:
# two 16-byte vectors a thread, until the registers of 8 warps are what a program takes.
VALUES_A_THREAD = 16
MOST_WARPS = 8


def refusal(request: Request) -> str | None:
    """Why Triton cannot serve `request`, in one sentence, or None."""
    if request.dtype not in DTYPES:
        return f"the Triton kernel takes bf16, fp16 and fp32, not {request.dtype}"
    if request.cache_dtype not in (None, request.dtype, *FP8_TYPES):
        return f"a cache of {request.cache_dtype} cannot hold {request.dtype}"
    if request.rotary_dim % 2 or request.rotary_dim > request.head_dim:
        return (
            f"{request.rotary_dim} rotated dimensions do not fit heads of {request.head_dim} "
            "in pairs"
        )
    row = _power_of_two(request.q_heads) * _power_of_two(request.head_dim)
    if row > LARGEST_ROW:
        return (
            f"{request.q_heads} query heads of {request.head_dim} take {row} padded values, where "
            f"a program of the Triton kernel holds {LARGEST_ROW}"
        )
    return _device_refusal(request)


def _device_refusal(request: Request) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if request.device == "cpu":
        return None if _interpreted() else "Triton runs on a CPU only with TRITON_INTERPRET=1 set"
    # ROCm devices are called "cuda" as well, and have no compute capability.
    if request.device != "cuda":
        return f"the Triton kernel does not know the device {request.device!r}"
    if request.capability is not None and request.capability < (8, 0):
        major, minor = request.capability
        return f"Triton needs compute capability 8.0, this device has {major}.{minor}"
    return None


def _interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter: settled when they are first imported."""
    import triton

    return not isinstance(_kernels().prologue_kernel, triton.JITFunction)


def _kernels() -> ModuleType:
    """The kernels, imported only now: Triton may be missing, and takes its time to import."""
    return importlib.import_module("jit_kernels.qk_norm_rope.triton_kernels")


def prepare(request: Request) -> Callable[[Call], None]:
    """Compile the usual variant for `request` and return what serves its calls.

    The usual variant has aligned, packed rows, int64 indices and a padding slot; others compile
    when first used.
    Raises KernelUnavailable with the compiler's message. Interpreted, nothing is compiled.
    """
    kernels = _kernels()

    def run(call: Call) -> None:
        _check_request(request, call)
        if not call.tokens:
            return
        grid = (call.tokens,)
        # Triton launches on the current device; this does nothing where that is the tensors'.
        with torch.cuda.device_of(call.q):
            if call.group.size == 1:
                kernels.prologue_kernel[grid](**prologue_arguments(request, call, call.q))
                return
            assert call.group.reduce is not None
            sums = torch.empty(call.tokens, 2, dtype=torch.float32, device=call.q.device)
            kernels.sums_kernel[grid](**sums_arguments(call, sums))
            sums = call.group.reduce(sums).contiguous()
            kernels.prologue_kernel[grid](**prologue_arguments(request, call, sums))

    if not _interpreted():
        _compile(request)
    return run


def _check_request(request: Request, call: Call) -> None:
    """Raise ValueError where `call` is not of the shape that was prepared."""
    problem = ""
    widths = call.q.shape[1], call.k.shape[1]
    if widths != (request.q_width, request.kv_width):
        problem = f"rows of {widths} where {(request.q_width, request.kv_width)} were prepared for"
    elif call.rotation is not None and call.rotation.head_dim != request.head_dim:
        problem = f"heads of {call.rotation.head_dim} where {request.head_dim} was prepared for"
    elif call.group.size > 1 and call.group.reduce is None:
        problem = f"a group of {call.group.size} ranks needs an all-reduce"
    if problem:
        raise ValueError(f"qk_norm_rope_ ({NAME}): {problem}")


def _compile(request: Request) -> None:
    """Compile both kernels as `run` would launch them for packed rows, without launching."""
    kernels = _kernels()
    call = usual_call(request)
    sums = torch.empty(1, 2, device="meta")
    try:
        if request.group_size > 1:
            kernels.sums_kernel.warmup(grid=(1,), **sums_arguments(call, sums))
        kernels.prologue_kernel.warmup(grid=(1,), **prologue_arguments(request, call, sums))
    except Exception as error:  # Triton, LLVM and ptxas each have their own
        raise KernelUnavailable(f"Triton does not compile the kernel: {error}") from error


def usual_call(request: Request) -> Call:
    """A call of one token as a layer makes it, on the meta device: packed rows, int64 indices."""
    width, kv_width = request.q_width, request.kv_width

    def empty(*shape: int, dtype: torch.dtype = request.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, k, v = empty(1, width + 2 * kv_width).split([width, kv_width, kv_width], dim=-1)
    # The divisors are run-time arguments: any will do.
    norm = Norm(empty(width), empty(kv_width), width, kv_width, 1e-6)
    index = empty(1, dtype=torch.int64)
    rotation = cache = None
    if request.rotary_dim:
        angles = empty(1, request.rotary_dim, dtype=torch.float32)
        rotation = Rotation(index, angles, request.head_dim)
    if request.cache_dtype is not None:
        buffer = empty(1, request.kv_heads, request.head_dim, dtype=request.cache_dtype)
        cache = CacheWrite(v, buffer, buffer, index, first_slot=1)
    return Call(q, k, norm, Group(request.group_size), rotation, cache)


def sums_arguments(call: Call, sums: torch.Tensor) -> dict[str, Any]:
    """The arguments of `sums_kernel`, which writes this rank's sums to `sums` [tokens, 2] fp32."""
    return {
        "q": call.q,
        "k": call.k,
        "sums": sums,
        "q_stride": call.q.stride(0),
        "k_stride": call.k.stride(0),
        "Q_WIDTH": call.q.shape[1],
        "KV_WIDTH": call.k.shape[1],
        "num_warps": _warps(call.q.shape[1]),
    }


def prologue_arguments(request: Request, call: Call, sums: torch.Tensor) -> dict[str, Any]:
    """The arguments of `prologue_kernel`. sums: of the group, not looked at where it is one rank.

    A tensor that a variant does not use is q: its type must be the same in every such call.
    """
    unused = call.q
    rotation, norm = call.rotation, call.norm
    return {
        "q": call.q,
        "k": call.k,
        "q_weight": norm.q_weight,
        "k_weight": norm.k_weight,
        "sums": sums,
        "positions": unused if rotation is None else rotation.positions,
        "cos_sin": unused if rotation is None else rotation.cos_sin_cache,
        "q_stride": call.q.stride(0),
        "k_stride": call.k.stride(0),
        "q_divisor": float(norm.q_divisor),
        "k_divisor": float(norm.k_divisor),
        "eps": norm.eps,
        "Q_HEADS": request.q_heads,
        "KV_HEADS": request.kv_heads,
        "HEAD_DIM": request.head_dim,
        "ROTARY_DIM": 0 if rotation is None else rotation.rotary_dim,
        "ALONE": call.group.size == 1,
        "num_warps": _warps(_power_of_two(request.q_heads) * _power_of_two(request.head_dim)),
        **_cache_arguments(call.cache, unused),
    }


def _cache_arguments(cache: CacheWrite | None, unused: torch.Tensor) -> dict[str, Any]:
    if cache is None:
        strides = ("v", "k_page", "k_slot", "v_page", "v_slot")
        return {
            **dict.fromkeys(("v", "k_cache", "v_cache", "slots"), unused),
            **dict.fromkeys((f"{name}_stride" for name in strides), 0),
            **dict.fromkeys(("k_scale", "v_scale"), 1.0),
            "first_slot": 0,
            **dict.fromkeys(("PAGE_SIZE", "MANTISSA", "BIAS", "LARGEST"), 0),
        }
    paged = cache.k_cache.dim() == 4
    fp8 = FP8_FORMATS.get(cache.k_cache.dtype)
    buffers = (cache.k_cache, cache.v_cache)
    # The kernel writes the bits of an FP8 value itself.
    k_cache, v_cache = (buffer.view(torch.uint8) if fp8 else buffer for buffer in buffers)
    mantissa, bias = fp8 or (0, 0)
    return {
        "v": cache.v,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slots": cache.slots,
        "v_stride": cache.v.stride(0),
        "k_page_stride": k_cache.stride(0),
        "k_slot_stride": k_cache.stride(1) if paged else 0,
        "v_page_stride": v_cache.stride(0),
        "v_slot_stride": v_cache.stride(1) if paged else 0,
        "k_scale": float(cache.k_scale),
        "v_scale": float(cache.v_scale),
        "first_slot": cache.first_slot,
        "PAGE_SIZE": cache.k_cache.shape[1] if paged else 1,
        "MANTISSA": mantissa,
        "BIAS": bias,
        "LARGEST": _fp32_bits(torch.finfo(cache.k_cache.dtype).max) if fp8 else 0,
    }


def _fp32_bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def _power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()


def _warps(values: int) -> int:
    """Warps for a program that holds `values` of q."""
    return max(1, min(MOST_WARPS, _power_of_two(values) // (32 * VALUES_A_THREAD)))
