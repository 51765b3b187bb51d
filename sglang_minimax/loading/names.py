"""The grammar of MiniMax-M2 tensor names: a checkpoint name to a record, or None.

Several dialects share it: the published names, the names that transformers >= 5 has in memory, the
parameter names of SGLang itself, experts fused in pairs, and any of them inside a multi-modal
wrapper. Each owner of a tensor takes every kind of every quantiser, so that a loader which cannot
use a tensor can still say which one it is. One expression splits off the numbers, one dictionary
look-up reads the rest; the cost does not depend on the number of experts. No torch, no SGLang.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple


class TensorName(NamedTuple):
    """What a checkpoint tensor is.

    layer: None for the embedding, the last norm and the head.
    module: the owner, as in `q_proj`, `qkv_proj`, `input_layernorm`, `gate`, `experts`,
    `e_score_correction_bias`; `attn` for the scales of the KV cache and of attention itself.
    kind: one of MATRIX_KINDS, or of ATTENTION_KINDS where the module is `attn`.
    expert, projection: for `experts` only. projection is w1 (gate), w2 (down), w3 (up), w13 (gate
    and up, gate rows first) or w31 (up rows first); expert None is a stack of all experts, which
    exists for w13, w31 and w2.
    """

    layer: int | None
    module: str
    kind: str
    expert: int | None = None
    projection: str | None = None


# Scales that multiply a matrix or its input, next to the weight.
MATRIX_SCALES = (
    "weight_scale_inv",  # fp8 with blocks: as published, transformers, SGLang
    "weight_scale",  # compressed-tensors, ModelOpt, Quark, ModelSlim
    "weight_scale_2",  # ModelOpt NVFP4, of the whole matrix
    "weight_global_scale",  # compressed-tensors NVFP4: one over ModelOpt's weight_scale_2
    "input_scale",
    "input_global_scale",  # compressed-tensors NVFP4: one over ModelOpt's input_scale
    "output_scale",  # Quark, compressed-tensors; of q, k and v it belongs to `attn`
    "pre_quant_scale",  # ModelOpt NVFP4 with AWQ
)

MATRIX_KINDS = (
    "weight",
    "bias",
    *MATRIX_SCALES,
    *("qweight", "qzeros", "scales", "g_idx"),  # AWQ, GPTQ
    "qweight_type",  # GGUF
    # compressed-tensors
    *("weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx"),
    *("input_zero_point", "output_zero_point", "output_global_scale"),
    # ModelSlim
    *("weight_offset", "weight_scale_second", "weight_offset_second", "scale_bias"),
    *("input_offset", "quant_bias", "deq_scale"),
    # Further parameters of SGLang, which it computes for the most part; a pushed state has them.
    *("g_idx_sort_indices", "weight_scale1", "fp8_scale", "int4_scale", "alpha"),
)

# Other words for the same numbers. Everything else keeps the word that the checkpoint uses.
_SYNONYMS = {
    "activation_scale": "input_scale",  # transformers, fp8 with static activations
}
# SGLang's word for the bias of stacked experts, beside `w13_bias`.
_SGLANG_SYNONYMS = {"weight_bias": "bias"}
# What follows `experts.gate_up_proj_` in transformers' fp8 experts, and in what SGLang reads for
# other models. Not `blocks` and `scales`: MXFP4, gate and up rows in turn, neither w13 nor w31.
_STACKED_SUFFIXES = {
    "scale_inv": "weight_scale_inv",
    "activation_scale": "input_scale",
    **{kind: kind for kind in ("bias", *MATRIX_SCALES)},
}

KV_SCALES = ("k_scale", "v_scale")
ATTENTION_KINDS = (
    *KV_SCALES,
    "kv_scale",  # the old word, one number for both k_scale and v_scale
    "q_scale",
    "prob_scale",  # Quark, of the attention weights
    # compressed-tensors
    *(f"{side}_{what}" for side in "qkv" for what in ("zero_point", "global_scale")),
)

_MOE_BLOCKS = ("block_sparse_moe", "mlp")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_IN_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm")

_FUSED = {
    "w13": "w13",  # SGLang
    "w1_w3": "w13",
    "gate_up_proj": "w13",  # transformers
    "w31": "w31",
    "w3_w1": "w31",
    "up_gate_proj": "w31",
}
_PROJECTIONS = {
    "w1": "w1",
    "w2": "w2",
    "w3": "w3",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    **_FUSED,
}
_STACKED = {"w2": "w2", "down_proj": "w2", **_FUSED}

# What the numbers of a name leave: module, kind, projection.
_Rest = dict[str, tuple[str, str, str | None]]


def _owner(module: str, path: str) -> _Rest:
    """Every kind of one owner, behind a dot."""
    kinds = {**{kind: kind for kind in MATRIX_KINDS}, **_SYNONYMS}
    return {f"{path}.{word}": (module, kind, None) for word, kind in kinds.items()}


def _scaled() -> _Rest:
    """The scales of attention, in every spelling that SGLang or a quantiser knows."""
    table: _Rest = {}
    for kind in ATTENTION_KINDS:
        # compressed-tensors, and the parameter of SGLang.
        paths = [f"self_attn.{kind}", f"self_attn.attn.{kind}"]
        side, _, what = kind.partition("_")
        if side in ("q", "k", "v"):
            # ModelOpt and vLLM, and the same beside a fused projection.
            paths += [f"self_attn.{side}_proj.{kind}", f"self_attn.qkv_proj.{kind}"]
            if what == "scale":  # Quark, compressed-tensors
                paths.append(f"self_attn.{side}_proj.output_scale")
        table.update(dict.fromkeys(paths, ("attn", kind, None)))
    table["self_attn.prob_output_scale"] = ("attn", "prob_scale", None)  # Quark
    return table


def _stacked(block: str) -> _Rest:
    """All experts of a layer in one tensor."""
    table: _Rest = {}
    for word, projection in _STACKED.items():
        path = f"{block}.experts.{word}"
        spellings = {name: kind for name, (_, kind, _) in _owner("experts", path).items()}
        if word.endswith("_proj"):
            spellings[path] = "weight"
            spellings |= {f"{path}_{word}": kind for word, kind in _STACKED_SUFFIXES.items()}
        else:
            spellings |= {f"{path}_{kind}": kind for kind in MATRIX_KINDS}
            spellings |= {f"{path}_{word}": kind for word, kind in _SGLANG_SYNONYMS.items()}
        table.update({name: ("experts", kind, projection) for name, kind in spellings.items()})
    return table


def _in_layer() -> _Rest:
    table: _Rest = {}
    for norm in _NORMS:
        table |= _owner(norm, norm)
    for module in _IN_ATTENTION:
        table |= _owner(module, f"self_attn.{module}")
    table |= _scaled()  # after the owners: the output scale of k_proj is that of the keys
    bias = "e_score_correction_bias"
    for block in _MOE_BLOCKS:
        table |= _owner("gate", f"{block}.gate")
        # As published; and inside the gate, as transformers has it for later models.
        table[f"{block}.{bias}"] = table[f"{block}.gate.{bias}"] = (bias, "weight", None)
        table |= _stacked(block)
    return table


def _in_expert() -> _Rest:
    return {
        path: ("experts", kind, projection)
        for word, projection in _PROJECTIONS.items()
        for path, (_, kind, _) in _owner("experts", word).items()
    }


_HEAD = _owner("lm_head", "lm_head")
_BODY = {**_owner("embed_tokens", "embed_tokens"), **_owner("norm", "norm")}
_LAYER = _in_layer()
_EXPERT = _in_expert()

# A number has one spelling, or two names would make one record; more digits are no number of ours.
_INDEX = "(0|[1-9][0-9]{0,5})"
# Wrappers put `language_model.` before the whole name (MiniMax-VL on disk), or after `model.`
# (transformers >= 5 in memory, where the head keeps its own name).
_BODY_OF = r"(?:model\.language_model|(?:language_model\.)?model)\."
_NAME = re.compile(
    rf"{_BODY_OF}(?:layers\.{_INDEX}\.(?:(?:{'|'.join(_MOE_BLOCKS)})\.experts\.{_INDEX}\.)?)?"
    r"(.+)"
)
_EXPERTS_OF_LAYER = re.compile(rf"{_BODY_OF}layers\.{_INDEX}\.(?:{'|'.join(_MOE_BLOCKS)})")
_ALONE = re.compile(_INDEX)


# Nearly all names are of experts, and have few beginnings and few numbers between them.
@lru_cache(maxsize=4096)
def _experts_layer(path: str) -> int | None:
    match = _EXPERTS_OF_LAYER.fullmatch(path)
    return int(match[1]) if match else None


@lru_cache(maxsize=4096)
def _index(text: str) -> int | None:
    return int(text) if _ALONE.fullmatch(text) else None


def parse(name: str) -> TensorName | None:
    """What the tensor called `name` is; None where the grammar does not know it.

    >>> parse("model.layers.3.block_sparse_moe.experts.17.w2.weight_scale_inv")
    TensorName(layer=3, module='experts', kind='weight_scale_inv', expert=17, projection='w2')
    """
    path, _, rest = name.partition(".experts.")
    number, _, rest = rest.partition(".")
    in_expert = _EXPERT.get(rest)
    if in_expert is not None:
        module, kind, projection = in_expert
        of_layer, of_expert = _experts_layer(path), _index(number)
        if of_layer is not None and of_expert is not None:
            return TensorName(of_layer, module, kind, of_expert, projection)
    match = _NAME.fullmatch(name)
    if match is None:
        layer = expert = None
        found = _HEAD.get(name.removeprefix("language_model."))
    else:
        layer, expert, rest = match.groups()
        found = (_EXPERT if expert else _LAYER if layer else _BODY).get(rest)
    if found is None:
        return None
    module, kind, projection = found
    return TensorName(
        int(layer) if layer else None, module, kind, int(expert) if expert else None, projection
    )


class Omission(NamedTuple):
    """A kind of tensor that is left out on purpose.

    applies(layer, rest, layers, modules): the layer of a name, what follows it, and the two counts
    of the configuration, hidden layers and MTP modules.
    """

    reason: str
    applies: Callable[[int | None, str, int, int], bool]


# transformers (two), its older releases (two), SGLang and vLLM.
_CACHES = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "cos_sin_cache")
_ROTARY = frozenset(f"rotary_emb.{cache}" for cache in _CACHES)
_LAYER_ROTARY = frozenset(f"self_attn.{path}" for path in _ROTARY)
# MiniMax-M3 numbers its MTP modules apart from the layers: `model.mtp.layers.0.`
_MTP = re.compile(rf"mtp\.(?:layers\.{_INDEX}\.|(?!layers\.)).+")


def _mtp_module(rest: str, modules: int) -> bool:
    match = _MTP.fullmatch(rest)
    return match is not None and int(match[1] or 0) < modules


OMISSIONS = (
    Omission(
        "rotary frequencies are computed",
        lambda layer, rest, layers, modules: rest in (_ROTARY if layer is None else _LAYER_ROTARY),
    ),
    Omission(
        "multi-token prediction layer",
        lambda layer, rest, layers, modules: (
            layer is not None and layers <= layer < layers + modules
        ),
    ),
    Omission(
        "multi-token prediction module",
        lambda layer, rest, layers, modules: layer is None and _mtp_module(rest, modules),
    ),
)


def omission(name: str, *, num_layers: int, num_mtp_modules: int) -> str | None:
    """Why a tensor is left out on purpose; None for one that must be loaded or reported.

    Layers past the last one are MTP modules, as many as the configuration announces.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    if match[1] is None:
        layer, rest = None, match[3]
    else:
        layer, rest = int(match[1]), name[match.end(1) + 1 :]
    for entry in OMISSIONS:
        if entry.applies(layer, rest, num_layers, num_mtp_modules):
            return entry.reason
    return None


def spell(name: TensorName) -> str:
    """The published spelling of a record, for messages; parse() reads it back.

    >>> spell(TensorName(3, "experts", "weight", 17, "w2"))
    'model.layers.3.block_sparse_moe.experts.17.w2.weight'
    """
    layer, module, kind, expert, projection = name
    if layer is None:
        prefix = "" if module == "lm_head" else "model."
        return f"{prefix}{module}.{kind}"
    if module == "experts":
        inside = _spell_experts(kind, expert, projection)
    elif module == "gate":
        inside = f"block_sparse_moe.gate.{kind}"
    elif module == "e_score_correction_bias":
        inside = f"block_sparse_moe.{module}"
    elif module == "attn":
        inside = f"self_attn.{kind}"
    else:
        inside = f"{'' if module in _NORMS else 'self_attn.'}{module}.{kind}"
    return f"model.layers.{layer}.{inside}"


def _spell_experts(kind: str, expert: int | None, projection: str | None) -> str:
    """Nobody publishes a stack: transformers' spelling of its weight, SGLang's of the rest."""
    if expert is not None:
        return f"block_sparse_moe.experts.{expert}.{projection}.{kind}"
    in_memory = {"w13": "gate_up_proj", "w31": "up_gate_proj", "w2": "down_proj"}
    if kind == "weight" and projection in in_memory:
        return f"mlp.experts.{in_memory[projection]}"
    return f"block_sparse_moe.experts.{projection}_{kind}"
