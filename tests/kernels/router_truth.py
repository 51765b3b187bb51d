"""Inputs of the router, its fp64 oracle, and bounds; `router_cases` has the tests."""

from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
import triton

from jit_kernels.router import reference, triton_kernels
from jit_kernels.router import triton as ours
from jit_kernels.router.contract import Call, Request, Routing

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"

SOURCE = Path(triton_kernels.__file__)
UNIT = 2.0**-24  # half a unit in the last place of fp32
PUBLISHED = (256, 3072, 8)
# Experts that are no power of two, a hidden size that is no multiple of a block.
ODD = (12, 200, 3)
SMALL = (40, 192, 8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def changed(*replacements: tuple[str, str]) -> ModuleType:
    """The kernels with each (old, new) replaced where it occurs once."""
    text = SOURCE.read_text()
    for old, new in replacements:
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
        text = text.replace(old, new)
    # Triton reads the source of a kernel again, so it has to be a file.
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(text)
    spec = importlib.util.spec_from_file_location(Path(file.name).stem, file.name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Case:
    """Hidden states [tokens, hidden], gate weight [experts, hidden], bias [experts]."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    top_k: int

    def call(self, logits: torch.Tensor | None = None) -> Call:
        return Call(self.hidden, self.weight, self.bias, self.top_k, logits)

    def request(self, **changes) -> Request:
        experts, hidden = self.weight.shape
        return replace(Request("cuda", self.hidden.dtype, experts, hidden, self.top_k), **changes)


def make_case(tokens: int, shape: tuple[int, int, int], dtype: torch.dtype, seed=3) -> Case:
    experts, hidden, top_k = shape
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device="cpu").to(DEVICE)

    # Logits of about 1, and a bias that changes what is chosen.
    weight = normal(experts, hidden) * hidden**-0.5
    return Case(normal(tokens, hidden).to(dtype), weight, normal(experts) * 0.2, top_k)


Serve = Callable[[Case, torch.Tensor | None], Routing]


def with_kernels(kernels: ModuleType, how: Callable[[ours.Plan], ours.Plan] | None = None) -> Serve:
    def serve(case: Case, logits: torch.Tensor | None = None) -> Routing:
        plan = ours.plan(case.hidden.shape[0], case.request())
        return ours.serve(case.call(logits), how(plan) if how else plan, kernels)

    return serve


def with_reference(case: Case, logits: torch.Tensor | None = None) -> Routing:
    return reference.run(case.call(logits))


def logit_bound(case: Case) -> torch.Tensor:
    """How far fp32 logits may be from fp64 ones, [tokens, experts].

    Products are exact, each of up to 6 * hidden additions loses at most UNIT of a partial sum, and
    partial sums of random terms are about as large as the root of their squares' sum. Losses in a
    long sum go both ways (Higham and Mary, 2019), so they grow with the root of their number; 4
    times that. Seen: a tenth of it. A weight of one bf16 is 2**-9 off, 50 times the bound.
    """
    sizes = case.hidden.double().square() @ case.weight.double().square().T
    return 4 * UNIT * (6 * case.hidden.shape[1]) ** 0.5 * sizes.sqrt()


def disagreement(case: Case, serve: Serve) -> str:
    """What differs from the fp64 oracle by more than the bounds; empty where nothing does."""
    experts = case.weight.shape[0]
    logits = torch.full((case.hidden.shape[0] + 1, experts), 7.0)
    found = serve(case, logits[:-1])
    exact = case.hidden.double() @ case.weight.double().T
    off = logit_bound(case)
    if ((logits[:-1] - exact).abs() > off).any() or (logits[-1] != 7.0).any():
        return "logits"
    # The slope of a sigmoid is at most 1/4; its own arithmetic is a few roundings.
    off = off.amax(-1, keepdim=True) / 4 + 4 * UNIT
    scores = exact.sigmoid()
    biased = scores + case.bias.double()
    best = biased.sort(dim=-1, descending=True, stable=True).values
    ids = found.ids.long()
    if found.ids.dtype != torch.int32 or ids.min() < 0 or ids.max() >= experts:
        return "ids out of range"
    judged = (best[:, case.top_k - 1] - best[:, case.top_k]) > 2 * off[:, 0]
    assert judged.float().mean() > 0.8, "the case leaves the choice open"
    chosen = biased.gather(1, ids)
    if ((chosen - best[:, : case.top_k]).abs() > 2 * off)[judged].any():
        return "ids"
    picked = scores.gather(1, ids)
    total = picked.sum(-1, keepdim=True)
    if found.weights.dtype != torch.float32:
        return "the dtype of the weights"
    # An error of each of the top_k scores in the sum, one of the score itself, and the division.
    limit = (1 + case.top_k) * off / total + 4 * UNIT
    return "weights" if ((found.weights - picked / total).abs() > limit).any() else ""
