"""AWQ checkpoints, as AutoAWQ's WQLinear_GEMM.from_linear writes them."""

from __future__ import annotations

from typing import Any

import torch

from tests.formats.base import Fixture, Fixtures, State, fixture_of, quantised_modules, tiny
from tests.formats.packing import exact, lines_of, words_of

GROUP = 64
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

CONFIG: dict[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP,
    "zero_point": True,
    "version": "gemm",
    "backend": "autoawq",
    "modules_to_not_convert": ["gate", "lm_head"],
}


def quantise(weight: torch.Tensor) -> State:
    """Asymmetric, each group from its least to its largest value."""
    groups = weight.t().unflatten(0, (-1, GROUP))
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = exact((high - low) / 15)
    zeros = (-low / scales).round().clamp(0, 15)
    lines = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15).flatten(0, 1)
    return {
        "qweight": words_of(lines, ORDER),
        "qzeros": words_of(zeros, ORDER),
        "scales": scales.half(),
    }


def dequantise(tensors: State) -> torch.Tensor:
    """(q - zero) * scale, which fp32 holds exactly."""
    lines, zeros = lines_of(tensors["qweight"], ORDER), lines_of(tensors["qzeros"], ORDER)
    scales = tensors["scales"].float()
    group = len(lines) // max(1, len(zeros))
    zeros, scales = (each.repeat_interleave(group, 0) for each in (zeros, scales))
    return ((lines - zeros).float() * scales).t()


def _made(name: str, *, attention: bool = True) -> Fixture:
    modules = [m for m in quantised_modules() if attention or ".experts." in m]
    skipped = [*([] if attention else ["self_attn"]), *CONFIG["modules_to_not_convert"]]
    weights = tiny()
    stored = {module: quantise(weights[f"{module}.weight"]) for module in modules}
    truth = {module: dequantise(tensors) for module, tensors in stored.items()}
    return fixture_of(name, {**CONFIG, "modules_to_not_convert": skipped}, stored, truth)


FIXTURES: Fixtures = {
    "awq": lambda: _made("awq"),
    "awq-experts": lambda: _made("awq-experts", attention=False),
}
