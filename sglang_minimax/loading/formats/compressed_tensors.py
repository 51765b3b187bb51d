"""compressed-tensors, as llm-compressor writes it: FP8, INT8, and 4-bit integers in groups.

Stored, for a matrix [out, in] and groups of 128:
  float-quantized   weight [out, in] F8_E4M3; weight_scale [1], [out, 1] or [out/128, in/128];
                    with static activations input_scale [1] as well
  int-quantized     weight [out, in] I8; weight_scale [out, 1]
  pack-quantized    weight_packed [out, in/8] I32, value i of a word in bits 4i to 4i+3, plus 8;
                    weight_scale [out, in/128] or [out, 1]; weight_shape [2], out and in; with
                    activation order weight_g_idx [in] I32, the group of each column
Source: compressed_tensors 0.18 (compressors/pack_quantized, compressors/naive_quantized);
SGLang layers/quantization/compressed_tensors/ (compressed_tensors.py: get_linear_scheme,
get_moe_scheme; schemes/*_moe.py) and layers/quantization/w8a8_int8.py; vLLM has the same layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from sglang_minimax.errors import ConfigError
from sglang_minimax.loading.formats import fp8
from sglang_minimax.loading.formats.base import (
    COLUMNS,
    ROWS,
    SCALE_TYPES,
    Axis,
    Format,
    Kernel,
    Names,
    Recipe,
    StoredTensor,
)
from sglang_minimax.loading.formats.skips import check_expression, entries

METHOD = "compressed-tensors"

_SCHEMES = "layers/quantization/compressed_tensors/compressed_tensors.py"
# get_min_capability of the FP8 experts says 8.0, but Triton multiplies e4m3 from 8.9 on.
FP8_KERNELS: tuple[Kernel, ...] = (
    Kernel("cuda", "triton", _SCHEMES, since=89),
    Kernel("rocm", "triton", _SCHEMES),
)
# On CUDA only under this method; get_moe_scheme raises NotImplementedError without it.
INT8_KERNELS: tuple[Kernel, ...] = (
    Kernel("cuda", "triton", "layers/quantization/w8a8_int8.py", since=75, method="w8a8_int8"),
    Kernel("ascend", "npu", _SCHEMES),
)
# Not Ascend: it has experts for these, but no attention projections.
INT4_KERNELS: tuple[Kernel, ...] = (
    Kernel("cuda", "marlin", _SCHEMES, since=80),
    Kernel("rocm", "triton", _SCHEMES),
)
KERNELS: tuple[Kernel, ...] = (*FP8_KERNELS, *INT8_KERNELS, *INT4_KERNELS)

# marlin_utils.MARLIN_SUPPORTED_GROUP_SIZES, without -1, which is a strategy of its own here.
GROUPS = (32, 64, 128)
# A word of eight values that are all zero, which is stored as 8, as a signed number.
PACKED_ZEROS = 0x88888888 - 2**32

# What SGLang looks for in `targets` and in `ignore`: it has one module for all experts of a layer,
# and its own names for their matrices. Published name, SGLang's name, SGLang's class.
_MODULES = (
    ("self_attn.q_proj", "self_attn.q_proj", "QKVParallelLinear"),
    ("self_attn.k_proj", "self_attn.k_proj", "QKVParallelLinear"),
    ("self_attn.v_proj", "self_attn.v_proj", "QKVParallelLinear"),
    ("self_attn.o_proj", "self_attn.o_proj", "RowParallelLinear"),
    ("block_sparse_moe.experts.0.w1", "block_sparse_moe.experts.0.gate_proj", "FusedMoE"),
    ("block_sparse_moe.experts.0.w3", "block_sparse_moe.experts.0.up_proj", "FusedMoE"),
    ("block_sparse_moe.experts.0.w2", "block_sparse_moe.experts.0.down_proj", "FusedMoE"),
)
_LAYER = re.compile(r"\blayers\\?\.(\d+)\b")


def fp8_per_channel() -> Format:
    """FP8 with one scale for each row."""
    return Format("fp8-channel", "FP8 per channel", (fp8.WEIGHT, _row_scale()))


def int8() -> Format:
    """INT8 with one scale for each row."""
    weight = StoredTensor("weight", (Axis(ROWS), Axis(COLUMNS)), frozenset({"I8"}))
    return Format("int8", "INT8 per channel (W8A8)", (weight, _row_scale()))


def int4(group: int | None, g_idx: bool = False) -> Format:
    """Symmetric 4-bit integers in int32 words.

    group: columns that share a scale; None for one scale a row. g_idx: whether the group of each
    column is stored, and any rank's columns may be of any group.
    """
    packed = StoredTensor(
        "weight_packed",
        (Axis(ROWS), Axis(COLUMNS, per=8)),
        frozenset({"I32"}),
        padding=PACKED_ZEROS,
    )
    scale = _row_scale()
    if group is not None:
        axes = (Axis(ROWS), Axis(COLUMNS, per=group, whole=g_idx))
        scale = StoredTensor("weight_scale", axes, SCALE_TYPES, scale=True, padding=1)
    shape = StoredTensor(
        "weight_shape", (Axis(size=2),), frozenset({"I64", "I32"}), dimensions=True, shared=True
    )
    order = StoredTensor(
        "weight_g_idx", (Axis(COLUMNS),), frozenset({"I32"}), shared=True, equal=True
    )
    what = f"in groups of {group}" if group else "per channel"
    return Format(
        "int4-ordered" if g_idx else "int4",
        f"4-bit integers {what} (W4A16)" + (" in activation order" if g_idx else ""),
        (packed, scale, shape, *((order,) if g_idx else ())),
        made=frozenset({"weight_g_idx", "g_idx_sort_indices"}),
    )


def _row_scale() -> StoredTensor:
    axes = (Axis(ROWS), Axis(size=1))
    return StoredTensor("weight_scale", axes, SCALE_TYPES, scale=True, padding=1)


def read(config: Mapping[str, Any]) -> Recipe | None:
    """The recipe of `quant_method: compressed-tensors`, where it is none of 4-bit floats.

    Raises ConfigError for what SGLang cannot run, or would run wrong without a word.
    """
    if config.get("quant_method", METHOD) != METHOD or "config_groups" not in config:
        return None
    group, targets = _one_group(config)
    weights, inputs = group["weights"], group["input_activations"]
    if weights.get("type") == "float" and weights.get("num_bits") == 4:
        return None
    _check_extras(config, group)
    ignored = entries(config, "ignore")
    for each in (*ignored, *targets):
        if each.startswith("re:"):
            check_expression("ignore or targets", each, each[3:])
    _check_names(targets, ignored)
    if weights.get("dynamic") or not weights.get("symmetric", True):
        kind = "dynamic" if weights.get("dynamic") else "asymmetric"
        _refuse(
            f"weights are {kind}, but SGLang cannot load {kind} experts",
            "quantise the checkpoint with static symmetric weights",
        )
    left = Names(ignored, style="regex")
    width = (weights.get("type", "int"), weights.get("num_bits", 8))
    packed = group["format"] == "pack-quantized"
    if width == ("float", 8) and not packed:
        form = _fp8(weights, inputs, targets)
        return Recipe(f"ct-{form.name}", METHOD, form, left, FP8_KERNELS)
    if width == ("int", 8) and not packed:
        _check_int8(weights, inputs)
        return Recipe("ct-int8", METHOD, int8(), left, INT8_KERNELS)
    if width == ("int", 4) and packed:
        return _int4(weights, inputs, left)
    _refuse(
        f"weights are {width[1]}-bit {width[0]} in the format {group['format']!r}, which SGLang "
        "does not run for MiniMax-M2",
        "use 8-bit float, 8-bit int, or 4-bit int as pack-quantized",
    )


def _refuse(what: str, remedy: str) -> NoReturn:
    raise ConfigError(f"config: compressed-tensors {what}; {remedy}.")


def _one_group(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The one scheme of all groups, and what they target. SGLang has one for all experts."""
    groups = config["config_groups"]
    if not isinstance(groups, Mapping) or not groups:
        _refuse(f"config_groups is {groups!r}", "it must name a group with targets and weights")
    schemes: list[dict[str, Any]] = []
    targets: list[str] = []
    for name, group in groups.items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            _refuse(f"group {name} has no weights", "correct config_groups in config.json")
        scheme = {
            "weights": group["weights"],
            "input_activations": group.get("input_activations") or None,
            "output_activations": group.get("output_activations") or None,
            "format": group.get("format") or config.get("format"),
        }
        if schemes and scheme != schemes[0]:
            _refuse(
                f"groups {next(iter(groups))} and {name} differ, and mixed precision is not "
                "supported for MiniMax-M2",
                "quantise attention and experts in one way, or leave one of them out",
            )
        schemes.append(scheme)
        targets += entries(group, "targets")
    return schemes[0], tuple(targets)


def _check_extras(config: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """What SGLang does not read, or reads for other models."""
    if group["output_activations"]:
        _refuse(
            "output_activations are quantised, which SGLang leaves out without a word",
            "quantise the checkpoint without them",
        )
    for key in ("sparsity_config", "transform_config", "linear_fp8_config"):
        extra = config.get(key)
        if extra and not (isinstance(extra, Mapping) and extra.get("format") == "dense"):
            _refuse(f"has a {key}, which is not supported for MiniMax-M2", "quantise without it")
    # Experts go by the format of the whole, the others by that of their group.
    if config.get("format") not in (None, group["format"]):
        _refuse(
            f"format is {config.get('format')!r}, but that of its group is {group['format']!r}, "
            "and SGLang reads the first for experts and the second for the others",
            "write the same to both in config.json",
        )


def _check_names(targets: tuple[str, ...], ignored: tuple[str, ...]) -> None:
    """SGLang must find a scheme for each module, or leave out what the quantiser has left out."""
    listed = Names(ignored, style="regex")
    layers = {"0", *(number for entry in ignored for number in _LAYER.findall(entry))}
    for layer in sorted(layers, key=int):
        found: dict[str, set[bool]] = {}
        for published, own, kind in _MODULES:
            path = f"model.layers.{layer}"
            left = f"{path}.{published}" in listed
            found.setdefault(kind, set()).update((left, f"{path}.{own}" in listed))
            if not left and not _targeted(targets, f"{path}.{own}", kind):
                _refuse(
                    f"targets {list(targets)} leave out {path}.{own}, for which SGLang then finds "
                    "no scheme",
                    'target "Linear", and name what is not quantised in ignore',
                )
        if len(found["QKVParallelLinear"]) > 1:
            _refuse(
                f"ignore names some of q_proj, k_proj and v_proj of layer {layer} and not others, "
                "but SGLang has one module for them",
                "quantise all or none of them",
            )
        if len(found["FusedMoE"]) > 1:
            _refuse(
                f"ignore names some matrices of an expert of layer {layer} and not others, as "
                "w1, w2, w3 or as gate_proj, down_proj, up_proj, which SGLang looks for",
                f"name all of them, as in re:model.layers.{layer}.block_sparse_moe.experts.*, or "
                "the router alone, as in re:.*block_sparse_moe.gate$",
            )


def _targeted(targets: tuple[str, ...], module: str, kind: str) -> bool:
    """SGLang's find_matched_target: by name, else by a part of the class. `Linear` is all."""
    for target in targets:
        if target == "Linear":
            return True
        if target.startswith("re:"):
            if re.match(target[3:], module):
                return True
        elif target == module or target.lower() in kind.lower():
            return True
    return False


def _fp8(
    weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, targets: tuple[str, ...]
) -> Format:
    """The format of 8-bit floats, for the pairs that SGLang's experts take."""
    strategy = weights.get("strategy", "tensor")
    if inputs is None:
        _refuse(
            "has FP8 weights without input_activations, but SGLang's experts quantise both",
            "use a checkpoint with FP8 activations, such as FP8_DYNAMIC",
        )
    if (inputs.get("type"), inputs.get("num_bits", 8)) != ("float", 8):
        _refuse(
            f"has FP8 weights with {inputs.get('num_bits', 8)}-bit {inputs.get('type', 'int')} "
            "activations, but SGLang's experts quantise both to FP8",
            "use a checkpoint with FP8 activations, such as FP8_DYNAMIC",
        )
    dynamic = bool(inputs.get("dynamic"))
    pair = (strategy, inputs.get("strategy", "token" if dynamic else "tensor"), dynamic)
    if pair == ("channel", "token", True):
        return fp8_per_channel()
    if pair[:2] == ("tensor", "tensor") and inputs.get("symmetric", True):
        return fp8.per_tensor(static=not dynamic)
    if strategy == "block" and dynamic:
        rows, columns = fp8.block_sides(weights.get("block_structure"), "block_structure")
        if "Linear" not in targets:
            _refuse(
                f"has blocks of {rows}x{columns} with the targets {list(targets)}, but SGLang "
                "looks for the block of the target Linear",
                'target "Linear"',
            )
        return fp8.blocks(rows, columns, "weight_scale")
    when = "dynamic" if dynamic else "static"
    _refuse(
        f"has FP8 weights per {strategy} with {when} activations per {pair[1]}, which SGLang's "
        "experts do not take",
        "use weights per channel with dynamic activations per token (FP8_DYNAMIC), both per "
        "tensor, or blocks with dynamic activations",
    )


def _check_int8(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> None:
    """SGLang assumes rows and dynamic symmetric tokens, whatever the config says."""
    inputs = inputs or {}
    found = {
        "weights": weights.get("strategy"),
        "activations": inputs.get("strategy"),
        "bits": inputs.get("num_bits", 8 if inputs else None),
        "type": inputs.get("type", "int"),
        "dynamic": bool(inputs.get("dynamic")),
        "symmetric": inputs.get("symmetric", True),
    }
    wanted = {
        "weights": "channel",
        "activations": "token",
        "bits": 8,
        "type": "int",
        "dynamic": True,
        "symmetric": True,
    }
    wrong = [f"{key} {found[key]!r}" for key in wanted if found[key] != wanted[key]]
    if wrong:
        _refuse(
            f"has INT8 with {', '.join(wrong)}, but SGLang runs weights per channel with dynamic "
            "symmetric 8-bit activations per token, whatever the config says",
            "quantise the checkpoint so (W8A8)",
        )


def _int4(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, left: Names) -> Recipe:
    if inputs is not None:
        _refuse(
            "has 4-bit weights with quantised activations, which SGLang runs on no GPU for them",
            "use a checkpoint of weights alone (W4A16)",
        )
    strategy = weights.get("strategy")
    if strategy not in ("group", "channel"):
        _refuse(f"has 4-bit weights per {strategy}", "use groups of 32, 64 or 128, or channels")
    group = weights.get("group_size") if strategy == "group" else None
    if strategy == "group" and (isinstance(group, bool) or group not in GROUPS):
        _refuse(
            f"group_size is {group!r}, but SGLang's kernels have groups of 32, 64 and 128",
            "quantise the checkpoint in one of these",
        )
    order = weights.get("actorder") or None
    order = "group" if order is True else order
    if order not in (None, "static", "weight", "group"):
        _refuse(
            f"actorder is {order!r}, for which SGLang leaves out the order of the experts' columns",
            'quantise the checkpoint with actorder "static", or rename it to "group" in '
            "config.json, which means the same",
        )
    cut = None
    if order in ("group", "weight") and group is not None:
        cut = (
            f'with actorder "{order}" SGLang gives every rank room for the scales of all columns '
            "and fills only its own part"
        )
    form = int4(group, g_idx=order == "group")
    return Recipe(f"ct-{form.name}", METHOD, form, left, INT4_KERNELS, cut_experts=cut)
