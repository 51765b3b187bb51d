"""Every reason against a draft, each beside a near miss that passes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_minimax import TINY_M2, TINY_M2_EAGLE3
from sglang_minimax.config import Architecture
from sglang_minimax.drafts.checks import doubts, refusals
from sglang_minimax.drafts.config import Draft, guessed_layers
from sglang_minimax.drafts.judgement import Verdict, draft_config, judge
from sglang_minimax.drafts.options import Options
from sglang_minimax.drafts.options import refusals as refused_options
from sglang_minimax.drafts.tensors import canonical
from sglang_minimax.errors import ConfigError, LoadError, MinimaxError
from sglang_minimax.loading.files import architecture_of
from tests.drafts import REMOVED, State, draft_in, layers
from tests.drafts import draft_config as changed

Change = Callable[[State], State | None]

TINY = architecture_of(TINY_M2)
PUBLISHED = Architecture.from_config(
    json.loads((Path(__file__).parents[1] / "data" / "published_config.json").read_text())
)
#: As published for MiniMax-M2.5: a third of the heads, 32000 of the tokens, a layer of three.
PUBLISHED_DRAFT = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "draft_vocab_size": 32000,
    "eagle_config": {
        "eagle_aux_hidden_state_layer_ids": [1, 30, 58],
        "use_aux_hidden_state": True,
    },
    "head_dim": 128,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "model_type": "llama",
    "num_attention_heads": 24,
    "num_hidden_layers": 1,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "vocab_size": 200064,
}


def verdict(folder: Path, ranks: int = 1) -> Verdict:
    assert TINY is not None
    return judge(TINY, draft_config(folder), weights=folder, target=TINY_M2, ranks=ranks)


def said(folder: Path, ranks: int = 1) -> list[str]:
    """Everything that is said of a draft, an unreadable one included."""
    try:
        found = verdict(folder, ranks)
    except MinimaxError as error:
        return [str(error)]
    return [*found.refusals, *found.doubts]


def one_sentence(sentences: list[str]) -> str:
    (sentence,) = sentences
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


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
    "a layer more": ({"num_hidden_layers": 2}, ["no layers.1.hidden_norm.weight", "6 more"]),
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


# --- tensors ---


def without(*names: str) -> Change:
    def change(tensors: State) -> None:
        for name in names:
            del tensors[name]

    return change


def grown(name: str) -> Change:
    def change(tensors: State) -> None:
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])

    return change


def absolute_map(tensors: State) -> None:
    """Ids of the target where the distance to them belongs."""
    tensors["d2t"] += torch.arange(len(tensors["d2t"]))


def negative_map(tensors: State) -> None:
    tensors["d2t"][0] = -1


def last_token_and_one(tensors: State) -> None:
    tensors["d2t"][-1] = 896 - 255


def float_map(tensors: State) -> None:
    tensors["d2t"] = tensors["d2t"].float()


STORED = sorted(
    name
    for name in (
        *("d2t", "fc.weight", "lm_head.weight", "norm.weight"),
        *(
            f"midlayer.{norm}.weight"
            for norm in ("hidden_norm", "input_layernorm", "post_attention_layernorm")
        ),
        *(f"midlayer.self_attn.{side}_proj.weight" for side in "qkvo"),
        *(f"midlayer.mlp.{side}_proj.weight" for side in ("gate", "up", "down")),
    )
)


@pytest.mark.parametrize("name", STORED)
def test_each_tensor_is_needed_in_its_shape(name: str, tmp_path: Path) -> None:
    sentence = one_sentence(said(draft_in(tmp_path / "without", change=without(name))))
    assert canonical(name) in sentence
    sentence = one_sentence(said(draft_in(tmp_path / "grown", change=grown(name))))
    assert canonical(name) in sentence


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (absolute_map, ["d2t", "distance", "896 tokens"]),
        (negative_map, ["makes token -1 of its token 0", "1 of 256"]),
        (last_token_and_one, ["makes token 896 of its token 255", "1 of 256"]),
        (float_map, ["d2t of the draft is F32"]),
    ],
)
def test_the_map_stays_in_the_vocabulary(change: Change, words: list[str], tmp_path: Path) -> None:
    sentence = one_sentence(said(draft_in(tmp_path, change=change)))
    assert all(word in sentence for word in words), sentence


def last_token(tensors: State) -> None:
    tensors["d2t"][-1] = 895 - 255


def narrow_map(tensors: State) -> None:
    tensors["d2t"] = tensors["d2t"].int()


def newer_names(tensors: State) -> State:
    return {f"model.{canonical(name)}": value for name, value in tensors.items()}


def fused(tensors: State) -> None:
    path = "midlayer.self_attn"
    parts = [tensors.pop(f"{path}.{side}_proj.weight") for side in "qkv"]
    tensors[f"{path}.qkv_proj.weight"] = torch.cat(parts)
    parts = [tensors.pop(f"midlayer.mlp.{side}_proj.weight") for side in ("gate", "up")]
    tensors["midlayer.mlp.gate_up_proj.weight"] = torch.cat(parts)


@pytest.mark.parametrize("change", [last_token, narrow_map, newer_names, fused, without("t2d")])
def test_other_forms_of_the_same_draft_pass(change: Change, tmp_path: Path) -> None:
    assert said(draft_in(tmp_path, change=change)) == []


def test_a_fused_matrix_has_all_rows(tmp_path: Path) -> None:
    def change(tensors: State) -> None:
        fused(tensors)
        name = "midlayer.self_attn.qkv_proj.weight"
        tensors[name] = tensors[name][:-1]

    assert "767x256" in one_sentence(said(draft_in(tmp_path, change=change)))


def whole_vocabulary(tensors: State) -> None:
    tensors["lm_head.weight"] = torch.zeros(896, 128, dtype=torch.bfloat16)
    del tensors["d2t"], tensors["t2d"]


def test_a_draft_with_the_whole_vocabulary_needs_no_map(tmp_path: Path) -> None:
    config = changed(draft_vocab_size=896)
    assert said(draft_in(tmp_path, config, whole_vocabulary)) == []
    headless = draft_in(tmp_path / "headless", config, without("lm_head.weight", "d2t", "t2d"))
    assert "draft_vocab_size to null" in one_sentence(said(headless))
    # And one without a head of its own takes the model's.
    shared = changed(draft_vocab_size=None)
    assert said(draft_in(tmp_path, shared, without("lm_head.weight", "d2t", "t2d"))) == []


def test_a_narrower_draft_needs_its_own_embedding(tmp_path: Path) -> None:
    """Which SGLang leaves it only where target_hidden_size says that the widths differ."""
    config = changed(hidden_size=64, target_hidden_size=128, draft_vocab_size=896)
    small = {"num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 4}
    config |= {**small, "intermediate_size": 96}

    def change(tensors: State) -> State:
        shapes = {
            "embed_tokens": (896, 64),
            "fc": (64, 384),
            "lm_head": (896, 64),
            "norm": (64,),
            **{f"midlayer.self_attn.{side}_proj": (64, 128) for side in "qkv"},
            "midlayer.self_attn.o_proj": (64, 64),
            **{f"midlayer.mlp.{side}_proj": (96, 64) for side in ("gate", "up")},
            "midlayer.mlp.down_proj": (64, 96),
            **{f"midlayer.{norm}_norm": (64,) for norm in ("hidden",)},
            **{f"midlayer.{norm}_layernorm": (64,) for norm in ("input", "post_attention")},
        }
        return {f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}

    assert said(draft_in(tmp_path, config, change)) == []

    def without_embedding(tensors: State) -> State:
        found = change(tensors)
        del found["embed_tokens.weight"]
        return found

    sentence = one_sentence(said(draft_in(tmp_path, config, without_embedding)))
    assert "embed_tokens.weight" in sentence
    shared = {**config, "draft_vocab_size": None}
    assert "the model's head takes 128" in one_sentence(said(draft_in(tmp_path, shared, change)))


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


# --- drafts as published ---


def published(**changes: Any) -> tuple[list[str], list[str]]:
    draft = Draft.from_config(
        {
            key: value
            for key, value in {**PUBLISHED_DRAFT, **changes}.items()
            if value is not REMOVED
        }
    )
    return list(refusals(PUBLISHED, draft)), list(doubts(PUBLISHED, draft, "0" * 16))


def test_a_published_draft_passes() -> None:
    assert published() == ([], [])
    assert published(num_aux_hidden_states=3, target_hidden_size=3072) == ([], [])


@pytest.mark.parametrize("changes", [{"eagle_config": REMOVED}, {"eagle_config": {}}, layers()])
def test_what_sglang_would_guess_is_said(changes: dict[str, Any]) -> None:
    refused, doubted = published(**changes)
    assert refused == []
    sentence = one_sentence(doubted)
    assert "names no layers" in sentence
    assert "outputs of layers [1, 30, 58], as SpecForge does unless told otherwise" in sentence
    (option,) = re.findall(r"--json-model-override-args '(.*)', or", sentence)
    assert published(**json.loads(option)) == ([], [])
    assert "SGLANG_MINIMAX_DRAFT=any" in sentence


def test_layers_in_the_wrong_place_are_pointed_out() -> None:
    """vLLM looks there; so does SGLang for their number, but not for the layers themselves."""
    outside = {"eagle_config": REMOVED, "eagle_aux_hidden_state_layer_ids": [2, 31, 59]}
    refused, doubted = published(**outside)
    assert refused == []
    sentence = one_sentence(doubted)
    assert "outside of eagle_config, where SGLang does not look" in sentence
    assert "[2, 31, 59] is [1, 30, 58] here" in sentence


def test_what_else_eagle_config_says_stays_in_the_remedy() -> None:
    _, doubted = published(eagle_config={"norm_before_fc": True})
    assert '{"eagle_config": {"norm_before_fc": true, "eagle_aux' in one_sentence(doubted)


def test_a_guess_of_another_number_is_refused() -> None:
    refused, _ = published(eagle_config={}, num_aux_hidden_states=4)
    assert "takes 4 hidden states" in one_sentence(refused)


def test_a_draft_of_the_last_hidden_state_alone_needs_no_layers() -> None:
    last = {"eagle_config": {"use_aux_hidden_state": False}}
    assert published(**last) == ([], [])
    refused, _ = published(**last, hidden_size=1536, target_hidden_size=3072)
    assert "reads the model's last hidden state alone" in one_sentence(refused)


def test_of_another_eagle_class_the_configuration_is_judged() -> None:
    other = {"architectures": ["Eagle3DeepseekV2ForCausalLM"], "num_attention_heads": 64}
    assert published(**other) == ([], [])
    refused, _ = published(**other, **layers(1, 30, 62))
    assert "no 62" in one_sentence(refused)
    draft = Draft.from_config({**PUBLISHED_DRAFT, **other})
    assert list(refusals(PUBLISHED, draft, {}, ranks=16)) == [
        "the draft knows 32000 of 200064 tokens and has no d2t, which would say which; "
        "download or train the draft again."
    ]


def test_matrices_of_a_quantised_draft_are_left_to_sglang(tmp_path: Path) -> None:
    def change(tensors: State) -> None:
        for name in list(tensors):
            if "proj" in name:
                tensors[f"{name}_packed"] = tensors.pop(name)[:, ::8]

    config = changed(quantization_config={"quant_method": "compressed-tensors"})
    assert said(draft_in(tmp_path, config, change)) == []
    assert "no layers.0.self_attn.q_proj.weight" in said(draft_in(tmp_path, change=change))[0]
    # As ModelOpt says it, in a file of its own.
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert said(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, Options(rejection_sampling=True), "knows 256 of 896 tokens"),
        ({"draft_vocab_size": None}, Options(rejection_sampling=True), None),
        ({"draft_vocab_size": 896}, Options(rejection_sampling=True), None),
        ({}, Options(quantization="compressed-tensors"), "quantization unquant"),
        ({}, Options(quantization="awq_marlin"), "--quantization awq_marlin would be the draft's"),
        ({}, Options(quantization="fp8"), None),
        ({}, Options(quantization="modelopt_fp4"), None),
        ({"quantization_config": {}}, Options(quantization="awq_marlin"), None),
    ],
)
def test_options_that_a_draft_does_not_go_with(
    changes: dict[str, Any], options: Options, words: str | None
) -> None:
    found = list(refused_options(Draft.from_config(changed(**changes)), options))
    if words is None:
        assert found == []
    else:
        assert words in one_sentence(found)


@given(st.integers(7, 200))
def test_a_guess_is_three_layers_of_any_model_that_is_deep_enough(depth: int) -> None:
    guess = guessed_layers(depth)
    assert len(set(guess)) == 3
    assert all(0 <= layer < depth for layer in guess)
    # Inputs, as SGLang counts.
    assert [layer + 1 for layer in guess] == [2, depth // 2, depth - 3]


ODD: tuple[Any, ...] = (None, True, -1, 0, 7, 10**12, 2.5, "", "3072", [], [1, 1], {}, {"a": 1})


@given(st.dictionaries(st.sampled_from(sorted(PUBLISHED_DRAFT)), st.sampled_from(ODD)))
def test_any_configuration_is_read_or_refused(changes: dict[str, Any]) -> None:
    try:
        draft = Draft.from_config({**PUBLISHED_DRAFT, **changes})
    except ConfigError as error:
        sentences = [str(error)]
    else:
        sentences = [*refusals(PUBLISHED, draft, {}), *doubts(PUBLISHED, draft, "0")]
    for sentence in sentences:
        assert one_sentence([sentence])
