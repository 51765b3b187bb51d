"""The grammar of MiniMax-M2 tensor names: a checkpoint name to a record, or None.

Two dialects share it: the published names (`block_sparse_moe.experts.E.w1`), which every release
and every save of transformers uses, and the names that transformers >= 5 has in memory (`mlp.gate`,
experts stacked in `mlp.experts.gate_up_proj`). One expression splits a name, one dictionary look-up
says what it is; the cost does not depend on the number of experts. No torch, no SGLang.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class TensorName(NamedTuple):
    """What a checkpoint tensor is.

    layer: None for the embedding, the last norm and the head.
    module: the owner, as in `q_proj`, `input_layernorm`, `gate`, `experts`; `attn` for KV scales.
    kind: `weight`, or the kind of scale.
    expert, projection: for `experts` only. projection is w1 (gate), w2 (down) or w3 (up); a stacked
    tensor of all experts has expert None and projection `gate_up` or `down`.
    """

    layer: int | None
    module: str
    kind: str
    expert: int | None = None
    projection: str | None = None


KV_SCALES = ("k_scale", "v_scale")
# Scales of a quantised matrix, next to its weight.
MATRIX_SCALES = ("weight_scale_inv", "weight_scale", "input_scale")
MATRIX_KINDS = ("weight", *MATRIX_SCALES)
STACKED = ("gate_up", "down")

_TOP = {
    "model.embed_tokens.weight": TensorName(None, "embed_tokens", "weight"),
    "model.norm.weight": TensorName(None, "norm", "weight"),
    "lm_head.weight": TensorName(None, "lm_head", "weight"),
}

_MOE_BLOCKS = ("block_sparse_moe", "mlp")
_PROJECTIONS = {
    "w1": "w1",
    "w2": "w2",
    "w3": "w3",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}


def _layer_table() -> dict[tuple[str, str], tuple[str, str, str | None]]:
    """(path inside the layer, last component) -> (module, kind, projection), experts excepted."""
    table: dict[tuple[str, str], tuple[str, str, str | None]] = {}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        table[norm, "weight"] = (norm, "weight", None)
    for norm in ("q_norm", "k_norm"):
        table[f"self_attn.{norm}", "weight"] = (norm, "weight", None)
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        for kind in MATRIX_KINDS:
            table[f"self_attn.{projection}", kind] = (projection, kind, None)
    for side in "kv":
        scale = ("attn", f"{side}_scale", None)
        # vLLM and compressed-tensors, SGLang's own parameter, Quark, in this order.
        table[f"self_attn.{side}_proj", f"{side}_scale"] = scale
        table["self_attn", f"{side}_scale"] = scale
        table["self_attn.attn", f"{side}_scale"] = scale
        table[f"self_attn.{side}_proj", "output_scale"] = scale
    for block in _MOE_BLOCKS:
        table[f"{block}.gate", "weight"] = ("gate", "weight", None)
        table[block, "e_score_correction_bias"] = ("e_score_correction_bias", "weight", None)
        table[f"{block}.experts", "gate_up_proj"] = ("experts", "weight", "gate_up")
        table[f"{block}.experts", "down_proj"] = ("experts", "weight", "down")
    return table


_LAYER = _layer_table()
_EXPERT = re.compile(
    rf"model\.layers\.(\d+)\.(?:{'|'.join(_MOE_BLOCKS)})\.experts\.(\d+)\.(\w+)\.(\w+)"
)
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(\w+)")
_ANY_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def parse(name: str) -> TensorName | None:
    """What the tensor called `name` is; None where the grammar does not know it.

    >>> parse("model.layers.3.block_sparse_moe.experts.17.w2.weight_scale_inv")
    TensorName(layer=3, module='experts', kind='weight_scale_inv', expert=17, projection='w2')
    """
    if match := _EXPERT.fullmatch(name):
        layer, expert, projection, kind = match.groups()
        if projection not in _PROJECTIONS or kind not in MATRIX_KINDS:
            return None
        return TensorName(int(layer), "experts", kind, int(expert), _PROJECTIONS[projection])
    if match := _IN_LAYER.fullmatch(name):
        layer, path, last = match.groups()
        found = _LAYER.get((path, last))
        if found is None:
            return None
        module, kind, projection = found
        return TensorName(int(layer), module, kind, None, projection)
    return _TOP.get(name)


def omission(name: str, *, num_layers: int, num_mtp_modules: int) -> str | None:
    """Why a tensor is left out on purpose; None for one that must be loaded or reported.

    The table: rotary frequencies are computed from the configuration, and layers past the last one,
    as many as the configuration announces, belong to multi-token prediction.
    """
    if name.endswith("rotary_emb.inv_freq"):
        return "rotary frequencies are computed"
    match = _ANY_LAYER.match(name)
    if match and num_layers <= int(match[1]) < num_layers + num_mtp_modules:
        return "multi-token prediction layer"
    return None


def spell(name: TensorName) -> str:
    """The published spelling of a record, for messages.

    >>> spell(TensorName(3, "experts", "weight", 17, "w2"))
    'model.layers.3.block_sparse_moe.experts.17.w2.weight'
    """
    module = name.module
    if name.layer is None:
        prefix = "" if module == "lm_head" else "model."
        return f"{prefix}{module}.{name.kind}"
    layer = f"model.layers.{name.layer}"
    if module == "experts":
        if name.expert is None:
            return f"{layer}.mlp.experts.{name.projection}_proj"
        return f"{layer}.block_sparse_moe.experts.{name.expert}.{name.projection}.{name.kind}"
    if module == "gate":
        return f"{layer}.block_sparse_moe.gate.{name.kind}"
    if module == "e_score_correction_bias":
        return f"{layer}.block_sparse_moe.{module}"
    if module == "attn":
        return f"{layer}.self_attn.{name.kind}"
    inside = module if module.endswith("layernorm") else f"self_attn.{module}"
    return f"{layer}.{inside}.{name.kind}"
