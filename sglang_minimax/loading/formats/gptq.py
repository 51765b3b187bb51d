"""GPTQ, 4 bits, symmetric: eight rows of the transposed matrix in a word, g_idx names their groups.

Layout: AutoGPTQ and GPTQModel, SGLang's layers/quantization/gptq/gptq.py and gptq/schemes/.
weight[n, k] = (q[k, n] - 8) * scale[g_idx[k], n]; bits 4i to 4i + 3 of word j are line 8j + i. The
zero points are 8 everywhere, stored as 7 by the first version of the format; SGLang's kernel takes
that for granted and reads none. With act-order (desc_act) groups are spread over the columns, so
every rank keeps all scales.
"""

from __future__ import annotations

import re
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
from sglang_minimax.loading.formats.skips import Skips, check_expression

WORDS = frozenset({"I32"})
PER_WORD = 8
GROUPS = (-1, 32, 64, 128)
# Eight nibbles of 7 and of 8 as signed words.
SEVENS, EIGHTS = 0x77777777, 0x88888888 - 2**32

_SOURCE = "layers/quantization/gptq/gptq.py"
KERNELS = (Kernel("cuda", "marlin", _SOURCE, since=80), Kernel("ascend", "ascend", _SOURCE))


def grouped(group: int, *, act_order: bool = False, version: int = 1) -> Format:
    """GPTQ with one scale for each `group` columns, -1 for one a row.

    act_order: columns belong to groups in any order. version: of the format, 1 or 2.
    """
    act_order = act_order and group > 0  # a single group has no order
    groups = Axis(COLUMNS, per=group, whole=act_order) if group > 0 else Axis(size=1)
    zeros = SEVENS if version == 1 else EIGHTS
    word = Axis(ROWS, per=PER_WORD)
    width = f"groups of {group}" if group > 0 else "whole rows"
    return Format(
        "gptq-act-order" if act_order else "gptq",
        f"GPTQ in {width}{', with act-order' if act_order else ''}",
        (
            StoredTensor("qweight", (Axis(COLUMNS, per=8), Axis(ROWS)), WORDS, padding=EIGHTS),
            StoredTensor("qzeros", (groups, word), WORDS, padding=zeros, only=zeros),
            StoredTensor("scales", (groups, Axis(ROWS)), SCALE_TYPES, scale=True, padding=1),
            # SGLang has one for q, k and v, and one for w1 and w3; without act-order it needs none.
            StoredTensor(
                "g_idx",
                (Axis(COLUMNS),),
                WORDS,
                optional=not act_order,
                shared=True,
                equal=True,
            ),
        ),
        made=frozenset({"g_idx_sort_indices"}),
    )


def read(config: Mapping[str, Any]) -> Recipe | None:
    """The recipe of `quant_method: gptq`. Raises ConfigError for what Marlin does not run."""
    if str(config.get("quant_method", "")).lower() != "gptq":
        return None
    for key in ("bits", "group_size", "sym", "desc_act"):
        if config.get(key) is None:
            raise ConfigError(
                f"config: GPTQ has no {key}, without which SGLang knows no kernel for it; add it "
                "to quantization_config."
            )
    bits, group, act_order = config["bits"], config["group_size"], config["desc_act"]
    if bits != 4:
        raise ConfigError(
            f"config: GPTQ has bits {bits!r}, but MiniMax-M2 runs with 4 only; quantise to 4 bits."
        )
    if config["sym"] is not True:
        raise ConfigError(
            f"config: GPTQ has sym {config['sym']!r}, but SGLang's kernel runs symmetric weights "
            "only; quantise with sym true, or to AWQ."
        )
    if isinstance(group, bool) or group not in GROUPS:
        raise ConfigError(
            f"config: GPTQ has group_size {group!r}, but SGLang's kernel runs "
            f"{', '.join(map(str, GROUPS))} only; quantise in groups of 128."
        )
    if not isinstance(act_order, bool):
        raise ConfigError(f"config: GPTQ has desc_act {act_order!r}, but it must be true or false.")
    if config.get("lm_head"):
        raise ConfigError(
            "config: GPTQ has lm_head true, but the head is kept in full precision; quantise "
            "with lm_head false."
        )
    written = config.get("checkpoint_format") or "gptq"
    if written not in ("gptq", "gptq_v2"):
        raise ConfigError(
            f"config: GPTQ has checkpoint_format {written!r}, but gptq and gptq_v2 can be read "
            "only; export the checkpoint as gptq."
        )
    skips = _skips(config)
    form = grouped(group, act_order=act_order, version=2 if written == "gptq_v2" else 1)
    return Recipe("gptq", "gptq", form, skips, KERNELS, _cut_experts(form))


def _cut_experts(form: Format) -> str | None:
    """Why ranks cannot share an expert: SGLang's gptq_moe.py sizes w2_scales the wrong way round.

    Full where the rank's groups are needed, and cut where g_idx names groups of all ranks.
    """
    groups = form.tensors[2].axes[0]
    if groups.along is None:
        return None
    if groups.whole:
        return "SGLang's GPTQ kernel lacks scales of w2 that act-order names on every rank"
    return "SGLang's GPTQ kernel takes scales of w2 from the wrong groups"


def _skips(config: Mapping[str, Any]) -> Skips:
    """`dynamic`: expressions of modules to leave out (`-:`), or to quantise otherwise.

    SGLang (quantization/utils.py: get_dynamic_override) looks at the first that matches, for its
    linear modules only, of which qkv_proj is one.
    """
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise ConfigError(f"config: dynamic is {dynamic!r}, but it must be an object.")
    left_out = []
    for entry, values in dynamic.items():
        expression = entry[2:] if entry[:2] in ("-:", "+:") else entry
        check_expression("dynamic", entry, expression)
        if entry.startswith("-:"):
            left_out.append(expression)
            continue
        for key, value in dict(values or {}).items():
            if key in config and value != config[key]:
                raise ConfigError(
                    f"config: dynamic gives {entry!r} {key} {value!r} where the rest has "
                    f"{config[key]!r}, but SGLang quantises all experts alike; quantise all "
                    "modules alike, or leave some out with '-:'."
                )
    skips = Skips(tuple(left_out), linear=_expression)
    skips.check("dynamic", _expression)
    return skips


def _expression(entry: str, module: str) -> bool:
    return re.match(entry, module) is not None
