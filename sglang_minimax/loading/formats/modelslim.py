"""ModelSlim for Ascend: INT8 weights, activations quantised for each token or by a stored scale.

Layout: msmodelslim's exports, SGLang's layers/quantization/modelslim/modelslim.py and its schemes.
The description says of every tensor FLOAT, W8A8 (static activations) or W8A8_DYNAMIC:
dynamic: weight = q * weight_scale; static: weight = q * deq_scale / input_scale, and quant_bias is
added to the integer product before deq_scale multiplies it. Offsets of weights are zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from sglang_minimax.errors import ConfigError
from sglang_minimax.loading.formats.base import (
    COLUMNS,
    PLAIN,
    ROWS,
    SCALE_TYPES,
    Axis,
    Format,
    Kernel,
    Recipe,
    StoredTensor,
)
from sglang_minimax.loading.names import TensorName, parse

DESCRIPTION = "quant_model_description.json"
INT8 = frozenset({"I8"})

KERNELS = (Kernel("ascend", "ascend", "layers/quantization/modelslim/modelslim.py"),)

_WEIGHT = StoredTensor("weight", (Axis(ROWS), Axis(COLUMNS)), INT8)
_SCALE = StoredTensor(
    "weight_scale", (Axis(ROWS), Axis(size=1)), SCALE_TYPES, scale=True, padding=1
)
_OFFSET = StoredTensor(
    "weight_offset",
    (Axis(ROWS), Axis(size=1)),
    SCALE_TYPES | {"I8", "I32"},
    optional=True,
    only=0,
)

DYNAMIC = Format("modelslim-dynamic", "ModelSlim W8A8_DYNAMIC", (_WEIGHT, _SCALE, _OFFSET))
STATIC = Format(
    "modelslim-static",
    "ModelSlim W8A8",
    (
        _WEIGHT,
        # SGLang has one of each for q, k and v.
        StoredTensor(
            "input_scale", (Axis(size=1),), SCALE_TYPES, scale=True, shared=True, equal=True
        ),
        StoredTensor(
            "input_offset",
            (Axis(size=1),),
            SCALE_TYPES | {"I8", "I32"},
            shared=True,
            equal=True,
        ),
        StoredTensor("quant_bias", (Axis(ROWS),), frozenset({"I32"})),
        # For FP16 models the bits of the floats, as 64-bit integers.
        StoredTensor("deq_scale", (Axis(ROWS),), frozenset({"F32", "I64"}), scale=True),
        # SGLang has a place for them, and no use.
        replace(_SCALE, optional=True),
        _OFFSET,
    ),
)
FORMATS: Mapping[str, Format] = MappingProxyType(
    {"FLOAT": PLAIN, "W8A8": STATIC, "W8A8_DYNAMIC": DYNAMIC}
)

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class Described(Recipe):
    """A recipe that names the format of every module. formats: those that are not plain."""

    formats: Mapping[str, Format] = field(default_factory=dict, hash=False)

    def format_of(self, module: str) -> Format:
        """The format of a module under its published name; plain where nothing is said of it."""
        return self.formats.get(module, PLAIN)


def read(config: Mapping[str, Any]) -> Recipe | None:
    """The recipe of a quant_model_description.json. Raises ConfigError for what has no kernel."""
    if config.get("quant_method") != "modelslim" and "model_quant_type" not in config:
        return None
    said: dict[str, dict[str, str]] = {}
    for name, word in config.items():
        if name.endswith("norm.bias"):
            raise ConfigError(
                f"{DESCRIPTION} has {name}, but the norms of MiniMax-M2 have no bias; quantise "
                "without outlier suppression that moves it there."
            )
        record = parse(name) if name.endswith(".weight") else None
        if record is None or not isinstance(word, str):
            continue
        module = _module(record)
        if module is not None:
            said.setdefault(module, {})[name] = word
        elif word != "FLOAT":
            raise ConfigError(
                f"{DESCRIPTION} says that {name} is {word}, but only attention and experts can be "
                "quantised; leave it out when quantising."
            )
    formats = {module: _format(module, words) for module, words in said.items()}
    if not any(_is_experts(module) for module in formats):
        raise ConfigError(
            f"{DESCRIPTION} names no expert, for which SGLang looks there; copy the file that "
            "belongs to the checkpoint."
        )
    for module, form in formats.items():
        _check_module(module, form, formats)
    quantised = {module: form for module, form in formats.items() if form is not PLAIN}
    return Described("modelslim", "modelslim", DYNAMIC, kernels=KERNELS, formats=quantised)


def _module(record: TensorName) -> str | None:
    """The module whose format a tensor's entry decides, None for what is never quantised."""
    if record.layer is None:
        return None
    path = f"model.layers.{record.layer}"
    if record.module == "experts":
        return f"{path}.block_sparse_moe.experts"
    return f"{path}.self_attn.{record.module}" if record.module in _ATTENTION else None


def _is_experts(module: str) -> bool:
    return module.endswith(".experts")


def _format(module: str, words: Mapping[str, str]) -> Format:
    """The one format of all matrices of a module; SGLang looks at the first expert alone."""
    (first, word), *others = words.items()
    for name, other in others:
        if other != word:
            raise ConfigError(
                f"{DESCRIPTION} says that {first} is {word} and {name} is {other}, but SGLang has "
                "one module for both; quantise them alike."
            )
    known = ("W8A8_DYNAMIC",) if _is_experts(module) else tuple(FORMATS)
    if word not in known:
        raise ConfigError(
            f"{DESCRIPTION} says that {first} is {word}, but MiniMax-M2 runs with "
            f"{' or '.join(known)} there; quantise it so."
        )
    return FORMATS[word]


def _check_module(module: str, form: Format, formats: Mapping[str, Format]) -> None:
    """q, k and v are one module of SGLang, which has the format of q."""
    parent, _, last = module.rpartition(".")
    if last not in ("k_proj", "v_proj"):
        return
    query = formats.get(f"{parent}.q_proj", PLAIN)
    if form is not query:
        raise ConfigError(
            f"{DESCRIPTION} says that {parent}.q_proj is {query.title} and {last} is {form.title}, "
            "but SGLang has one module for both; quantise them alike."
        )
