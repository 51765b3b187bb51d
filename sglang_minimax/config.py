"""One validated view of a MiniMax-M2 configuration, whatever form it comes in.

Forms: the published config.json (flat: `rotary_dim`, `rope_theta`, `scoring_func`, ...), the
transformers >= 5 form (`rope_parameters`, and none of the flat extras), and an object with either
set of attributes. A key that is absent gets the architecture's value; a value that we do not run is
a ConfigError in one sentence. No torch, no SGLang.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from sglang_minimax import ARCHITECTURE
from sglang_minimax.errors import ConfigError
from sglang_minimax.loading.formats import quantisation_config, recipe_of
from sglang_minimax.loading.formats.base import UNQUANTISED, Recipe

MODEL_TYPE = "minimax_m2"

# The architecture's values, which stand in for keys that a configuration does not have.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 3072,
        "num_hidden_layers": 62,
        "vocab_size": 200064,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 1536,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 196608,
        "num_mtp_modules": 0,
        "tie_word_embeddings": False,
    }
)

# Switches of the published configuration that this architecture knows in one position only.
FIXED: Mapping[str, Any] = MappingProxyType(
    {
        "model_type": MODEL_TYPE,
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "use_routing_bias": True,
        "shared_intermediate_size": 0,
        "sliding_window": None,
    }
)

ROPE_TYPES = frozenset({"default", "linear", "dynamic", "yarn", "llama3"})
# Keys of `rope_parameters` that have their own field here.
_ROPE_OWN_KEYS = frozenset({"rope_theta", "partial_rotary_factor", "rope_type", "type"})

_ABSENT = object()


class _Reader:
    """Uniform, checked access to a mapping or to an object's attributes."""

    def __init__(self, source: Mapping[str, Any] | object) -> None:
        self._source = source

    def raw(self, key: str) -> Any:
        """The value under `key`, or _ABSENT."""
        if isinstance(self._source, Mapping):
            return self._source.get(key, _ABSENT)
        return getattr(self._source, key, _ABSENT)

    def present(self, key: str) -> Any:
        """The value under `key`, or _ABSENT where it is missing or null."""
        value = self.raw(key)
        return _ABSENT if value is None else value

    def integer(self, key: str, *, at_least: int = 1) -> int:
        """The whole number under `key`, or the architecture's."""
        value = self.present(key)
        if value is _ABSENT:
            return DEFAULTS[key]
        return _integer(key, value, at_least)

    def positive(self, key: str) -> float:
        """The positive finite number under `key`, or the architecture's."""
        value = self.present(key)
        return DEFAULTS[key] if value is _ABSENT else _positive(key, value)


def _refuse(sentence: str) -> NoReturn:
    raise ConfigError(sentence)


def _integer(key: str, value: Any, at_least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse(f"config: {key} is {value!r}, but it must be a whole number; correct config.json.")
    if value < at_least:
        _refuse(
            f"config: {key} is {value}, but it must be at least {at_least}; correct config.json."
        )
    return value


def _positive(key: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        _refuse(
            f"config: {key} is {value!r}, but it must be a positive finite number; "
            "correct config.json."
        )
    return float(value)


def _check_fixed(reader: _Reader) -> None:
    names = reader.present("architectures")
    if names is not _ABSENT and list(names) and ARCHITECTURE not in names:
        is_draft = any("eagle3" in str(name).lower() for name in names)
        way_out = (
            "it is a draft, name the model that it was trained for beside it (inspect: --target)."
            if is_draft
            else "serve another model without sglang-minimax."
        )
        _refuse(
            f"config: architectures is {list(names)}, but this package runs {ARCHITECTURE} only; "
            + way_out
        )
    for key, only in FIXED.items():
        value = reader.raw(key)
        if value is _ABSENT or value == only or (value is None and key != "sliding_window"):
            continue
        _refuse(
            f"config: {key} is {value!r}, but {ARCHITECTURE} has {only!r} only; "
            f"correct config.json, or serve a model that is not MiniMax-M2 without sglang-minimax."
        )


def _check_attention_kinds(reader: _Reader, num_layers: int) -> None:
    kinds = reader.present("attn_type_list")
    if kinds is not _ABSENT:
        other = [i for i, kind in enumerate(kinds) if kind != 1]
        if other:
            _refuse(
                f"config: attn_type_list asks for linear attention in layer {other[0]} and "
                f"{len(other) - 1} more, which is MiniMax-M1; {ARCHITECTURE} has full attention "
                "(1) in every layer."
            )
        if len(kinds) != num_layers:
            _refuse(
                f"config: attn_type_list names {len(kinds)} layers, but num_hidden_layers is "
                f"{num_layers}; make them agree in config.json."
            )
    names = reader.present("layer_types")
    if names is not _ABSENT and any(name != "full_attention" for name in names):
        _refuse(
            f"config: layer_types contains {sorted(set(names) - {'full_attention'})}, but "
            f"{ARCHITECTURE} has full attention in every layer."
        )


def _rope_parameters(reader: _Reader) -> dict[str, Any]:
    """`rope_parameters` and `rope_scaling` as one dict; transformers >= 5 shows them as aliases."""
    merged: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = reader.present(key)
        if value is _ABSENT:
            continue
        if not isinstance(value, Mapping):
            _refuse(f"config: {key} is {value!r}, but it must be an object; correct config.json.")
        for name, item in value.items():
            if merged.setdefault(name, item) != item:
                _refuse(
                    f"config: rope_scaling says {name} {merged[name]!r} and rope_parameters says "
                    f"{item!r}; keep one of them in config.json."
                )
    return merged


def _agreed(what: str, claims: Mapping[str, Any], default: Any) -> Any:
    """The one value that all present claims share, or the default where nobody claims any."""
    present = {key: value for key, value in claims.items() if value is not _ABSENT}
    if not present:
        return default
    values = list(present.values())
    if any(value != values[0] for value in values):
        said = ", ".join(f"{key} {value!r}" for key, value in present.items())
        _refuse(f"config: {what} is contradictory ({said}); make them agree in config.json.")
    return values[0]


def _rope_theta(reader: _Reader, rope: Mapping[str, Any]) -> float:
    claims = {
        "rope_theta": reader.present("rope_theta"),
        "rope_parameters.rope_theta": rope.get("rope_theta", _ABSENT),
    }
    claims = {k: v if v is _ABSENT else _positive(k, v) for k, v in claims.items()}
    return _agreed("rope_theta", claims, DEFAULTS["rope_theta"])


def _rotary_dim(reader: _Reader, rope: Mapping[str, Any], head_dim: int) -> int:
    """The rotated dimensions of a head; half of them where the configuration says nothing."""
    claims: dict[str, Any] = {}
    direct = reader.present("rotary_dim")
    if direct is not _ABSENT:
        claims["rotary_dim"] = _integer("rotary_dim", direct, 1)
    for key, factor in (
        ("partial_rotary_factor", reader.present("partial_rotary_factor")),
        ("rope_parameters.partial_rotary_factor", rope.get("partial_rotary_factor", _ABSENT)),
    ):
        if factor is not _ABSENT and factor is not None:
            # int() as transformers does; a factor is written by division, hence the rounding.
            claims[key] = int(round(_positive(key, factor) * head_dim, 6))
    dim = _agreed("the rotary dimension", claims, int(DEFAULTS["partial_rotary_factor"] * head_dim))
    if dim < 2 or dim % 2 or dim > head_dim:
        _refuse(
            f"config: the rotary dimension is {dim}, but it must be even, at least 2 and at most "
            f"head_dim {head_dim}; correct rotary_dim or partial_rotary_factor in config.json."
        )
    return dim


def _rope_scaling(rope: Mapping[str, Any]) -> Mapping[str, Any] | None:
    kinds = {"rope_type": rope.get("rope_type", _ABSENT), "type": rope.get("type", _ABSENT)}
    kind = _agreed("the rope type", kinds, "default")
    if kind not in ROPE_TYPES:
        _refuse(
            f"config: rope_type is {kind!r}, but only {', '.join(sorted(ROPE_TYPES))} are known; "
            "correct rope_parameters in config.json."
        )
    if kind == "default":
        return None
    rest = {key: value for key, value in rope.items() if key not in _ROPE_OWN_KEYS}
    return MappingProxyType({"rope_type": kind, **rest})


def _num_experts(reader: _Reader) -> int:
    claims = {
        key: value if value is _ABSENT else _integer(key, value, 1)
        for key in ("num_local_experts", "num_experts")
        for value in [reader.present(key)]
    }
    return _agreed("the number of experts", claims, DEFAULTS["num_local_experts"])


def _recipe(reader: _Reader, folder: Path | None) -> Recipe:
    """What the quantisation config says, wherever in the checkpoint's folder it lies."""
    configs: dict[str, Mapping[str, Any]] = {}
    for key in ("quantization_config", "compression_config"):
        config = reader.present(key)
        if config is _ABSENT:
            continue
        if not isinstance(config, Mapping):
            # transformers makes an object of it.
            to_dict = getattr(config, "to_dict", None)
            if to_dict is None:
                _refuse(f"config: {key} is {config!r}, but it must be an object.")
            config = to_dict()
        configs[key] = config
    if folder is not None:
        return recipe_of(quantisation_config(folder, configs))
    return recipe_of(next(iter(configs.values()), None))


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape and the constants of one MiniMax-M2 model; every field has been checked."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = field(hash=False)
    rms_norm_eps: float
    max_position: int
    num_experts: int
    top_k: int
    expert_width: int
    num_mtp_modules: int
    tie_word_embeddings: bool
    # How the checkpoint stores its matrices.
    recipe: Recipe = UNQUANTISED

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | object, folder: Path | None = None
    ) -> Architecture:
        """Read a parsed config.json or a configuration object in any of the known forms.

        folder: of the checkpoint, for quantisation tools that write a file of their own. Raises
        ConfigError, in one sentence, for a value that is unknown, contradictory or unusable.
        """
        reader = _Reader(config)
        _check_fixed(reader)
        num_layers = reader.integer("num_hidden_layers")
        _check_attention_kinds(reader, num_layers)
        hidden_size = reader.integer("hidden_size")
        num_heads = reader.integer("num_attention_heads")
        head_dim = reader.integer("head_dim")
        rope = _rope_parameters(reader)
        architecture = cls(
            hidden_size=hidden_size,
            num_layers=num_layers,
            vocab_size=reader.integer("vocab_size"),
            num_heads=num_heads,
            num_kv_heads=reader.integer("num_key_value_heads"),
            head_dim=head_dim,
            rotary_dim=_rotary_dim(reader, rope, head_dim),
            rope_theta=_rope_theta(reader, rope),
            rope_scaling=_rope_scaling(rope),
            rms_norm_eps=reader.positive("rms_norm_eps"),
            max_position=reader.integer("max_position_embeddings"),
            num_experts=_num_experts(reader),
            top_k=reader.integer("num_experts_per_tok"),
            expert_width=reader.integer("intermediate_size"),
            num_mtp_modules=reader.integer("num_mtp_modules", at_least=0),
            tie_word_embeddings=_tied(reader),
            recipe=_recipe(reader, folder),
        )
        architecture._check_together()
        return architecture

    @property
    def expert_unit(self) -> int:
        """Lines of an expert's width that share a scale or a word, and are never cut apart."""
        return self.recipe.format_of("model.layers.0.block_sparse_moe.experts").expert_unit

    def _check_together(self) -> None:
        if self.num_heads % self.num_kv_heads:
            _refuse(
                f"config: {self.num_heads} query heads cannot share {self.num_kv_heads} KV heads "
                "evenly; correct num_key_value_heads in config.json."
            )
        if self.top_k > self.num_experts:
            _refuse(
                f"config: num_experts_per_tok {self.top_k} exceeds the {self.num_experts} experts; "
                "correct config.json."
            )


def _tied(reader: _Reader) -> bool:
    value = reader.present("tie_word_embeddings")
    if value is _ABSENT:
        return DEFAULTS["tie_word_embeddings"]
    if not isinstance(value, bool):
        _refuse(f"config: tie_word_embeddings is {value!r}, but it must be true or false.")
    return value
