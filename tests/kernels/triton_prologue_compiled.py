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


def compiled(kernel: JITFunction, arguments: dict[str, Any], capability: int) -> dict[str, int]:
    """Registers a thread, stack and spilled bytes of `kernel` as launched with `arguments`."""
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
    return usage(triton.compile(source, target=target, options=options).asm["cubin"])


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
        for q_heads, kv_heads, size, dtype, cache in SHAPES:
            request = Request("cuda", dtype, q_heads, kv_heads, 128, 64, cache, size)
            call = implementation.usual_call(request)
            sums = torch.empty(1, 2, device="meta")
            kernels = {"prologue": implementation.prologue_arguments(request, call, sums)}
            if size > 1:
                kernels["sums"] = implementation.sums_arguments(call, sums)
            for name, arguments in kernels.items():
                kernel = getattr(triton_kernels, f"{name}_kernel")
                took = compiled(kernel, arguments, capability)
                shape = f"{q_heads}/{kv_heads} heads, cache {cache}"
                found.append({"kernel": name, "sm": capability, "shape": shape, **took})
    print(json.dumps(found))


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
