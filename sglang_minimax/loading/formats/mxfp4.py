"""MXFP4 by Quark: two e2m1 values in a byte, a power of two for each 32 columns.

Layout: Quark's exports, SGLang's layers/quantization/quark/schemes/quark_w4a4_mxfp4.py and
quark_w4a4_mxfp4_moe.py. weight = e2m1 * 2 ** (weight_scale - 127), even columns in the low nibbles;
255 is NaN. Activations are quantised while the model runs, so there is nothing else to load.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
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

GROUP = 32
PER_BYTE = 2
ONE = 127  # 2 ** 0

KERNELS = (
    Kernel("rocm", "aiter", "layers/quantization/quark/schemes/quark_w4a4_mxfp4_moe.py", 95, 99),
)

MXFP4 = Format(
    "mxfp4",
    f"MXFP4 in groups of {GROUP}",
    (
        StoredTensor("weight", (Axis(ROWS), Axis(COLUMNS, per=PER_BYTE)), frozenset({"U8"})),
        # As bytes only: copied as F8_E8M0, the parameter of SGLang would get the powers' integers.
        StoredTensor(
            "weight_scale",
            (Axis(ROWS), Axis(COLUMNS, per=GROUP)),
            frozenset({"U8"}),
            scale=True,
            padding=ONE,
        ),
    ),
)

# What Quark must say of weights and of inputs for SGLang's _is_mx_fp4.
_BOTH = {"dtype": "fp4", "qscheme": "per_group", "group_size": GROUP, "scale_format": "e8m0"}


def read(config: Mapping[str, Any]) -> Recipe | None:
    """The recipe of `quant_method: quark`. Raises ConfigError for a scheme other than MXFP4."""
    if config.get("quant_method") != "quark":
        return None
    for key in ("export", "layer_quant_config", "layer_type_quant_config"):
        if not isinstance(config.get(key), Mapping):
            raise ConfigError(
                f"config: Quark has no {key}, which SGLang looks into; add an object of that name "
                "to quantization_config."
            )
    scheme = config.get("global_quant_config")
    _check_scheme(scheme if isinstance(scheme, Mapping) else {})
    for key in ("layer_quant_config", "layer_type_quant_config"):
        for name, own in config[key].items():
            if any(_spec(own, part) != _spec(scheme, part) for part in ("weight", "input_tensors")):
                raise ConfigError(
                    f"config: {key} has a scheme of its own for {name!r}, but all quantised "
                    "modules must have one; quantise all of them alike, or list some in exclude."
                )
    return Recipe("mxfp4", "quark", MXFP4, _skips(config), KERNELS)


def _spec(scheme: Any, part: str) -> Any:
    """What a scheme says of one of its parts, None where it says nothing."""
    return scheme.get(part) if isinstance(scheme, Mapping) else None


def _check_scheme(scheme: Mapping[str, Any]) -> None:
    for part, dynamic in (("weight", False), ("input_tensors", True)):
        spec = _spec(scheme, part)
        wanted = {**_BOTH, "is_dynamic": dynamic}
        found = spec if isinstance(spec, Mapping) else {}
        for key, value in wanted.items():
            if found.get(key) != value:
                raise ConfigError(
                    f"config: Quark has {key} {found.get(key)!r} for {part}, but MiniMax-M2 runs "
                    f"with MXFP4 only, which has {value!r}; quantise weights and inputs to MXFP4."
                )


def _skips(config: Mapping[str, Any]) -> Skips:
    """`exclude`: full names, or expressions after `re:`; SGLang's quark/utils.py."""
    listed = entries(config, "exclude")
    for entry in listed:
        if entry.startswith("re:"):
            check_expression("exclude", entry, entry[3:])
    skips = Skips(listed, linear=_matches, shards=_matches, stacked=_expert)
    skips.check("exclude", _meant)
    return skips


def _matches(entry: str, module: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], module) is not None
    return entry == module


def _expert(entry: str, module: str) -> bool:
    # One excluded expert excludes all of its layer.
    return _matches(entry, module) or entry.startswith(f"{module}.")


def _meant(entry: str, name: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    return inside(entry, name) or fnmatchcase(name, entry)
