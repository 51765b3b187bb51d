"""The CUDA kernel compiles for every architecture it serves, within its registers; needs no GPU.

What happens around a compile is in test_compile_cache.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.kernel_resources import CAPABILITIES, REGISTER_BUDGET, SHAPES, Shape, measure
from jit_kernels import compile as compiler
from jit_kernels import toolchain
from jit_kernels.choice import KernelUnavailable
from jit_kernels.qk_norm_rope import cuda

try:
    toolchain.compilers()
    NO_COMPILER = ""
except KernelUnavailable as error:
    NO_COMPILER = str(error)
needs_nvcc = pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER or "nvcc is here")

# About a second each: all shapes on one architecture, on the others the largest.
CASES = [
    pytest.param(
        shape,
        capability,
        id=f"{shape.name}-sm{compiler.architecture(capability)}".replace(" ", ""),
        marks=[] if capability == (9, 0) or "e4m3" in shape.name else [pytest.mark.slow],
    )
    for capability in CAPABILITIES
    for shape in SHAPES
]


@needs_nvcc
@pytest.mark.parametrize(("shape", "capability"), CASES)
def test_kernel_keeps_to_its_registers(shape: Shape, capability: tuple[int, int]) -> None:
    found = measure(shape, capability)
    assert found.spill_bytes == 0
    assert 0 < found.registers <= REGISTER_BUDGET


@needs_nvcc
def test_library_is_built_loaded_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JIT_KERNELS_CACHE", str(tmp_path))
    unit = cuda.unit(SHAPES[3].request((9, 0)))
    module = compiler.load(unit)
    assert callable(module.launch)
    assert callable(module.resident_blocks)
    # A machine that was given the folder needs no compiler.
    monkeypatch.setattr(toolchain, "compilers", lambda _: pytest.fail("looked for a compiler"))
    assert compiler.library(unit).parent == tmp_path
    if not torch.cuda.is_available():
        with pytest.raises(KernelUnavailable, match="compiled kernel cannot be loaded"):
            cuda.prepare(SHAPES[3].request((9, 0)))


def test_two_kernels_in_one_report_are_not_one() -> None:
    one = "0 bytes spill stores, 4 bytes spill loads\nUsed 40 registers, 16 bytes smem\n"
    assert compiler.parse_resources(one) == compiler.Resources(40, 4, 16)
    with pytest.raises(ValueError, match="2 kernels"):
        compiler.parse_resources(one * 2)
