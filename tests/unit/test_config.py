"""`Architecture.from_config` over every form of the configuration, and over what it must refuse."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, MiniMaxM2Config

from sglang_minimax.config import Architecture
from sglang_minimax.errors import ConfigError
from sglang_minimax.loading.formats import recipe_of
from sglang_minimax.loading.formats.base import UNQUANTISED
from sglang_minimax.loading.formats.fp8 import blocks

PUBLISHED: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "attn_type_list": [1] * 62,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "max_position_embeddings": 196608,
    "model_type": "minimax_m2",
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "num_mtp_modules": 3,
    "qk_norm_type": "per_layer",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
}

EXPECTED = Architecture(
    hidden_size=3072,
    num_layers=62,
    vocab_size=200064,
    num_heads=48,
    num_kv_heads=8,
    head_dim=128,
    rotary_dim=64,
    rope_theta=5e6,
    rope_scaling=None,
    rms_norm_eps=1e-6,
    max_position=196608,
    num_experts=256,
    top_k=8,
    expert_width=1536,
    num_mtp_modules=3,
    tie_word_embeddings=False,
    recipe=recipe_of(PUBLISHED["quantization_config"]),
)

FLAT_EXTRAS = (
    "rotary_dim",
    "use_qk_norm",
    "qk_norm_type",
    "use_routing_bias",
    "scoring_func",
    "attn_type_list",
    "shared_intermediate_size",
)


def published(**changes: Any) -> dict[str, Any]:
    return {**PUBLISHED, **changes}


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in PUBLISHED.items() if key not in keys}


def as_auto_config(config: dict[str, Any], folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder)


def test_published_form():
    assert Architecture.from_config(PUBLISHED) == EXPECTED


def test_the_published_recipe_is_fp8_in_blocks():
    recipe = EXPECTED.recipe
    assert (recipe.method, recipe.quantised) == ("fp8", blocks(128, 128))
    assert EXPECTED.expert_unit == 128


def test_the_unit_of_an_expert_covers_the_blocks_of_w1_and_of_w2():
    def unit(**quantisation: Any) -> int:
        config = {"quant_method": "fp8", **quantisation}
        return Architecture.from_config(published(quantization_config=config)).expert_unit

    assert unit(weight_block_size=[128, 64]) == 128
    assert unit(weight_block_size=[96, 64]) == 192
    experts = "model.layers.0.block_sparse_moe.experts"
    assert unit(weight_block_size=[128, 128], modules_to_not_convert=[experts]) == 1
    assert Architecture.from_config(without("quantization_config")).expert_unit == 1


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantisation_is_found_under_both_keys(key):
    config = without("quantization_config") | {key: PUBLISHED["quantization_config"]}
    assert Architecture.from_config(config) == EXPECTED
    held = SimpleNamespace(to_dict=lambda: PUBLISHED["quantization_config"])
    assert Architecture.from_config(config | {key: held}) == EXPECTED


def test_a_quantisation_of_none_is_none():
    for nothing in (None, {}):
        arch = Architecture.from_config(published(quantization_config=nothing))
        assert arch.recipe == UNQUANTISED


def test_an_object_reads_like_a_mapping():
    assert Architecture.from_config(SimpleNamespace(**PUBLISHED)) == EXPECTED


def test_published_form_through_transformers_and_back(tmp_path):
    config = as_auto_config(PUBLISHED, tmp_path)
    assert type(config) is MiniMaxM2Config
    assert Architecture.from_config(config) == EXPECTED
    config.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "rope_parameters" in saved
    assert Architecture.from_config(saved) == EXPECTED
    assert Architecture.from_config(AutoConfig.from_pretrained(tmp_path / "saved")) == EXPECTED


def test_native_form_has_none_of_the_flat_keys_and_means_the_same():
    native = MiniMaxM2Config(rope_parameters={"rope_theta": 5e6, "partial_rotary_factor": 0.5})
    assert not any(hasattr(native, key) for key in FLAT_EXTRAS)
    arch = Architecture.from_config(native)
    assert (arch.rotary_dim, arch.rope_theta, arch.rope_scaling) == (64, 5e6, None)
    assert (arch.num_experts, arch.top_k, arch.recipe) == (256, 8, UNQUANTISED)


def test_a_silent_configuration_rotates_half_a_head_never_all_of_it():
    assert Architecture.from_config(MiniMaxM2Config()).rotary_dim == 64
    assert Architecture.from_config(without(*FLAT_EXTRAS)).rotary_dim == 64
    assert Architecture.from_config(without(*FLAT_EXTRAS) | {"head_dim": 32}).rotary_dim == 16


def test_absent_keys_get_the_architectures_values():
    arch = Architecture.from_config({"head_dim": 128})
    assert arch == Architecture.from_config(without("quantization_config", "num_mtp_modules"))


def test_a_factor_written_by_division_is_exact():
    for head_dim in range(2, 257, 2):
        for rotary_dim in range(2, head_dim + 1, 2):
            config = without("rotary_dim") | {
                "head_dim": head_dim,
                "rope_parameters": {"partial_rotary_factor": rotary_dim / head_dim},
            }
            assert Architecture.from_config(config).rotary_dim == rotary_dim


def test_head_dim_defaults_to_the_architectures_as_in_transformers():
    """Not to hidden / heads, which is 64 for the published shape."""
    assert MiniMaxM2Config(hidden_size=512, num_attention_heads=16).head_dim == 128
    assert Architecture.from_config({"hidden_size": 512, "num_attention_heads": 16}).head_dim == 128
    assert Architecture.from_config(without("head_dim")).head_dim == 128
    assert Architecture.from_config(published(head_dim=None)).head_dim == 128


def test_rope_scaling_keeps_its_factors_and_drops_what_has_its_own_field():
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    arch = Architecture.from_config(published(rope_parameters=rope))
    assert dict(arch.rope_scaling) == {"rope_type": "yarn", "factor": 4.0}
    old = Architecture.from_config(published(rope_scaling={"type": "yarn", "factor": 4.0}))
    assert old == arch


def test_tied_embeddings_are_a_choice():
    assert Architecture.from_config(published(tie_word_embeddings=True)).tie_word_embeddings


REFUSED = {
    "another architecture": ({"architectures": ["MiniMaxM1ForCausalLM"]}, "architectures"),
    "another model type": ({"model_type": "minimax"}, "model_type"),
    "softmax router": ({"scoring_func": "softmax"}, "sigmoid"),
    "norm per head": ({"qk_norm_type": "per_head"}, "per_layer"),
    "no QK norm": ({"use_qk_norm": False}, "use_qk_norm"),
    "no routing bias": ({"use_routing_bias": False}, "use_routing_bias"),
    "shared expert": ({"shared_intermediate_size": 1024}, "shared_intermediate_size"),
    "sliding window": ({"sliding_window": 4096}, "sliding_window"),
    "another activation": ({"hidden_act": "gelu"}, "silu"),
    "linear attention": ({"attn_type_list": [1] * 61 + [0]}, "MiniMax-M1"),
    "attention list too short": ({"attn_type_list": [1] * 4}, "62"),
    "linear layer types": ({"layer_types": ["linear_attention"] * 62}, "linear_attention"),
    "rotary against factor": ({"partial_rotary_factor": 0.25}, "contradictory"),
    "rotary against rope dict": (
        {"rope_parameters": {"partial_rotary_factor": 1.0}},
        "contradictory",
    ),
    "theta twice": ({"rope_parameters": {"rope_theta": 10000.0}}, "contradictory"),
    "two rope dicts": (
        {"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": {"rope_type": "linear"}},
        "rope_type",
    ),
    "unknown rope": ({"rope_parameters": {"rope_type": "spiral"}}, "spiral"),
    "rope not a dict": ({"rope_scaling": 4.0}, "rope_scaling"),
    "odd rotary": ({"rotary_dim": 63}, "even"),
    "rotary over head": ({"rotary_dim": 256}, "head_dim"),
    "uneven heads": ({"num_attention_heads": 46}, "46"),
    "too many chosen experts": ({"num_experts_per_tok": 512}, "512"),
    "two expert counts": ({"num_experts": 128}, "contradictory"),
    "no layer": ({"num_hidden_layers": 0, "attn_type_list": []}, "num_hidden_layers"),
    "negative vocabulary": ({"vocab_size": -1}, "vocab_size"),
    "fractional width": ({"intermediate_size": 1536.5}, "whole"),
    "boolean width": ({"hidden_size": True}, "whole"),
    "zero eps": ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
    "NaN eps": ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "infinite theta": ({"rope_theta": float("inf")}, "rope_theta"),
    "eps as text": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    "tied as text": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    "one-sided block": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
        "[128], but it must name two numbers",
    ),
    "empty block": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}},
        "at least 1",
    ),
    "boolean block": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [True, 128]}},
        "at least 1",
    ),
    "no method": ({"quantization_config": {"weight_block_size": [128, 128]}}, "None"),
    "unknown method": ({"quantization_config": {"quant_method": "spam"}}, "'spam'"),
    "quantisation as text": ({"quantization_config": "fp8"}, "must be an object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence_that_names_the_value(case):
    changes, said = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        Architecture.from_config(published(**changes))
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert message.endswith(".")


@pytest.mark.parametrize("key", ["scoring_func", "use_qk_norm", "rotary_dim", "qk_norm_type"])
def test_refusals_hold_through_transformers(key, tmp_path):
    wrong = {"scoring_func": "softmax", "use_qk_norm": False, "rotary_dim": 30}
    wrong["qk_norm_type"] = "per_head"
    good = as_auto_config(PUBLISHED, tmp_path)
    setattr(good, key, wrong[key])
    with pytest.raises(ConfigError):
        Architecture.from_config(good)
