"""Whether a draft fits its target, from configurations, headers and the map of its vocabulary.

Two kinds of findings. A refusal is a draft that cannot run, or that would propose tokens of another
vocabulary. A doubt is a draft that runs: every token is verified, so that replies stay right, but
it would be slower than no draft at all if the doubt is justified. Each is one sentence with the
numbers and what to do. No torch, no SGLang.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from sglang_minimax.config import Architecture
from sglang_minimax.drafts.config import ARCHITECTURES, LAYERS_KEY, LLAMA, Draft, guessed_layers
from sglang_minimax.drafts.tensors import FIRST, HEAD, MAP, Wanted, by_canonical_name, wanted
from sglang_minimax.drafts.values import read
from sglang_minimax.loading.formats.base import Shape
from sglang_minimax.loading.headers import Tensor

#: Environment variable that lets a draft with doubts start, by the one value that it knows.
VARIABLE, ANY = "SGLANG_MINIMAX_DRAFT", "any"
_OTHER_DRAFT = "use a draft that was trained for this model"
_AGAIN = "download or train the draft again"
_LAYERS = f"eagle_config.{LAYERS_KEY}"
# vLLM's ids of what it calls the same layers, and a card written for it.
_COUNTING = (
    "counted from 0; vLLM and most model cards count inputs, one more: their [2, 31, 59] is "
    "[1, 30, 58] here"
)
_OR_ANYWAY = f"or set {VARIABLE}={ANY} to run it as it is"
# Tensors that one sentence names.
_NAMED = 3

Tensors = Mapping[str, Tensor]


def refusals(
    arch: Architecture, draft: Draft, tensors: Tensors | None = None, ranks: int = 1
) -> Iterator[str]:
    """Yield the reasons why `draft` cannot be the draft of a model of this architecture.

    tensors: of its checkpoint by stored name, None where they are not known yet. ranks: over which
    attention is cut. Raises LoadError where the map of the vocabulary cannot be read.
    """
    if draft.architecture not in ARCHITECTURES:
        yield (
            f"the draft is a {draft.architecture}, which does not read what layers of the model "
            f"hand on; use an Eagle3 draft ({' or '.join(ARCHITECTURES)}), or start without "
            "--speculative-algorithm."
        )
        return
    yield from _widths(arch, draft)
    yield from _vocabulary(arch, draft)
    if draft.reads_residuals:
        yield from _layers(arch, draft)
    if draft.architecture == LLAMA:
        yield from _heads(draft, ranks)
    if tensors is not None:
        found = by_canonical_name(tensors)
        if draft.architecture == LLAMA:
            yield from _stored(draft, found)
        yield from _map(arch, draft, found)


def doubts(arch: Architecture, draft: Draft, fingerprint: str | None = None) -> Iterator[str]:
    """Yield what speaks against a draft that can run.

    fingerprint: of the target, None where it is not known.
    """
    if draft.reads_residuals:
        yield from _unnamed_layers(arch, draft)
        yield from _order(draft)
        yield from _skipped(draft)
    if draft.fingerprint and fingerprint and draft.fingerprint != fingerprint:
        yield (
            f"the draft was trained for a model with the fingerprint {draft.fingerprint}, but this "
            f"one has {fingerprint}, so that most of its tokens would be rejected; {_OTHER_DRAFT}, "
            f"{_OR_ANYWAY}."
        )


def _widths(arch: Architecture, draft: Draft) -> Iterator[str]:
    if draft.target_hidden_size != arch.hidden_size:
        yield (
            f"the draft reads hidden states of {draft.target_hidden_size} numbers "
            f"(target_hidden_size, or else hidden_size), but the model's have {arch.hidden_size}; "
            f"{_OTHER_DRAFT}."
        )
    elif not draft.has_own_embedding:
        return
    elif not draft.reads_residuals:
        yield (
            f"the draft has a hidden_size of {draft.hidden_size} and reads the model's last hidden "
            f"state alone, which has {arch.hidden_size} numbers; {_OTHER_DRAFT}."
        )
    elif draft.uses_target_head:
        yield (
            f"the draft has no head of its own (draft_vocab_size is null), but its hidden_size is "
            f"{draft.hidden_size} and the model's head takes {arch.hidden_size}; {_OTHER_DRAFT}."
        )


def _vocabulary(arch: Architecture, draft: Draft) -> Iterator[str]:
    if draft.vocab_size != arch.vocab_size:
        yield (
            f"the draft has a vocab_size of {draft.vocab_size}, but the model has "
            f"{arch.vocab_size}; {_OTHER_DRAFT}."
        )
    own = draft.own_vocab
    if own is not None and own > draft.vocab_size:
        yield (
            f"the draft has a draft_vocab_size of {own}, which is more than its vocab_size of "
            f"{draft.vocab_size}; correct config.json of the draft."
        )
    if draft.tied and own not in (None, draft.vocab_size):
        yield (
            f"the draft uses its embedding of {draft.vocab_size} rows as its head "
            f"(tie_word_embeddings), but its draft_vocab_size is {own}; make them agree in "
            "config.json of the draft."
        )
    if not draft.states_own_vocab and draft.architecture == LLAMA:
        yield (
            "the draft has no draft_vocab_size, without which SGLang stops while it loads; write "
            "into config.json of the draft how many rows its lm_head has, or null where it is to "
            "use the model's."
        )


def _layers(arch: Architecture, draft: Draft) -> Iterator[str]:
    layers = draft.layers
    if layers is None:
        layers = guessed_layers(arch.num_layers)
        if not _fits(arch, layers):
            yield (
                f"the draft names no layers, and those that SGLang would guess, {list(layers)}, "
                f"are not three of the model's {arch.num_layers}; name them as {_LAYERS} in "
                "config.json of the draft."
            )
            return
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        yield (
            f"{_LAYERS} of the draft is {list(layers)}, which names layer {twice[0]} twice; name "
            "each layer that it was trained on once."
        )
    outside = [layer for layer in layers if not -1 <= layer < arch.num_layers]
    if outside:
        yield (
            f"{_LAYERS} of the draft is {list(layers)}, but the model has layers 0 to "
            f"{arch.num_layers - 1} and no {outside[0]}; name the layers whose outputs it reads, "
            f"{_COUNTING}."
        )
    if draft.inputs != len(layers):
        yield (
            f"the draft takes {draft.inputs} hidden states (num_aux_hidden_states), but "
            f"{len(layers)} layers would be captured, {list(layers)}; make the two agree in "
            "config.json of the draft."
        )


def _fits(arch: Architecture, layers: Sequence[int]) -> bool:
    return len(set(layers)) == len(layers) and all(-1 <= each < arch.num_layers for each in layers)


def _unnamed_layers(arch: Architecture, draft: Draft) -> Iterator[str]:
    layers = guessed_layers(arch.num_layers)
    if draft.layers is not None or not _fits(arch, layers):
        return
    named = {"eagle_config": {**draft.eagle_config, LAYERS_KEY: list(layers)}}
    option = f"--json-model-override-args '{json.dumps(named)}'"
    if draft.layers_at_top:
        yield (
            "the draft names its layers outside of eagle_config, where SGLang does not look and "
            f"would guess the outputs of layers {list(layers)}; start with {option}, and your own "
            f"layers in it, {_COUNTING}, {_OR_ANYWAY}."
        )
        return
    yield (
        f"the draft names no layers ({_LAYERS}), so that SGLang would guess that it was trained on "
        f"the outputs of layers {list(layers)}, as SpecForge does unless told otherwise; if so, "
        f"start with {option}, {_OR_ANYWAY}."
    )


def _order(draft: Draft) -> Iterator[str]:
    if draft.layers is not None and list(draft.layers) != sorted(draft.layers):
        yield (
            f"{_LAYERS} of the draft is {list(draft.layers)}, but SGLang hands hidden states over "
            f"in the order of the layers; if the draft was trained on that order, write "
            f"{sorted(draft.layers)} into its config.json, {_OR_ANYWAY}."
        )


def _skipped(draft: Draft) -> Iterator[str]:
    # SGLang tells hidden states that fc has made from others by their width.
    width = draft.inputs * draft.target_hidden_size
    if width == draft.hidden_size and draft.architecture == LLAMA:
        yield (
            f"the draft reads {draft.inputs} hidden state(s) of {width} numbers in all, which is "
            f"its own hidden_size, so that SGLang would pass over its {FIRST}; {_OTHER_DRAFT} on "
            f"more layers, {_OR_ANYWAY}."
        )


def _heads(draft: Draft, ranks: int) -> Iterator[str]:
    heads, kv_heads = draft.num_heads, draft.num_kv_heads
    if draft.hidden_size % heads:  # whatever head_dim is: transformers' LlamaConfig insists
        yield (
            f"the draft has {heads} heads (num_attention_heads), of which its hidden_size of "
            f"{draft.hidden_size} is no multiple, and transformers does not read such a Llama; "
            "use another draft."
        )
    if heads % kv_heads:
        yield (
            f"the draft's {heads} query heads cannot share its {kv_heads} KV heads evenly; correct "
            "config.json of the draft."
        )
        return
    numbers = {"query heads": heads, "MLP rows": draft.width}
    uncut = [f"{number} {what}" for what, number in numbers.items() if number % ranks]
    if kv_heads % ranks and ranks % kv_heads:
        uncut.append(f"{kv_heads} KV heads")
    if uncut:
        yield (
            f"the draft's {' and '.join(uncut)} cannot be shared evenly by {ranks} attention "
            "ranks; use a smaller --tp-size, a larger --attn-dp-size, or another draft."
        )


def _stored(draft: Draft, tensors: Tensors) -> Iterator[str]:
    stored = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    # Not layer by layer: a number that is nonsense would take all memory.
    if draft.num_layers > max(1, len(stored)):
        yield (
            f"the draft has a num_hidden_layers of {draft.num_layers}, but its files hold "
            f"{len(stored)} layer(s); correct config.json of the draft."
        )
        return
    needed = list(wanted(draft, tensors))
    if draft.quantised:  # which names and shapes its matrices have is the quantiser's business
        needed = [each for each in needed if not each.matrix]
    missing = [each for each in needed if each.name not in tensors]
    if [each.name for each in missing] == [HEAD] and draft.own_vocab == draft.vocab_size:
        yield (
            f"the draft has no {HEAD}, which SGLang would leave as it was in memory; set "
            "draft_vocab_size to null in its config.json to use the model's head."
        )
    elif missing:
        yield (
            f"the draft has no {_names(missing)}, which SGLang would leave as it was in memory; "
            f"{_AGAIN}."
        )
    for each in needed:
        tensor = tensors.get(each.name)
        if tensor is not None and tensor.shape != each.shape:
            yield _misshapen(draft, each, tensor.shape)


def _names(missing: Sequence[Wanted]) -> str:
    names = [each.name for each in missing[:_NAMED]]
    more = len(missing) - len(names)
    return ", ".join(names) + (f" and {more} more tensors" if more else "")


def _misshapen(draft: Draft, each: Wanted, shape: Shape) -> str:
    stored, asked = ("x".join(map(str, one)) or "a scalar" for one in (shape, each.shape))
    said = f"{each.name} of the draft is {stored}, but its config.json makes it {asked}"
    if each.name == FIRST and len(shape) == 2:
        count = shape[1] / draft.target_hidden_size
        return (
            f"{said}: it takes {count:g} hidden states of {draft.target_hidden_size} numbers, and "
            f"{draft.inputs} would be captured; name as many layers in {_LAYERS}."
        )
    if each.name == HEAD:
        return f"{said}: its rows must be draft_vocab_size, which is {draft.own_vocab}; {_AGAIN}."
    return f"{said}; {_AGAIN}."


def _map(arch: Architecture, draft: Draft, tensors: Tensors) -> Iterator[str]:
    rows = draft.vocab_size if draft.own_vocab is None else draft.own_vocab
    stored = tensors.get(MAP)
    if stored is None:
        if rows < draft.vocab_size:
            yield (
                f"the draft knows {rows} of {draft.vocab_size} tokens and has no {MAP}, which "
                f"would say which; {_AGAIN}."
            )
        return
    if stored.shape != (rows,):
        yield (
            f"{MAP} of the draft has {'x'.join(map(str, stored.shape))} entries, but "
            f"draft_vocab_size is {rows}; {_AGAIN}."
        )
        return
    if not stored.kind.startswith("I"):
        yield f"{MAP} of the draft is {stored.kind}, expected whole numbers (I64); {_AGAIN}."
        return
    ids = np.arange(rows, dtype=np.int64) + read(stored).astype(np.int64)
    outside = np.flatnonzero((ids < 0) | (ids >= arch.vocab_size))
    if outside.size:
        first = int(outside[0])
        yield (
            f"{MAP} of the draft makes token {int(ids[first])} of its token {first}, and so for "
            f"{outside.size} of {rows}, but the model has {arch.vocab_size} tokens; {MAP} holds "
            f"the distance to the model's id, so {_AGAIN}."
        )
