"""compressed-tensors checkpoints, quantised, packed and unpacked by the library itself.

It quantises modules that are Linear, so the published names are built as a tree of them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams

from tests.formats.base import Fixture, Fixtures, fixture_of, quantised_modules, shapes, tiny

GROUP = 64
INPUT_SCALE = 0.02
IGNORED = ["lm_head", "re:.*block_sparse_moe\\.gate$"]

_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True}


def _tree(modules: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Linear modules under these names; others are the plain modules in between."""
    root = torch.nn.Module()
    for name, weight in modules.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, torch.nn.Module())
            parent = parent.get_submodule(part)
        linear = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=torch.bfloat16)
        linear.weight.data.copy_(weight)
        parent.add_module(last, linear)
    return root


def _calibrate(linear: torch.nn.Linear, seed: int) -> None:
    """Scales from the largest values, as a min-max observer has them."""
    weights: QuantizationArgs = linear.quantization_scheme.weights
    matrix = linear.weight.data.float()
    rows, columns = matrix.shape
    groups = getattr(linear, "weight_g_idx", None)
    if groups is not None:
        # Groups in an order of their own, as GPTQ finds it from activations; q, k and v have the
        # same input and so the same order, and so have w1 and w3.
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
        groups.data.copy_(torch.arange(columns)[order] // weights.group_size)
        matrix = matrix[:, torch.argsort(groups.data, stable=True)]
    if weights.strategy == "block":
        high, wide = weights.block_structure
        seen = matrix.view(rows // high, high, columns // wide, wide).transpose(1, 2).flatten(2)
    elif weights.strategy == "group":
        seen = matrix.view(rows, columns // weights.group_size, -1)
    elif weights.strategy == "channel":
        seen = matrix.view(rows, 1, columns)
    else:
        seen = matrix.view(1, -1)
    scale, _ = calculate_qparams(seen.amin(-1), seen.amax(-1), weights)
    linear.weight_scale.data.copy_(scale.view(linear.weight_scale.shape))
    if getattr(linear, "input_scale", None) is not None:
        linear.input_scale.data.fill_(INPUT_SCALE)


def _fixture(
    name: str,
    weights: dict[str, Any],
    inputs: dict[str, Any] | None,
    activations: str | None,
    arguments: dict[str, Any] | None = None,
) -> Fixture:
    state = tiny()
    linear = [*quantised_modules(), "lm_head"]
    linear += [n.removesuffix(".weight") for n in shapes() if n.endswith(".gate.weight")]
    model = _tree({module: state[f"{module}.weight"] for module in linear})
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    asked = QuantizationConfig.model_validate(
        {"config_groups": {"group_0": group}, "ignore": IGNORED, "kv_cache_scheme": None}
    )
    apply_quantization_config(model, asked)
    modules = {module: model.get_submodule(module) for module in quantised_modules()}
    for module, each in modules.items():
        _calibrate(each, seed=sum(map(ord, module.rpartition(".")[0])) + each.in_features)
    schemes = {module: each.quantization_scheme for module, each in modules.items()}
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    with tempfile.TemporaryDirectory() as folder:
        compressor.update_config(folder)
        written = json.loads((Path(folder) / "config.json").read_text())
    quantization = written["quantization_config"]
    stored = {
        module: {kind: value.clone() for kind, value in each.state_dict().items()}
        for module, each in modules.items()
    }
    unpack = BaseCompressor.get_value_from_registry(quantization["format"]).decompress
    truth = {}
    for module, tensors in stored.items():
        # Scales in fp32 make the library multiply in fp32, which is exact for bf16 scales.
        exact = {**tensors, "weight_scale": tensors["weight_scale"].float()}
        truth[module] = unpack(exact, schemes[module])["weight"]
    more = {"activations": activations, "arguments": arguments or {}}
    return fixture_of(name, quantization, stored, truth, **more)


def fp8_channel() -> Fixture:
    """FP8_DYNAMIC of llm-compressor."""
    inputs = {**_FP8, "strategy": "token", "dynamic": True}
    return _fixture("ct-fp8-channel", {**_FP8, "strategy": "channel"}, inputs, "token-fp8")


def fp8_dynamic() -> Fixture:
    """One scale a matrix, one for all activations of a batch."""
    inputs = {**_FP8, "strategy": "tensor", "dynamic": True}
    return _fixture("ct-fp8-tensor", {**_FP8, "strategy": "tensor"}, inputs, "tensor-fp8")


def fp8_static() -> Fixture:
    """FP8 of llm-compressor: static activations."""
    inputs = {**_FP8, "strategy": "tensor", "dynamic": False}
    return _fixture("ct-fp8-static", {**_FP8, "strategy": "tensor"}, inputs, "static-fp8")


def fp8_blocks() -> Fixture:
    """FP8_BLOCK of llm-compressor, in smaller blocks."""
    weights = {**_FP8, "strategy": "block", "block_structure": [GROUP, GROUP]}
    inputs = {**_FP8, "strategy": "group", "group_size": GROUP, "dynamic": True}
    return _fixture("ct-fp8-blocks", weights, inputs, "group-64")


def int4() -> Fixture:
    """W4A16 of llm-compressor, in smaller groups."""
    weights = {**_INT4, "strategy": "group", "group_size": GROUP}
    return _fixture("ct-int4", weights, None, None)


def int4_channel() -> Fixture:
    """W4A16 with one scale a row."""
    return _fixture("ct-int4-channel", {**_INT4, "strategy": "channel"}, None, None)


def int4_ordered() -> Fixture:
    """W4A16 by GPTQ with activation order: `weight_g_idx` names the group of each column."""
    weights = {**_INT4, "strategy": "group", "group_size": GROUP, "actorder": "group"}
    return _fixture("ct-int4-ordered", weights, None, None)


def int8() -> Fixture:
    """W8A8 of llm-compressor; SGLang has experts for it under another method on CUDA."""
    inputs = {**_INT8, "strategy": "token", "dynamic": True}
    weights = {**_INT8, "strategy": "channel"}
    return _fixture("ct-int8", weights, inputs, "token-int8", {"quantization": "w8a8_int8"})


FIXTURES: Fixtures = {
    "ct-fp8-channel": fp8_channel,
    "ct-fp8-tensor": fp8_dynamic,
    "ct-fp8-static": fp8_static,
    "ct-fp8-blocks": fp8_blocks,
    "ct-int4": int4,
    "ct-int4-channel": int4_channel,
    "ct-int4-ordered": int4_ordered,
    "ct-int8": int8,
}
