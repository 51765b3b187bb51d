"""AWQ, 4 bits, GEMM: eight columns of the transposed matrix in a word, a zero point for each group.

Layout: AutoAWQ's WQLinear_GEMM, SGLang's layers/quantization/awq/awq.py and its schemes/awq_moe.py.
weight[n, k] = (q[k, n] - zero[k // group, n]) * scale[k // group, n]. Bits 4i to 4i + 3 of a word
are line [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight; zero points have no offset of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_minimax.errors import ConfigError
from sglang_minimax.loading.formats.base import (
    COLUMNS,
    ROWS,
    SCALE_TYPES,
    Axis,
    Format,
    Kernel,
    Recipe,
    StoredTensor,
)
from sglang_minimax.loading.formats.skips import Skips, entries, part

WORDS = frozenset({"I32"})
PER_WORD = 8
GROUPS = (32, 64, 128)

_SOURCE = "layers/quantization/awq/awq.py"
KERNELS = (Kernel("cuda", "marlin", _SOURCE, since=80), Kernel("ascend", "ascend", _SOURCE))


def grouped(group: int) -> Format:
    """AWQ with one scale and zero point for each `group` columns. Zero minus zero is padding."""
    word, lines = Axis(ROWS, per=PER_WORD), Axis(COLUMNS, per=group)
    return Format(
        "awq",
        f"AWQ in groups of {group}",
        (
            StoredTensor("qweight", (Axis(COLUMNS), word), WORDS),
            StoredTensor("qzeros", (lines, word), WORDS),
            StoredTensor("scales", (lines, Axis(ROWS)), SCALE_TYPES, scale=True, padding=1),
        ),
    )


def read(config: Mapping[str, Any]) -> Recipe | None:
    """The recipe of `quant_method: awq`. Raises ConfigError for what SGLang has no experts for."""
    if str(config.get("quant_method", "")).lower() != "awq":
        return None
    for key, short in (("bits", "w_bit"), ("group_size", "q_group_size")):
        if config.get(key) is None and config.get(short) is not None:
            raise ConfigError(
                f"config: AWQ has {short} but not {key}, without which SGLang leaves the experts "
                f"unquantised; rename {short} to {key} in quantization_config."
            )
    bits, group = config.get("bits"), config.get("group_size")
    if bits != 4:
        raise ConfigError(
            f"config: AWQ has bits {bits!r}, but SGLang has experts for 4 only; quantise to 4 bits."
        )
    version = config.get("version", "gemm")
    if str(version).lower() != "gemm":
        raise ConfigError(
            f"config: AWQ has version {version!r}, but SGLang reads the words of 'gemm' only; "
            "export the checkpoint as GEMM."
        )
    if isinstance(group, bool) or group not in GROUPS:
        raise ConfigError(
            f"config: AWQ has group_size {group!r}, but SGLang has experts for "
            f"{', '.join(map(str, GROUPS))} only; quantise in groups of 128."
        )
    if config.get("zero_point") is not True:
        raise ConfigError(
            f"config: AWQ has zero_point {config.get('zero_point')!r}, but SGLang has experts with "
            "zero points only; quantise with zero_point true."
        )
    # SGLang: awq.is_layer_skipped_awq, any part of the name of its own module.
    skips = Skips(entries(config, "modules_to_not_convert"), linear=part, stacked=part)
    skips.check("modules_to_not_convert", part)
    return Recipe("awq", "awq", grouped(group), skips, KERNELS)
