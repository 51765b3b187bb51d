"""FP8 checkpoints: blocks as MiniMax publishes them, one scale a matrix as AutoFP8 and ModelOpt.

Layout: the published config.json and index of MiniMax-M2 (blocks, `weight_scale_inv`, which
multiplies); AutoFP8's `ignored_layers` and scalar scales; ModelOpt's unified export.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from tests.formats.base import Fixture, Fixtures, State, fixture_of, quantised_modules, tiny

BLOCK = 64
LARGEST = 448.0  # of e4m3
INPUT_SCALE = 0.02

IGNORED = ["gate", "e_score_correction_bias", "lm_head"]


def spread(values: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """A scale for each block over the elements of that block."""
    return values.repeat_interleave(block, 0).repeat_interleave(block, 1)


def _blocks(weight: torch.Tensor, block: int) -> tuple[State, torch.Tensor]:
    rows, columns = (size // block for size in weight.shape)
    peaks = weight.abs().view(rows, block, columns, block).amax((1, 3))
    scale = peaks / LARGEST
    stored = (weight / spread(scale, block)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scale}, stored.float() * spread(scale, block)


def _whole(weight: torch.Tensor, static: bool) -> tuple[State, torch.Tensor]:
    scale = weight.abs().amax() / LARGEST
    stored = (weight / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    tensors = {"weight": stored, "weight_scale": scale}
    if static:
        tensors["input_scale"] = torch.tensor(INPUT_SCALE)
    return tensors, stored.float() * scale


def _fixture(name: str, quantization: dict[str, Any], quantise: Any, **more: Any) -> Fixture:
    state = tiny()
    stored, truth = {}, {}
    for module in quantised_modules():
        stored[module], truth[module] = quantise(state[f"{module}.weight"])
    return fixture_of(name, quantization, stored, truth, **more)


def blocks(block: int = BLOCK) -> Fixture:
    """As published, in smaller blocks."""
    quantization = {
        "quant_method": "fp8",
        "fmt": "float8_e4m3fn",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
        "modules_to_not_convert": IGNORED,
    }
    return _fixture(
        "fp8-blocks" if block == BLOCK else f"fp8-blocks-{block}",
        quantization,
        lambda weight: _blocks(weight, block),
        activations=f"group-{block}",
    )


def dynamic() -> Fixture:
    """One scale a matrix, activations scaled when they come."""
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "ignored_layers": ["lm_head", "gate"],
    }
    return _fixture(
        "fp8-dynamic", quantization, lambda w: _whole(w, False), activations="tensor-fp8"
    )


def static() -> Fixture:
    """One scale a matrix, and one for its input."""
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "ignored_layers": ["lm_head", "gate"],
    }
    return _fixture("fp8-static", quantization, lambda w: _whole(w, True), activations="static-fp8")


def modelopt() -> Fixture:
    """ModelOpt's FP8, with its own file beside config.json."""
    excluded = ["lm_head", "model.layers.*.block_sparse_moe.gate"]
    producer = {"name": "modelopt", "version": "0.39.0"}
    quantization = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "ignore": excluded,
        "producer": producer,
    }
    own = {
        "producer": producer,
        "quantization": {"quant_algo": "FP8", "exclude_modules": excluded},
    }
    return _fixture(
        "modelopt-fp8",
        quantization,
        lambda w: _whole(w, True),
        activations="static-fp8",
        files={"hf_quant_config.json": json.dumps(own)},
    )


FIXTURES: Fixtures = {
    "fp8-blocks": blocks,
    "fp8-dynamic": dynamic,
    "fp8-static": static,
    "modelopt-fp8": modelopt,
}
