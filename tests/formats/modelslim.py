"""ModelSlim checkpoints, as msmodelslim writes them for Ascend (W8A8 and W8A8_DYNAMIC)."""

from __future__ import annotations

import json

import torch

from tests.formats.base import (
    Fixture,
    Fixtures,
    State,
    config,
    fixture_of,
    quantised_modules,
    tiny,
)

DESCRIPTION = "quant_model_description.json"
#: A power of two, so that dividing by it is exact.
INPUT_SCALE, INPUT_OFFSET = 2**-6, 3


def _rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 and its scale, one a row."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    return (weight / scale.float()).round().clamp(-128, 127).to(torch.int8), scale


def dynamic(weight: torch.Tensor) -> State:
    """W8A8_DYNAMIC."""
    values, scale = _rows(weight)
    return {"weight": values, "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}


def static(weight: torch.Tensor) -> State:
    """W8A8: the input is round(x / input_scale) + input_offset, which quant_bias takes back."""
    values, scale = _rows(weight)
    return {
        "weight": values,
        "input_scale": torch.tensor([INPUT_SCALE], dtype=torch.bfloat16),
        "input_offset": torch.tensor([INPUT_OFFSET], dtype=torch.bfloat16),
        "quant_bias": -values.sum(1, dtype=torch.int32) * INPUT_OFFSET,
        "deq_scale": scale.float()[:, 0] * INPUT_SCALE,
    }


def dequantise(tensors: State) -> torch.Tensor:
    """What the integers stand for, of either kind."""
    values = tensors["weight"].float()
    if "deq_scale" in tensors:
        return values * (tensors["deq_scale"] / tensors["input_scale"].float())[:, None]
    return values * tensors["weight_scale"].float()


def _made(name: str, *, static_attention: bool = False) -> Fixture:
    weights = tiny()
    stored, words = {}, {}
    for module in quantised_modules():
        is_static = static_attention and ".self_attn." in module
        stored[module] = (static if is_static else dynamic)(weights[f"{module}.weight"])
        words[module] = "W8A8" if is_static else "W8A8_DYNAMIC"
    truth = {module: dequantise(tensors) for module, tensors in stored.items()}
    fixture = fixture_of(name, {}, stored, truth)
    description = {"model_quant_type": "W8A8_DYNAMIC", "version": "1.0.0"}
    description |= {
        tensor: words.get(tensor.rpartition(".")[0], "FLOAT") for tensor in fixture.tensors
    }
    return Fixture(
        name,
        config(),
        fixture.tensors,
        fixture.dequantised,
        "static-int8" if static_attention else "token-int8",
        files={DESCRIPTION: json.dumps(description)},
    )


FIXTURES: Fixtures = {
    "modelslim": lambda: _made("modelslim"),
    "modelslim-static": lambda: _made("modelslim-static", static_attention=True),
}
