"""The tensors that a `LlamaForCausalLMEagle3` must have, whatever a checkpoint calls them.

No torch, no SGLang. Source: load_weights of srt/models/llama_eagle3.py in SGLang 0.5.23, which
passes over a tensor that it does not know and leaves a parameter without one as it was allocated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from sglang_minimax.drafts.config import Draft
from sglang_minimax.loading.formats.base import Shape
from sglang_minimax.loading.headers import Tensor

#: What SGLang calls older names.
_OLD_NAMES = {
    "midlayer.": "layers.0.",
    "aux_norm_low.": "fc_norm.0.",
    "aux_norm_mid.": "fc_norm.1.",
    "aux_norm_high.": "fc_norm.2.",
}
#: The draft's ids as distances to the target's. Its counterpart `t2d` is not read.
MAP = "d2t"
EMBEDDING, HEAD, FIRST = "embed_tokens.weight", "lm_head.weight", "fc.weight"
# What a fused matrix stands for.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Wanted(NamedTuple):
    """A tensor that must be there. matrix: whether a quantiser would store it otherwise."""

    name: str
    shape: Shape
    matrix: bool = False


def canonical(name: str) -> str:
    """A tensor's name without the differences between trainers.

    >>> canonical("midlayer.self_attn.q_proj.weight"), canonical("model.norm.weight")
    ('layers.0.self_attn.q_proj.weight', 'norm.weight')
    """
    name = name.removeprefix("model.")
    for old, new in _OLD_NAMES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def by_canonical_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a draft under the names that `wanted` uses."""
    return {canonical(name): tensor for name, tensor in tensors.items()}


def wanted(draft: Draft, present: Mapping[str, Tensor]) -> Iterator[Wanted]:
    """Every tensor that a Llama draft of this configuration needs, d2t aside.

    present: by canonical name; a fused matrix that is there is wanted in the place of its parts.
    """
    hidden = draft.hidden_size
    if draft.reads_residuals:
        yield from _first_projection(draft)
    for layer in range(draft.num_layers):
        parts = list(_layer(draft, layer))
        for fused, names in _FUSED.items():
            parts = _joined(parts, fused, names, present)
        yield from parts
    yield Wanted("norm.weight", (hidden,))
    if draft.has_own_embedding:
        yield Wanted(EMBEDDING, (draft.vocab_size, hidden))
    if draft.own_vocab is not None and not draft.tied:
        yield Wanted(HEAD, (draft.own_vocab, hidden), matrix=True)


def _first_projection(draft: Draft) -> Iterator[Wanted]:
    columns = draft.inputs * draft.target_hidden_size
    yield Wanted(FIRST, (draft.hidden_size, columns))
    if draft.fc_bias:
        yield Wanted("fc.bias", (draft.hidden_size,))
    if draft.norm_before_fc:
        yield Wanted("input_norm.weight", (columns,))
    if draft.fc_norm:
        for number in range(draft.inputs):
            yield Wanted(f"fc_norm.{number}.weight", (draft.target_hidden_size,))


def _layer(draft: Draft, layer: int) -> Iterator[Wanted]:
    hidden, width = draft.hidden_size, draft.width
    # The first layer reads the embedded token beside the hidden state.
    read = 2 * hidden if layer == 0 else hidden
    queries, keys = draft.num_heads * draft.head_dim, draft.num_kv_heads * draft.head_dim
    path = f"layers.{layer}"
    norms = ["hidden_norm", "post_attention_layernorm"]
    for norm in [*norms, "input_layernorm"] if layer == 0 else norms:
        yield Wanted(f"{path}.{norm}.weight", (hidden,))
    if draft.attention_bias:  # SGLang makes one here, and none beside queries, keys and values
        yield Wanted(f"{path}.self_attn.o_proj.bias", (hidden,))
    matrices = {
        "self_attn.q_proj": (queries, read),
        "self_attn.k_proj": (keys, read),
        "self_attn.v_proj": (keys, read),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    for name, shape in matrices.items():
        yield Wanted(f"{path}.{name}.weight", shape, matrix=True)


def _joined(
    parts: list[Wanted], fused: str, names: tuple[str, ...], present: Mapping[str, Tensor]
) -> list[Wanted]:
    """`parts` with those called `names` as one, where the checkpoint has them as one."""
    members = [part for part in parts if part.name.split(".")[-2] in names]
    name = members[0].name.replace(f".{names[0]}.", f".{fused}.")
    if name not in present:
        return parts
    rows = sum(part.shape[0] for part in members)
    kept = [part for part in parts if part not in members]
    return [*kept, Wanted(name, (rows, members[0].shape[1]), matrix=True)]
