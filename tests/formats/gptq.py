"""GPTQ checkpoints, as AutoGPTQ's and GPTQModel's QuantLinear.pack write them: symmetric."""

from __future__ import annotations

from typing import Any

import torch

from tests.formats.base import Fixture, Fixtures, State, fixture_of, quantised_modules, tiny
from tests.formats.packing import exact, lines_of, words_of

GROUP = 64

CONFIG: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": GROUP,
    "desc_act": False,
    "sym": True,
    "lm_head": False,
    "checkpoint_format": "gptq",
    "pack_dtype": "int32",
    "true_sequential": True,
    "dynamic": {"-:.*gate.*": {}},
    "meta": {"quantizer": ["gptqmodel:5.0.0"]},
}


def quantise(weight: torch.Tensor, g_idx: torch.Tensor, version: int = 1) -> State:
    """Symmetric around 8; line k belongs to group g_idx[k]. Version 1 stores zeros less one."""
    columns = weight.t()
    count = int(g_idx.max()) + 1
    largest = torch.stack([columns[g_idx == group].abs().amax(0) for group in range(count)])
    scales = exact(largest / 7)
    lines = ((columns / scales[g_idx]).round() + 8).clamp(0, 15)
    return {
        "qweight": words_of(lines.t()).t(),
        "qzeros": words_of(torch.full_like(scales, 7 if version == 1 else 8)),
        "scales": scales.half(),
        "g_idx": g_idx.to(torch.int32),
    }


def dequantise(tensors: State, version: int = 1) -> torch.Tensor:
    """(q - zero) * scale, with what is stored."""
    lines = lines_of(tensors["qweight"].t()).t()
    zeros = lines_of(tensors["qzeros"]) + (1 if version == 1 else 0)
    groups = tensors["g_idx"].long()
    return ((lines - zeros[groups]).float() * tensors["scales"].float()[groups]).t()


def _groups(module: str, columns: int, group: int, act_order: bool) -> torch.Tensor:
    """The group of each column; q, k and v see one input, as do w1 and w3 of an expert."""
    if group == -1:
        return torch.zeros(columns, dtype=torch.long)
    plain = torch.arange(columns) // group
    if not act_order:
        return plain
    parent, _, last = module.rpartition(".")
    own = last in ("o_proj", "w2")
    seed = sum(ord(letter) * (i + 1) for i, letter in enumerate(parent)) + own
    return plain[torch.randperm(columns, generator=torch.Generator().manual_seed(seed))]


def _made(name: str, *, group: int = GROUP, act_order: bool = False, version: int = 1) -> Fixture:
    weights = tiny()
    stored = {}
    for module in quantised_modules():
        weight = weights[f"{module}.weight"]
        g_idx = _groups(module, weight.shape[1], group, act_order)
        stored[module] = quantise(weight, g_idx, version)
    truth = {module: dequantise(tensors, version) for module, tensors in stored.items()}
    written = {"checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    config = {**CONFIG, **written, "group_size": group, "desc_act": act_order}
    return fixture_of(name, config, stored, truth)


FIXTURES: Fixtures = {
    "gptq": lambda: _made("gptq"),
    "gptq-act-order": lambda: _made("gptq-act-order", act_order=True),
    "gptq-whole-rows": lambda: _made("gptq-whole-rows", group=-1),
    "gptq-v2": lambda: _made("gptq-v2", version=2),
}
