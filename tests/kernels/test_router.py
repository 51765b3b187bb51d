"""The router's kernels: interpreted, on a GPU where there is one, and compiled for real targets."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jit_kernels.router import op
from jit_kernels.router import triton as ours
from jit_kernels.router.contract import Call, Request, Routing, check

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# Shared memory of a block: what every target named here has (sm_86 and sm_120 have the least).
SHARED_BYTES = 99 * 1024

COMPILE = """
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from jit_kernels.router import triton as ours, triton_kernels as kernels
from jit_kernels.router.contract import Request

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
capability, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])


def build(kernel, constants, warps, stages, **types):
    names = kernel.arg_names
    signature = types | dict.fromkeys(constants, "constexpr")
    aligned = [n for n, t in types.items() if t.startswith("*") or n.endswith("stride")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    constants = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    matrix = any(word in built.asm["ptx"] for word in ("mma.sync", "wgmma", "tcgen05.mma"))
    print(kernel.__name__, built.metadata.shared, int(matrix))


request = Request("cuda", dtype, 256, 3072, 8)
for tokens in ours.distinct(request, 132):
    plan = ours.plan(tokens, request)
    blocks = {"BLOCK_TOKENS": plan.block_tokens, "BLOCK_EXPERTS": plan.block_experts}
    build(
        kernels.partial_logits,
        {"EXPERTS": 256, "HIDDEN": 3072, **blocks, "BLOCK_HIDDEN": plan.block_hidden},
        plan.warps,
        plan.stages,
        x_ptr=TYPES[dtype],
        w_ptr="*fp32",
        partial_ptr="*fp32",
        tokens="i32",
        x_stride="i32",
        steps="i32",
    )
for rows, write in ((1, True), (ours.SELECTED_ROWS, False)):
    sizes = {"EXPERTS": 256, "TOP_K": 8, "BLOCK_EXPERTS": 256, "BLOCK_K": 8}
    build(
        kernels.select,
        {**sizes, "WRITE_LOGITS": write, "BLOCK_TOKENS": rows},
        rows,
        3,
        partial_ptr="*fp32",
        bias_ptr="*fp32",
        weights_ptr="*fp32",
        ids_ptr="*i32",
        logits_ptr="*fp32",
        tokens="i32",
        parts="i32",
    )
"""


def run(*command: str, interpret: bool) -> str:
    """What a Python process prints; the test fails with it where the process does."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def run_cases(*, interpret: bool) -> None:
    options = ("-q", "-x", "-p", "no:cacheprovider")
    run("-m", "pytest", *options, str(HERE / "router_cases.py"), interpret=interpret)


def test_cases_interpreted() -> None:
    run_cases(interpret=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cases_on_a_gpu() -> None:
    run_cases(interpret=False)


TARGETS = [(c, d) for c in (80, 90, 100, 120) for d in ("bfloat16", "float16", "float32")]


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        pytest.param(*target, marks=() if target == (90, "bfloat16") else pytest.mark.slow)
        for target in TARGETS
    ],
)
def test_every_plan_compiles(capability: int, dtype: str) -> None:
    lines = run("-c", COMPILE, str(capability), dtype, interpret=False).splitlines()
    built = [line.split() for line in lines]
    assert [name for name, _, _ in built].count("select") == 2
    for name, shared, matrix in built:
        assert int(shared) <= SHARED_BYTES
        # Tensor cores take part wherever the activations are not fp32.
        assert bool(int(matrix)) == (name == "partial_logits" and dtype != "float32")


def test_what_cannot_serve_says_why():
    cpu = Request("cpu", torch.bfloat16, 256, 3072, 8)
    found = op.choose(cpu)
    assert found.name == "reference"
    assert found.why == "triton: needs an NVIDIA or AMD device, not cpu"
    turing = replace(cpu, device="cuda", capability=(7, 5))
    assert "sm_80" in op.choose(turing).why
    wide = replace(cpu, device="cuda", experts=2048)
    assert "2048 experts" in op.choose(wide).why
    with pytest.raises(op.KernelUnavailable, match="known: triton, reference"):
        op.choose(cpu, prefer="cuda")


def test_a_kernel_that_does_not_compile_falls_back_with_the_message(monkeypatch):
    def fails(*_: object) -> Routing:
        raise RuntimeError("\nPTXAS error: no such instruction\n and more")

    class Properties:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(ours.torch, "device", lambda *_: "cpu")
    monkeypatch.setattr(ours, "serve", fails)
    found = op.choose(Request("cuda", torch.bfloat16, 12, 200, 3, capability=(9, 0)))
    assert found.name == "reference"
    assert found.why == "triton: RuntimeError: PTXAS error: no such instruction"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_warming_up_compiles_for_every_number_of_tokens(monkeypatch, dtype) -> None:
    request = Request("cuda", dtype, 12, 200, 3)
    seen = set()

    def compiled(how: ours.Plan, logits: bool) -> tuple:
        # Parts and steps are arguments at run time; one part leaves no logits to write.
        return (replace(how, parts=1, steps=1), logits and how.parts > 1)

    def serve(call: Call, how: ours.Plan, kernels: object) -> None:
        check(call)
        seen.add(compiled(how, call.logits is not None))

    monkeypatch.setattr(ours, "serve", serve)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as SGLang does while it builds a model
    try:
        ours.warm_up(request, 132, torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)
    wanted = {
        compiled(ours.plan(tokens, request), logits)
        for tokens in range(1, 5000)
        for logits in (False, True)
    }
    assert wanted <= seen
