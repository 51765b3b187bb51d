"""The CUDA kernel compiles for every architecture it serves, within its registers; needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernel_resources import CAPABILITIES, REGISTER_BUDGET, SHAPES, Shape, measure
from jit_kernels import compile as compiler
from jit_kernels.choice import KernelUnavailable
from jit_kernels.compile import Unit
from jit_kernels.qk_norm_rope import cuda

try:
    compiler.find_nvcc()
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
    monkeypatch.setattr(compiler, "find_nvcc", lambda: pytest.fail("looked for a compiler"))
    assert compiler.library(unit).parent == tmp_path
    if not torch.cuda.is_available():
        with pytest.raises(KernelUnavailable, match="compiled kernel cannot be loaded"):
            cuda.prepare(SHAPES[3].request((9, 0)))


def fake_nvcc(folder: Path, script: str) -> Path:
    """A compiler that notes each run in `runs` beside it."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho run >> {folder}/runs\n{script}\n")
    nvcc.chmod(0o755)
    return nvcc


# Writes what -o names, after a while.
WRITES = 'sleep 1; while [ "$1" != -o ]; do shift; done; echo library > "$2"'


def test_compilers_message_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JIT_KERNELS_CACHE", str(tmp_path / "cache"))
    script = 'echo noise; echo "x.cu(3): error: no operator fits"; echo "1 error detected"; exit 2'
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path, script).parent.parent))
    with pytest.raises(KernelUnavailable, match="no operator fits") as raised:
        compiler.load(Unit("probe", "", "90a"))
    assert "noise" not in str(raised.value)
    assert not list((tmp_path / "cache").glob("*.so"))


def test_no_compiler_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JIT_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler.os, "access", lambda *_: False)
    with pytest.raises(KernelUnavailable, match=r"^no nvcc .*`pip install nvidia-cuda-nvcc`$"):
        compiler.load(Unit("probe", "", "90a"))


def test_folder_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JIT_KERNELS_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path, WRITES).parent.parent))
    with pytest.raises(KernelUnavailable, match="cannot be built or loaded"):
        compiler.load(Unit("probe", "", "90a"))


def test_ranks_that_start_together_compile_once(tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path, WRITES)
    code = (
        "from jit_kernels.compile import Unit, library\n"
        "assert library(Unit('probe', 'text', '90a')).read_text() == 'library\\n'"
    )
    environment = dict(
        os.environ, JIT_KERNELS_CACHE=str(tmp_path / "cache"), CUDA_HOME=str(nvcc.parent.parent)
    )
    ranks = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    assert (tmp_path / "runs").read_text() == "run\n"


def test_digest_follows_text_architecture_and_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(text: str = "a", arch: str = "90a") -> str:
        return compiler._digest(Unit("probe", text, arch))

    before = digest()
    assert len({before, digest(text="b"), digest(arch="80")}) == 3
    monkeypatch.setattr(compiler, "_headers_digest", lambda: b"changed")
    assert digest() != before


def test_two_kernels_in_one_report_are_not_one() -> None:
    one = "0 bytes spill stores, 4 bytes spill loads\nUsed 40 registers, 16 bytes smem\n"
    assert compiler.parse_resources(one) == compiler.Resources(40, 4, 16)
    with pytest.raises(ValueError, match="2 kernels"):
        compiler.parse_resources(one * 2)
