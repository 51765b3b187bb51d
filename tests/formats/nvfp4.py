"""NVFP4 checkpoints, as ModelOpt's unified export writes them (export/quant_utils.py: to_quantized_
weight; nvfp4_tensor.py), with the recipe of nvidia's for MiniMax-M2.5: experts alone, or all.
"""

from __future__ import annotations

import json
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

GROUP = 16
LARGEST = 6 * 448

_SIDE = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP}
CONFIG: dict[str, Any] = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "producer": {"name": "modelopt", "version": "0.41.0"},
    "config_groups": {
        "group_0": {"input_activations": _SIDE, "weights": _SIDE, "targets": ["Linear"]}
    },
}
#: Left out always, and with `attention` too; as ModelOpt lists them.
IGNORED = ["lm_head", *(f"model.layers.{i}.block_sparse_moe.gate" for i in range(LAYERS))]
ATTENTION_IGNORED = [f"model.layers.{layer}.self_attn*" for layer in range(LAYERS)]


def quantise(weight: torch.Tensor, whole: torch.Tensor, amax_of_input: float) -> State:
    """whole: the largest value of all matrices that share weight_scale_2."""
    scale_2 = whole / LARGEST
    groups = weight.unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(-1) / 6 / scale_2).to(torch.float8_e4m3fn)
    both = (scale.float() * scale_2)[..., None]
    return {
        "weight": bytes_of(e2m1_codes(groups / both.clamp(min=1e-12)).flatten(1)),
        "weight_scale": scale,
        "weight_scale_2": scale_2.clone(),
        "input_scale": torch.tensor(amax_of_input / LARGEST),
    }


def dequantise(tensors: State) -> torch.Tensor:
    """e2m1 * (scale * scale_2) in fp32, in the order of SGLang's dequantize_nvfp4."""
    scale = tensors["weight_scale"].float() * tensors["weight_scale_2"]
    return E2M1[codes_of(tensors["weight"])] * scale.repeat_interleave(GROUP, -1)


def _sharing(module: str) -> list[str]:
    """The matrices with the same input, which ModelOpt gives the same scales for fusing."""
    parent, _, last = module.rpartition(".")
    packs = (ATTENTION[:3], ("w1", "w3"), (last,))
    return [f"{parent}.{each}" for each in next(pack for pack in packs if last in pack)]


def _made(name: str, *, attention: bool = True, own_file: bool = False) -> Fixture:
    weights = tiny()
    stored = {}
    for module in quantised_modules():
        if attention or ".experts." in module:
            whole = torch.stack([weights[f"{m}.weight"].abs().max() for m in _sharing(module)])
            stored[module] = quantise(weights[f"{module}.weight"], whole.max(), 5.0)
    truth = {module: dequantise(tensors) for module, tensors in stored.items()}
    ignored = [*IGNORED, *([] if attention else ATTENTION_IGNORED)]
    fixture = fixture_of(
        name, {**CONFIG, "ignore": ignored}, stored, truth, activations="group-nvfp4"
    )
    if not own_file:
        return fixture
    del fixture.config["quantization_config"]
    nested = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": GROUP}
    own = {"producer": CONFIG["producer"], "quantization": {**nested, "exclude_modules": ignored}}
    return Fixture(
        name,
        fixture.config,
        fixture.tensors,
        fixture.dequantised,
        fixture.activations,
        files={"hf_quant_config.json": json.dumps(own)},
    )


FIXTURES: Fixtures = {
    "nvfp4": lambda: _made("nvfp4"),
    "nvfp4-experts": lambda: _made("nvfp4-experts", attention=False),
    "nvfp4-own-file": lambda: _made("nvfp4-own-file", attention=False, own_file=True),
}
