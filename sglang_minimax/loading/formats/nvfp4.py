"""NVFP4 by ModelOpt: two e2m1 values in a byte, an e4m3 scale for 16 columns, a scale of the whole.

Layout: ModelOpt's unified checkpoints, SGLang's layers/quantization/modelopt_quant.py
(ModelOptFp4LinearMethod, ModelOptNvFp4FusedMoEMethod). Even columns are the low nibbles.
weight = e2m1 * weight_scale * weight_scale_2; input_scale is amax / (6 * 448) of the activations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from sglang_minimax.errors import ConfigError
from sglang_minimax.loading.formats.base import (
    COLUMNS,
    ROWS,
    Axis,
    Format,
    Kernel,
    Recipe,
    StoredTensor,
)
from sglang_minimax.loading.formats.skips import Skips, check_expression, entries, inside

GROUP = 16
PER_BYTE = 2
FLOAT = frozenset({"F32"})

_SOURCE = "layers/quantization/modelopt_quant.py"
KERNELS = (
    Kernel("cuda", "marlin", _SOURCE, since=80, until=99),
    Kernel(
        "cuda",
        "flashinfer_trtllm_routed",
        "arg_groups/model_overrides/minimax_m2.py",
        since=100,
        until=109,
    ),
    Kernel("cuda", "flashinfer_cutlass", _SOURCE, since=120),
)


def blocks(*, activations: bool = True) -> Format:
    """NVFP4. activations: whether they are quantised too, so that their scale must be there."""
    return Format(
        "nvfp4",
        f"NVFP4 in groups of {GROUP}",
        (
            StoredTensor("weight", (Axis(ROWS), Axis(COLUMNS, per=PER_BYTE)), frozenset({"U8"})),
            StoredTensor(
                "weight_scale",
                (Axis(ROWS), Axis(COLUMNS, per=GROUP)),
                frozenset({"F8_E4M3"}),
                scale=True,
                zero_ok=True,
            ),
            # SGLang keeps those of q, k and v, and of w1 and w3, but some kernels use one for all.
            StoredTensor("weight_scale_2", (), FLOAT, scale=True, equal=True),
            StoredTensor(
                "input_scale",
                (),
                FLOAT,
                scale=True,
                shared=True,
                equal=True,
                optional=not activations,
                everywhere=True,
            ),
        ),
    )


def read(config: Mapping[str, Any]) -> Recipe | None:
    """The recipe of ModelOpt's NVFP4, in config.json or in hf_quant_config.json."""
    nested = config.get("quantization")
    source = nested if isinstance(nested, Mapping) else config
    algorithm = source.get("quant_algo")
    if config.get("quant_method", "modelopt") not in ("modelopt", "modelopt_fp4"):
        return None
    if not isinstance(algorithm, str):
        return None
    if algorithm == "MIXED_PRECISION":
        raise ConfigError(
            "config: quant_algo is MIXED_PRECISION, but all quantised modules must have one "
            "format; quantise all of them to NVFP4, or leave some out."
        )
    if "FP4" not in algorithm:
        return None
    if algorithm not in ("NVFP4", "W4A16_NVFP4"):
        raise ConfigError(
            f"config: quant_algo is {algorithm}, for which SGLang has no experts; quantise to "
            "NVFP4 or W4A16_NVFP4."
        )
    group = _group(source)
    if group != GROUP:
        raise ConfigError(
            f"config: NVFP4 has group_size {group!r}, but the format has {GROUP} only; correct "
            "the quantisation config."
        )
    _check_kv_cache(source)
    form = blocks(activations=algorithm == "NVFP4")
    return Recipe("nvfp4", "modelopt_fp4", form, modelopt_skips(source, nested is source), KERNELS)


def _group(source: Mapping[str, Any]) -> Any:
    """The size of a group, wherever it is written."""
    if source.get("group_size") is not None:
        return source["group_size"]
    for group in (source.get("config_groups") or {}).values():
        return group.get("weights", {}).get("group_size", GROUP)
    return GROUP


def _check_kv_cache(source: Mapping[str, Any]) -> None:
    """SGLang reads scales of an FP8 cache only."""
    scheme = source.get("kv_cache_scheme")
    algorithm = source.get("kv_cache_quant_algo")
    if isinstance(scheme, Mapping):
        kept = scheme.get("type") == "float" and scheme.get("num_bits") == 8
        algorithm = "FP8" if kept else f"{scheme.get('num_bits')}-bit {scheme.get('type')}"
    elif isinstance(scheme, str):
        algorithm = scheme.strip()
    if algorithm and str(algorithm).upper() not in ("FP8", "FLOAT8", "AUTO", "NONE"):
        raise ConfigError(
            f"config: the KV cache is {algorithm}, but SGLang reads the scales of an FP8 cache "
            "only; quantise without the KV cache, or with an FP8 one."
        )


def modelopt_skips(source: Mapping[str, Any], nested: bool) -> Skips:
    """`ignore` or `exclude_modules`: names, with * for anything.

    SGLang: modelopt_quant.py, is_layer_excluded for all modules, by the whole name or one part of
    it; quantization/utils.py, is_layer_skipped for linear ones, by name on the boundaries of parts.
    """
    keys = ["ignore", "modules_to_not_convert", "exclude_modules"][2 if nested else 0 :]
    listed = entries(source, *keys)
    key = next((each for each in keys if source.get(each) is not None), keys[-1])
    for entry in listed:
        check_expression(key, entry, _expression(entry))
    skips = Skips(listed, linear=_linear, shards=inside, stacked=_excluded)
    skips.check(key, lambda entry, name: inside(entry, name) or fnmatchcase(name, entry))
    return skips


def _linear(entry: str, module: str) -> bool:
    # The parts of a packed module are asked for instead of it, but a pattern is for itself.
    packed = module.endswith(".qkv_proj")
    return _excluded(entry, module) or (not packed and inside(entry, module))


def _excluded(entry: str, module: str) -> bool:
    pattern = _compiled(entry)
    return any(pattern.fullmatch(name) for name in (module, *module.split(".")))


@lru_cache(maxsize=4096)
def _compiled(entry: str) -> re.Pattern[str]:
    return re.compile(_expression(entry))


def _expression(entry: str) -> str:
    return entry.replace(".", r"\.").replace("*", ".*")
