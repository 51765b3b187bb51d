"""Compile the Triton kernels for GPUs that are not there; prints what they take, as JSON.

python -m tests.kernels.triton_prologue_compiled 80 90 100   (compute capabilities times ten)

A process of its own: where Triton's interpreter is on, nothing compiles.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from jit_kernels.qk_norm_rope import triton as implementation
from jit_kernels.qk_norm_rope import triton_kernels
from jit_kernels.qk_norm_rope.contract import Request

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
# Query heads and KV heads of a rank, ranks, dtype of q, dtype of the cache.
SHAPES = ((48, 8, 1, BF16, E4M3), (48, 8, 1, torch.float16, None), (3, 1, 16, BF16, BF16))
# Two warps, both of which load K's tiles, and no sum over the block that makes them wait.
REPLICATED = (6, 1, 8, BF16, BF16)
# Rows that are stored by other threads than load them.
UNALIGNED = {"q_stride": 1029, "k_stride": 1029, "v_stride": 1029}


def compiled(kernel: JITFunction, arguments: dict[str, Any], capability: int) -> dict[str, Any]:
    """The code of `kernel` as launched with `arguments`: "ptx" and "cubin"."""
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value, place = arguments[parameter.name], (parameter.num,)
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[place] = value
            continue
        signature[parameter.name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[place] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": arguments["num_warps"]}
    code: dict[str, Any] = triton.compile(source, target=target, options=options).asm
    return code


def assert_nothing_is_stored_before_all_is_loaded(ptx: str) -> None:
    """A barrier of the block comes after all loads from global memory and before all stores."""
    # The code is straight: what comes first in the text comes first.
    steps = re.findall(r"\b(ld\.global|st\.global|bar\.sync)\b", ptx)
    stores = steps.index("st.global")
    loads = len(steps) - steps[::-1].index("ld.global")
    assert "bar.sync" in steps[loads:stores], f"{steps}: a warp may store before another has loaded"


def arguments_of(
    shape: tuple[int, int, int, torch.dtype, torch.dtype | None],
) -> dict[str, dict[str, Any]]:
    """What each kernel that serves `shape` is launched with."""
    q_heads, kv_heads, size, dtype, cache = shape
    request = Request("cuda", dtype, q_heads, kv_heads, 128, 64, cache, size)
    call = implementation.usual_call(request)
    sums = torch.empty(1, 2, device="meta")
    kernels = {"prologue": implementation.prologue_arguments(request, call, sums)}
    if size > 1:
        kernels["sums"] = implementation.sums_arguments(call, sums)
    return kernels


def usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump, which comes with Triton, says that a kernel takes."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    file = Path("kernel.cubin")
    file.write_bytes(cubin)
    said = subprocess.run(
        [tool, "--dump-resource-usage", file], check=True, capture_output=True, text=True
    ).stdout
    names = {"REG": "registers", "STACK": "stack", "LOCAL": "local", "SHARED": "shared"}
    return {name: int(re.findall(rf"\b{key}:(\d+)", said)[-1]) for key, name in names.items()}


def main(capabilities: list[int]) -> None:
    """Compile every shape for every capability in the working directory."""
    found = []
    for capability in capabilities:
        for shape in SHAPES:
            for name, arguments in arguments_of(shape).items():
                code = compiled(getattr(triton_kernels, f"{name}_kernel"), arguments, capability)
                what = f"{shape[0]}/{shape[1]} heads, cache {shape[4]}"
                found.append(
                    {"kernel": name, "sm": capability, "shape": what, **usage(code["cubin"])}
                )
                if name == "prologue" and arguments["num_warps"] > 1:
                    assert_nothing_is_stored_before_all_is_loaded(code["ptx"])
    for strides in ({}, UNALIGNED):
        arguments = arguments_of(REPLICATED)["prologue"] | strides
        assert arguments["num_warps"] > 1
        code = compiled(triton_kernels.prologue_kernel, arguments, capabilities[0])
        assert_nothing_is_stored_before_all_is_loaded(code["ptx"])
    print(json.dumps(found))


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
