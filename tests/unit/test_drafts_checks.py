"""Every reason against a draft, each beside a near miss that passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_minimax import TINY_M2_EAGLE3
from sglang_minimax.drafts.checks import refusals
from sglang_minimax.drafts.config import Draft
from sglang_minimax.errors import LoadError
from tests.drafts import REMOVED, State, draft_in, layers
from tests.drafts import draft_config as changed
from tests.unit.draft_verdicts import TINY, Change, one_sentence, said, verdict


def test_the_bundled_draft_passes() -> None:
    assert said(TINY_M2_EAGLE3) == []
    for ranks in (2, 4, 8, 16):
        assert said(TINY_M2_EAGLE3, ranks) == []


# --- config.json ---

CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another hidden size": (
        {"target_hidden_size": 256},
        ["hidden states of 256 numbers", "the model's have 128"],
    ),
    "hidden size without target's": (
        {"target_hidden_size": REMOVED, "hidden_size": 192},
        ["hidden states of 192 numbers", "128"],
    ),
    "another vocabulary": ({"vocab_size": 1000}, ["vocab_size of 1000", "the model has 896"]),
    "fewer layers than inputs": (layers(0, 1), ["128x384", "3 hidden states of 128", "and 2"]),
    "more layers than inputs": (layers(0, 1, 2, 3), ["3 hidden states of 128", "and 4"]),
    "inputs and layers disagree": (
        {"num_aux_hidden_states": 4, **layers(0, 1, 3)},
        ["takes 4 hidden states", "3 layers would be captured, [0, 1, 3]"],
    ),
    "a layer twice": (layers(0, 1, 1), ["[0, 1, 1]", "names layer 1 twice"]),
    "a layer too many": (
        layers(0, 1, 4),
        ["[0, 1, 4]", "has layers 0 to 3 and no 4", "[2, 31, 59] is [1, 30, 58] here"],
    ),
    "a layer before the first": (layers(-2, 1, 3), ["[-2, 1, 3]", "no -2"]),
    "no layers, none to guess": (
        {"eagle_config": REMOVED},
        ["names no layers", "[1, 1, 0]", "not three of the model's 4"],
    ),
    "an empty list": (layers(), ["names no layers"]),
    "layers out of order": (layers(3, 0, 1), ["[3, 0, 1]", "write [0, 1, 3]"]),
    "layers that are no numbers": (layers(0, 1, "3"), ["list of layer numbers"]),
    "layers in a text": (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": "0,1,3"}},
        ["'0,1,3'", "list of layer numbers"],
    ),
    "a layer that is true": (layers(0, True, 3), ["list of layer numbers"]),
    "eagle_config is a list": ({"eagle_config": [0, 1, 3]}, ["eagle_config is [0, 1, 3]"]),
    "no draft_vocab_size": (
        {"draft_vocab_size": REMOVED},
        ["no draft_vocab_size", "SGLang stops while it loads"],
    ),
    "draft_vocab_size is not the head's": (
        {"draft_vocab_size": 512},
        ["lm_head.weight of the draft is 256x128", "draft_vocab_size, which is 512"],
    ),
    "draft_vocab_size is a text": ({"draft_vocab_size": "256"}, ["'256'", "whole number"]),
    "more tokens than the model": (
        {"draft_vocab_size": 1024},
        ["draft_vocab_size of 1024", "vocab_size of 896"],
    ),
    "tied, and cut": (
        {"tie_word_embeddings": True},
        ["embedding of 896 rows as its head", "draft_vocab_size is 256"],
    ),
    "the target's own class": (
        {"architectures": ["MiniMaxM2ForCausalLM"]},
        ["is a MiniMaxM2ForCausalLM", "LlamaForCausalLMEagle3"],
    ),
    "a class that reads one hidden state": (
        {"architectures": ["LlamaForCausalLMEagle"]},
        ["is a LlamaForCausalLMEagle", "LlamaForCausalLMEagle3 or Eagle3DeepseekV2ForCausalLM"],
    ),
    "a class of nobody": ({"architectures": ["LlamaEagle3Model"]}, ["is a LlamaEagle3Model"]),
    "no architecture": ({"architectures": REMOVED}, ["architectures is None"]),
    "no width": ({"intermediate_size": REMOVED}, ["intermediate_size is missing"]),
    "no layers of its own": ({"num_hidden_layers": 0}, ["num_hidden_layers is 0", "at least 1"]),
    "a layer more": ({"num_hidden_layers": 2}, ["its files hold 1 layer(s)"]),
    "another head size": ({"head_dim": 64}, ["self_attn.q_proj.weight", "512x256", "1024x256"]),
    "heads that transformers refuses": (
        {"num_attention_heads": 12, "head_dim": 32},
        ["12 heads", "128 is no multiple"],
    ),
    "heads that cannot share": ({"num_key_value_heads": 5}, ["16 query heads", "5 KV heads"]),
    "switch that is a text": ({"tie_word_embeddings": "no"}, ["'no'", "true or false"]),
    "fc_norm by its truth": ({"fc_norm": [1e-6]}, ["no fc_norm.0.weight, fc_norm.1.weight"]),
    "fc_norm without tensors": ({"fc_norm": True}, ["no fc_norm.0.weight, fc_norm.1.weight"]),
    "a bias without a tensor": ({"bias": True}, ["no fc.bias"]),
    "an attention bias without a tensor": ({"attention_bias": True}, ["no layers.0.self_attn.o"]),
    "norm_before_fc without tensors": ({"norm_before_fc": True}, ["no input_norm.weight"]),
    "another target": (
        {"sglang_minimax": {"target_fingerprint": "0123456789abcdef"}},
        ["0123456789abcdef", "592e4ad68c666821", "SGLANG_MINIMAX_DRAFT=any"],
    ),
    "a fingerprint that is a number": (
        {"sglang_minimax": {"target_fingerprint": 5}},
        ["sglang_minimax is {'target_fingerprint': 5}"],
    ),
    "a fingerprint outside of its object": (
        {"sglang_minimax": "592e4ad68c666821"},
        ['must be {"target_fingerprint": "..."}'],
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrong_configuration_is_one_sentence(name: str, tmp_path: Path) -> None:
    config, words = CONFIGS[name]
    found = said(draft_in(tmp_path, changed(**config)))
    # A wrong number may contradict several tensors; the first sentence has what it is about.
    assert found
    text = found[0] if len(found) > 1 else one_sentence(found)
    for sentence in found:
        assert one_sentence([sentence])
    for word in words:
        assert any(word in sentence for sentence in found), (word, text)


NEAR_MISSES: dict[str, dict[str, Any]] = {
    "target_hidden_size may be absent": {"target_hidden_size": REMOVED},
    "so may head_dim's neighbours": {"rope_scaling": REMOVED, "bias": REMOVED},
    "num_aux_hidden_states agrees": {"num_aux_hidden_states": 3},
    "the embedding may be read": layers(-1, 1, 3),
    "the last layer may be read": layers(1, 2, 3),
    "layers are also named at the top": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]},
    "null switches": {"tie_word_embeddings": None, "fc_norm": None},
    "no fingerprint": {"sglang_minimax": REMOVED},
    "another key of ours": {"sglang_minimax": {"trained": "x"}},
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_passes(name: str, tmp_path: Path) -> None:
    assert said(draft_in(tmp_path, changed(**NEAR_MISSES[name]))) == []


# --- files ---


def test_a_projection_that_sglang_would_pass_over_is_told(tmp_path: Path) -> None:
    def first(count: int) -> Change:
        def change(tensors: State) -> None:
            tensors["fc.weight"] = tensors["fc.weight"][:, : 128 * count]

        return change

    one = draft_in(tmp_path / "one", changed(**layers(3)), first(1))
    assert "1 hidden state(s) of 128 numbers" in one_sentence(said(one))
    assert said(draft_in(tmp_path / "two", changed(**layers(1, 3)), first(2))) == []


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    draft_in(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "a pickle" in one_sentence(said(tmp_path))
    draft_in(tmp_path)  # beside safetensors it does no harm
    assert said(tmp_path) == []


def test_an_unreadable_folder_is_one_sentence(tmp_path: Path) -> None:
    draft_in(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "is incomplete" in one_sentence(said(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LoadError, match="cannot be read as JSON"):
        verdict(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(LoadError, match=r"has no config\.json"):
        verdict(tmp_path)


# --- ranks ---


@pytest.mark.parametrize(
    ("changes", "ranks", "words"),
    [
        ({}, 3, ["16 query heads and 512 MLP rows and 4 KV heads", "3 attention ranks"]),
        ({}, 32, ["16 query heads", "32 attention ranks"]),
        ({"intermediate_size": 510}, 4, ["510 MLP rows"]),
        ({"num_key_value_heads": 8}, 12, ["16 query heads and 512 MLP rows and 8 KV heads"]),
    ],
)
def test_a_draft_that_ranks_cannot_share(
    changes: dict[str, Any], ranks: int, words: list[str]
) -> None:
    assert TINY is not None
    sentence = one_sentence(
        list(refusals(TINY, Draft.from_config(changed(**changes)), None, ranks))
    )
    assert all(word in sentence for word in words), sentence
