"""A config.json that is not one of this model: one sentence with the field, before any weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_minimax import TINY_M2
from sglang_minimax.cli.local_server import LocalServer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

LAYERS = 4
#: name -> (changes of config.json, words of the sentence)
CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "another_model": ({"model_type": "llama"}, ("model_type", "'llama'", "'minimax_m2'")),
    "softmax_router": ({"scoring_func": "softmax"}, ("scoring_func", "'softmax'", "'sigmoid'")),
    "norm_per_head": ({"qk_norm_type": "per_head"}, ("qk_norm_type", "'per_head'")),
    "no_norm": ({"use_qk_norm": False}, ("use_qk_norm", "False")),
    "no_bias": ({"use_routing_bias": False}, ("use_routing_bias", "False")),
    "gelu": ({"hidden_act": "gelu"}, ("hidden_act", "'gelu'", "'silu'")),
    "shared_experts": ({"shared_intermediate_size": 256}, ("shared_intermediate_size", "256")),
    "sliding_window": ({"sliding_window": 1024}, ("sliding_window", "1024")),
    "linear_attention": ({"attn_type_list": [0, 1, 1, 1]}, ("attn_type_list", "layer 0")),
    "layers_disagree": ({"attn_type_list": [1] * 5}, ("attn_type_list", "5", str(LAYERS))),
    "rotary_odd": ({"rotary_dim": 15}, ("rotary dimension", "15", "even")),
    "rotary_too_wide": ({"rotary_dim": 64}, ("rotary dimension", "64", "head_dim 32")),
    "rotary_contradictory": (
        {"rotary_dim": 16, "partial_rotary_factor": 1.0},
        ("rotary dimension", "rotary_dim 16", "32"),
    ),
    "no_experts": ({"num_local_experts": 0}, ("num_local_experts", "0", "at least 1")),
    "top_k_too_large": ({"num_experts_per_tok": 9}, ("num_experts_per_tok", "9", "8")),
    "kv_heads_uneven": ({"num_key_value_heads": 5}, ("16 query heads", "5 KV heads")),
    "eps_nan": ({"rms_norm_eps": float("nan")}, ("rms_norm_eps", "nan", "positive")),
    "eps_negative": ({"rms_norm_eps": -1e-6}, ("rms_norm_eps", "-1e-06", "positive")),
    "theta_infinite": ({"rope_theta": float("inf")}, ("rope_theta", "inf")),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_value_we_do_not_run_is_named(case: str, derive: Any, launch: Any) -> None:
    changes, words = CONFIGS[case]
    ended = launch(derive(config=changes))
    ended.assert_refused("sglang-minimax: config: ", *words)
    assert ended.status == 1
    sentences = [line for line in ended.output.splitlines() if "sglang-minimax: " in line]
    assert len(sentences) == 1, "more than one sentence"
    assert all(word in sentences[0] for word in words)


@pytest.mark.parametrize(
    ("option", "size", "words"),
    [
        ("--tp-size", "3", ("--tp-size 3", "16 query heads", "4 KV heads", "2 or 4")),
        ("--tp-size", "32", ("--tp-size 32", "16 query heads")),
        ("--pp-size", "5", ("--pp-size 5", "4 layers")),
    ],
)
def test_a_topology_that_does_not_divide_is_refused(
    option: str, size: str, words: tuple[str, ...], launch: Any
) -> None:
    ended = launch(TINY_M2, option, size)
    ended.assert_refused("sglang-minimax: ", *words)
    assert ended.status == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"num_hidden_layers": 3, "attn_type_list": [1, 1, 1]},
            "unexpected: model.layers.3.",
        ),
        (
            {"num_hidden_layers": 5, "attn_type_list": [1] * 5},
            "missing: model.layers.4.",
        ),
        ({"num_local_experts": 16}, "expected [16, 128]"),
        ({"intermediate_size": 256}, "is [384, 128], expected [256, 128]"),
        ({"head_dim": 64, "rotary_dim": 32}, "is [512, 128], expected [1024, 128]"),
        ({"vocab_size": 1000}, "is [896, 128], expected [1000, 128]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_sound_config_of_another_checkpoint_is_refused(
    changes: dict[str, Any], sentence: str, derive: Any, launch: Any
) -> None:
    ended = launch(derive(config=changes))
    ended.assert_refused("the weights do not fit the model", sentence, "config.json")


def test_an_unknown_quantisation_is_refused(derive: Any, launch: Any) -> None:
    quantised = {"quantization_config": {"quant_method": "brand-new", "bits": 3}}
    launch(derive(config=quantised)).assert_refused("brand-new", trace=True)


# --- what nobody can take for MiniMax-M2 ---------------------------------------------------
# transformers reads config.json before the model is known. Its sentence is the last thing
# printed, under a stack trace of SGLang.


def test_an_unknown_model_type_is_named(derive: Any, launch: Any) -> None:
    ended = launch(derive(config={"model_type": "minimax_m9"}))
    ended.assert_refused("model type `minimax_m9`", trace=True)


def test_a_text_where_a_number_belongs_is_named(derive: Any, launch: Any) -> None:
    ended = launch(derive(config={"hidden_size": "128"}))
    ended.assert_refused("hidden_size", "str", trace=True)


def test_a_missing_config_is_named(derive: Any, launch: Any) -> None:
    folder = derive()
    (folder / "config.json").unlink()
    launch(folder).assert_refused(str(folder), "config.json", trace=True)


@pytest.mark.parametrize("content", [b'{"architectures": [', b"", b"\xff\xfe", b"[]"], ids=repr)
def test_a_malformed_config_is_named(content: bytes, derive: Any, launch: Any) -> None:
    folder = derive()
    derive.replace(folder / "config.json", content)
    launch(folder).assert_refused("config", trace=True)


# --- the real thing ------------------------------------------------------------------------


@pytest.mark.server
def test_the_sentence_of_a_real_server(derive: Any, run_to_the_end: Any) -> None:
    folder: Path = derive(config={"scoring_func": "softmax"})
    assert json.loads((folder / "config.json").read_text())["scoring_func"] == "softmax"
    ended = run_to_the_end(LocalServer(folder).command)
    assert ended.status == 1
    assert "sglang-minimax: config: scoring_func is 'softmax'" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.orphans == []
