"""The table of docs/formats.md: `python -m sglang_minimax.loading.formats.table` prints it.

A row is what `recipe_of` makes of a config as the quantiser's tool writes it, with published sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from sglang_minimax.loading.formats import recipe_of
from sglang_minimax.loading.formats.base import COLUMNS, ROWS, Axis, Format, Recipe, StoredTensor
from sglang_minimax.loading.formats.modelslim import DESCRIPTION
from sglang_minimax.loading.names import TensorName, spell

HEADER = (
    "format",
    "config",
    "tensors of a matrix of r rows and c columns",
    "unit",
    "expert kernels of SGLang",
    "limits",
)

Config = Mapping[str, Any]


class Example(NamedTuple):
    """A config of one format. keys: of it, those that tell it from others, for people.

    module: the one whose tensors are shown, where formats differ between modules.
    """

    keys: str
    config: Config | None
    module: str = "experts"


def _compressed(weights: Config, inputs: Config | None, form: str) -> Config:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {**group, "format": form}},
        "ignore": ["lm_head", "re:.*block_sparse_moe\\.gate$"],
    }


def _float(strategy: str, **more: Any) -> Config:
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **more}


def _int(bits: int, strategy: str, **more: Any) -> Config:
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, **more}


def _gptq(group: int, act_order: bool = False) -> Config:
    sizes = {"bits": 4, "group_size": group, "sym": True, "desc_act": act_order}
    return {"quant_method": "gptq", **sizes}


def _mxfp4() -> Config:
    both = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    scheme = {
        "weight": {**both, "is_dynamic": False},
        "input_tensors": {**both, "is_dynamic": True},
    }
    empty: dict[str, Any] = {"export": {}, "layer_quant_config": {}, "layer_type_quant_config": {}}
    return {"quant_method": "quark", "global_quant_config": scheme, **empty}


def _modelslim(attention: str) -> Config:
    said = {
        spell(TensorName(0, module, "weight")): attention
        for module in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    experts = {
        spell(TensorName(0, "experts", "weight", 0, matrix)): "W8A8_DYNAMIC"
        for matrix in ("w1", "w2", "w3")
    }
    return {"quant_method": "modelslim", **said, **experts}


_FP8_BLOCKS = {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_TOKEN = _float("token", dynamic=True)
_BLOCK = _float("block", block_structure=[128, 128])
_GROUPS = _float("group", group_size=128, dynamic=True)
_INT8 = _compressed(_int(8, "channel"), _int(8, "token", dynamic=True), "int-quantized")

_QUANTIZED, _PACKED = "float-quantized", "pack-quantized"

EXAMPLES: tuple[Example, ...] = (
    Example("none", None),
    Example("`fp8`, `weight_block_size`", {"quant_method": "fp8", **_FP8_BLOCKS}),
    Example(
        "`fp8`, `activation_scheme: dynamic`",
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
    ),
    Example(
        "`fp8`, `activation_scheme: static`",
        {"quant_method": "fp8", "activation_scheme": "static"},
    ),
    Example(
        "`modelopt`, `quant_algo: FP8`; also in `hf_quant_config.json`",
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ),
    Example(
        "`compressed-tensors`, `float-quantized`, block",
        _compressed(_BLOCK, _GROUPS, _QUANTIZED),
    ),
    Example(
        "`compressed-tensors`, `float-quantized`, channel",
        _compressed(_float("channel"), _TOKEN, _QUANTIZED),
    ),
    Example(
        "`compressed-tensors`, `float-quantized`, tensor, dynamic",
        _compressed(_float("tensor"), _float("tensor", dynamic=True), _QUANTIZED),
    ),
    Example(
        "`compressed-tensors`, `float-quantized`, tensor, static",
        _compressed(_float("tensor"), _float("tensor", dynamic=False), _QUANTIZED),
    ),
    Example("`compressed-tensors`, `int-quantized`", _INT8),
    Example(
        "`compressed-tensors`, `pack-quantized`, group",
        _compressed(_int(4, "group", group_size=128), None, _PACKED),
    ),
    Example(
        "`compressed-tensors`, `pack-quantized`, channel",
        _compressed(_int(4, "channel"), None, _PACKED),
    ),
    Example(
        "`compressed-tensors`, `pack-quantized`, `actorder: group`",
        _compressed(_int(4, "group", group_size=128, actorder="group"), None, _PACKED),
    ),
    Example(
        "`awq`, `version: gemm`",
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 128,
            "zero_point": True,
            "version": "gemm",
        },
    ),
    Example("`gptq`, `group_size: 128`", _gptq(128)),
    Example("`gptq`, `group_size: -1`", _gptq(-1)),
    Example("`gptq`, `desc_act: true`", _gptq(128, act_order=True)),
    Example(
        "`modelopt`, `quant_algo: NVFP4` or `W4A16_NVFP4`; also in `hf_quant_config.json`",
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    ),
    Example("`quark`, `global_quant_config` of fp4, e8m0", _mxfp4()),
    Example(f"`{DESCRIPTION}`, `W8A8_DYNAMIC`", _modelslim("W8A8_DYNAMIC")),
    Example(f"`{DESCRIPTION}`, `W8A8` (attention only)", _modelslim("W8A8"), "attention"),
)


def rendered() -> str:
    """The table, in Markdown."""
    return markdown(HEADER, (row(example) for example in EXAMPLES))


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table as README and docs have it."""
    head = tuple(header)
    lines = [head, ("---",) * len(head), *map(tuple, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row(example: Example) -> tuple[str, ...]:
    """The cells of one format. Raises ConfigError for an example that is refused."""
    recipe = recipe_of(example.config)
    form = shown(recipe, example)
    return (
        form.title,
        example.keys,
        ", ".join(map(_tensor, form.tensors)),
        f"{form.unit(ROWS)} x {form.unit(COLUMNS)}",
        "; ".join(_kernels(recipe)) if example.module == "experts" else "none",
        "; ".join(_limits(recipe)),
    )


def shown(recipe: Recipe, example: Example) -> Format:
    """The format of the module that an example is about."""
    path = "model.layers.0."
    experts = example.module == "experts"
    return recipe.format_of(path + ("block_sparse_moe.experts" if experts else "self_attn.q_proj"))


def _tensor(stored: StoredTensor) -> str:
    only = next(iter(stored.types)) + " " if len(stored.types) == 1 else ""
    shape = ", ".join(map(_extent, stored.axes))
    maybe = " (may be missing)" if stored.optional else ""
    return f"`{stored.kind}` {only}[{shape}]{maybe}"


def _extent(axis: Axis) -> str:
    if axis.along is None:
        return str(axis.size)
    side = "r" if axis.along == ROWS else "c"
    part = side if axis.per == 1 else f"{side}/{axis.per}"
    return f"all of {part}" if axis.whole else part


def _kernels(recipe: Recipe) -> Iterator[str]:
    if recipe.method is None:
        yield "SGLang's unquantised ones"
    for kernel in recipe.kernels:
        yield f"{kernel}: {kernel.name}"


def _limits(recipe: Recipe) -> Iterator[str]:
    if recipe.cut_experts:
        yield "whole experts only (`--ep-size` as large as `--tp-size`)"
    for kernel in recipe.kernels:
        if kernel.method:
            yield f"on {kernel.hardware}: `--quantization {kernel.method}`"


if __name__ == "__main__":
    print(rendered())
