"""MXFP4 checkpoints, as Quark exports them (amd/MiniMax-M2.x-MXFP4), by OCP Microscaling 1.0."""

from __future__ import annotations

from typing import Any

import torch

from tests.formats.base import (
    ATTENTION,
    LAYERS,
    Fixture,
    Fixtures,
    State,
    fixture_of,
    quantised_modules,
    tiny,
)
from tests.formats.packing import E2M1, bytes_of, codes_of, e2m1_codes

GROUP = 32

_SPEC = {
    "dtype": "fp4",
    "qscheme": "per_group",
    "group_size": GROUP,
    "ch_axis": -1,
    "scale_format": "e8m0",
    "symmetric": None,
    "round_method": "half_even",
}
CONFIG: dict[str, Any] = {
    "quant_method": "quark",
    "quant_mode": "eager_mode",
    "export": {
        "kv_cache_group": [],
        "min_kv_scale": 0.0,
        "pack_method": "reorder",
        "weight_format": "real_quantized",
        "weight_merge_groups": None,
    },
    "global_quant_config": {
        "weight": {**_SPEC, "is_dynamic": False},
        "input_tensors": {**_SPEC, "is_dynamic": True},
        "output_tensors": None,
        "bias": None,
    },
    "layer_quant_config": {},
    "layer_type_quant_config": {},
}
EXCLUDED = ["lm_head", *(f"model.layers.{i}.block_sparse_moe.gate" for i in range(LAYERS))]
ATTENTION_EXCLUDED = [
    f"model.layers.{layer}.self_attn.{name}" for layer in range(LAYERS) for name in ATTENTION
]


def quantise(weight: torch.Tensor) -> State:
    """A power of two for each group: that of its largest value, less the largest of e2m1 (4)."""
    groups = weight.unflatten(1, (-1, GROUP))
    exponents = groups.abs().amax(-1).log2().floor() - 2
    return {
        "weight": bytes_of(e2m1_codes(groups / exponents.exp2()[..., None]).flatten(1)),
        "weight_scale": (exponents + 127).to(torch.uint8),
    }


def dequantise(tensors: State) -> torch.Tensor:
    """e2m1 * 2 ** (scale - 127), which is exact."""
    scale = (tensors["weight_scale"].float() - 127).exp2()
    return E2M1[codes_of(tensors["weight"])] * scale.repeat_interleave(GROUP, -1)


def _made(name: str, *, attention: bool = True) -> Fixture:
    modules = [m for m in quantised_modules() if attention or ".experts." in m]
    weights = tiny()
    stored = {module: quantise(weights[f"{module}.weight"]) for module in modules}
    truth = {module: dequantise(tensors) for module, tensors in stored.items()}
    excluded = [*EXCLUDED, *([] if attention else ATTENTION_EXCLUDED)]
    return fixture_of(
        name, {**CONFIG, "exclude": excluded}, stored, truth, activations="group-mxfp4"
    )


FIXTURES: Fixtures = {
    "mxfp4": lambda: _made("mxfp4"),
    "mxfp4-experts": lambda: _made("mxfp4-experts", attention=False),
}
