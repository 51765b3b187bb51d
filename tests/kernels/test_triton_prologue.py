"""The Triton prologue: its tests in the interpreter (and on a GPU, if any), compiling, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jit_kernels.choice import KernelUnavailable
from jit_kernels.qk_norm_rope import triton as implementation
from jit_kernels.qk_norm_rope.contract import (
    Group,
    Request,
)
from tests.kernels import cases

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def python(*arguments: str, interpret: bool, cwd: Path = ROOT, **environment: str) -> str:
    """Run Python with Triton's interpreter on or off; returns its output, fails with it."""
    variables = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"PYTHONPATH": str(ROOT), **environment}
    if interpret:
        variables["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    return done.stdout


def cases_pass(mark: str, interpret: bool) -> None:
    files = [str(HERE / f"triton_prologue_{name}.py") for name in ("cases", "wrong")]
    options = ("-q", "-p", "no:cacheprovider", "-m", mark)
    python("-m", "pytest", *options, *files, interpret=interpret)


def test_interpreted():
    cases_pass("not slow", interpret=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 26 cases at once, minutes of one core
def test_interpreted_at_length():
    cases_pass("slow", interpret=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_this_gpu():
    cases_pass("slow or not slow", interpret=False)


def test_compiles_without_spilling(tmp_path):
    """For Ampere, Hopper and Blackwell: nothing in local memory, no thread's stack."""
    out = python(
        "-m",
        "tests.kernels.triton_prologue_compiled",
        *("80", "90", "100"),
        interpret=False,
        cwd=tmp_path,
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )
    kernels = json.loads(out)
    assert len(kernels) == 12
    for kernel in kernels:
        print(kernel)
        assert (kernel["stack"], kernel["local"]) == (0, 0), kernel
        # Two programs of 8 warps on a multiprocessor: 65536 registers / 512 threads.
        assert kernel["registers"] <= 128, kernel


GPU = Request("cuda", torch.bfloat16, 48, 8, 128, 64, capability=(9, 0))


def test_what_is_refused():
    assert implementation.refusal(GPU) is None
    # As ROCm reports itself.
    assert implementation.refusal(replace(GPU, capability=None)) is None
    for changes, says in (
        ({"dtype": torch.float64}, "takes bf16, fp16 and fp32, not torch.float64"),
        ({"device": "cpu", "capability": None}, "on a CPU only with TRITON_INTERPRET=1"),
        ({"device": "npu", "capability": None}, "does not know the device 'npu'"),
        ({"capability": (7, 5)}, "needs compute capability 8.0, this device has 7.5"),
        ({"cache_dtype": torch.float16}, "a cache of torch.float16 cannot hold torch.bfloat16"),
        ({"rotary_dim": 63}, "63 rotated dimensions do not fit heads of 128 in pairs"),
        ({"rotary_dim": 130}, "130 rotated dimensions do not fit heads of 128 in pairs"),
        ({"q_heads": 300}, "300 query heads of 128 take 65536 padded values"),
    ):
        assert says in implementation.refusal(replace(GPU, **changes))


def test_without_triton(monkeypatch):
    monkeypatch.setattr(implementation.importlib.util, "find_spec", lambda name: None)
    assert implementation.refusal(GPU) == "Triton is not installed"


@pytest.fixture
def no_compiler(monkeypatch):
    """Kernels whose compiler fails."""

    def warmup(**arguments: object) -> None:
        raise RuntimeError("ptxas: error on line 7")

    kernel = SimpleNamespace(warmup=warmup)
    kernels = SimpleNamespace(prologue_kernel=kernel, sums_kernel=kernel)
    monkeypatch.setattr(implementation, "_kernels", lambda: kernels)
    monkeypatch.setattr(implementation, "_interpreted", lambda: False)


@pytest.mark.usefixtures("no_compiler")
def test_a_failing_compile_is_told():
    with pytest.raises(KernelUnavailable, match="does not compile the kernel: ptxas: error"):
        implementation.prepare(GPU)


def test_a_call_of_another_shape_is_refused():
    case = cases.make_case(2)
    call = cases.cut(case, 1, 0).call(Group())
    for changed, says in (
        (call, r"rows of \(6144, 1024\) where \(3072, 512\) were prepared for"),
        (
            cases.cut(case, 2, 0).call(Group(2)),
            "a group of 2 ranks needs an all-reduce",
        ),
        (
            replace(
                cases.cut(case, 2, 0).call(Group(2)),
                rotation=replace(call.rotation, head_dim=64),
            ),
            "heads of 64 where 128 was prepared for",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            implementation._check_request(replace(GPU, q_heads=24, kv_heads=4), changed)
