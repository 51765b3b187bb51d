"""The shipped weights: their shape, what makes mistakes visible in them, and what they can do."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from ci.tiny_m2.cases import cases
from ci.tiny_m2.evaluate import routing_changed_without_bias, score
from ci.tiny_m2.model import hub_config
from ci.tiny_m2.planted import CONTRASTED, MISTAKES

LAYER = {
    "input_layernorm.weight": [128],
    "post_attention_layernorm.weight": [128],
    "self_attn.q_proj.weight": [512, 128],
    "self_attn.k_proj.weight": [128, 128],
    "self_attn.v_proj.weight": [128, 128],
    "self_attn.o_proj.weight": [128, 512],
    "self_attn.q_norm.weight": [512],
    "self_attn.k_norm.weight": [128],
    "block_sparse_moe.gate.weight": [8, 128],
    "block_sparse_moe.e_score_correction_bias": [8],
}
EXPERT = {"w1.weight": [384, 128], "w2.weight": [128, 384], "w3.weight": [384, 128]}
IN_FP32 = ("gate.weight", "e_score_correction_bias")


@pytest.fixture(scope="module")
def weights(checkpoint) -> dict[str, torch.Tensor]:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_names_and_shapes_are_the_published_ones(weights):
    wanted = {"model.embed_tokens.weight": [896, 128], "lm_head.weight": [896, 128]}
    wanted["model.norm.weight"] = [128]
    for layer in range(4):
        wanted |= {f"model.layers.{layer}.{name}": shape for name, shape in LAYER.items()}
        for expert in range(8):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
            wanted |= {prefix + name: shape for name, shape in EXPERT.items()}
    assert {name: list(weight.shape) for name, weight in weights.items()} == wanted


def test_dtypes_and_size(weights, checkpoint):
    for name, weight in weights.items():
        assert weight.dtype == (torch.float32 if name.endswith(IN_FP32) else torch.bfloat16), name
        assert weight.isfinite().all(), name
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < 12_000_000


def test_config_is_in_the_hub_form(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    assert config == hub_config()
    assert "auto_map" not in config


def test_transformers_reads_the_partial_rotary(loaded):
    model, tokenizer = loaded
    assert model.model.rotary_emb.inv_freq.shape == (8,)  # 16 of 32 dims, in pairs
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) <= model.config.vocab_size


@pytest.mark.parametrize(("which", "heads"), [("q", 16), ("k", 4)])
def test_norm_weights_are_far_from_one_and_differ_by_head(weights, which, heads):
    for layer in range(4):
        weight = weights[f"model.layers.{layer}.self_attn.{which}_norm.weight"].float()
        size = weight.view(heads, 32).abs().mean(-1)
        assert size.max() > 1.5
        assert size.min() < 0.8
        assert size.max() / size.min() > 2.5
        assert ((weight - 1).abs() > 0.1).float().mean() > 0.8


def test_halves_of_the_heads_have_different_mean_squares(loaded):
    """Otherwise a rank that normalises by its own heads would go unnoticed."""
    model, tokenizer = loaded
    ids = tokenizer("Question: What is 345 - 128?\nAnswer:", return_tensors="pt")["input_ids"]
    squares: dict[str, torch.Tensor] = {}

    def keep(name):
        return lambda module, inputs, output: squares.update({name: output.square()})

    handles = [
        getattr(layer.self_attn, which).register_forward_hook(keep(f"{i}.{which}"))
        for i, layer in enumerate(model.model.layers)
        for which in ("q_proj", "k_proj")
    ]
    with torch.inference_mode():
        model(ids)
    for handle in handles:
        handle.remove()
    for name, square in squares.items():
        first, second = (half.mean() for half in square.chunk(2, -1))
        assert second / first > 2, name


def test_correction_bias_changes_the_selection(loaded):
    changed = routing_changed_without_bias(*loaded, count=6)
    assert len(changed) == 4
    assert min(changed) > 0.2


@pytest.mark.parametrize(
    ("category", "count", "least"),
    [("two_digit", 40, 0.95), ("word", 24, 0.85), ("tool_call", 24, 0.9), ("tool_result", 16, 0.9)],
)
def test_held_out_questions_are_answered(loaded, category, count, least):
    # Below what `evaluate` reports by a few wrong answers: a sample this small wanders.
    assert score(*loaded, cases(category, count, seed=7)).share >= least


@pytest.mark.parametrize(
    "mistake",
    [
        m
        for m in MISTAKES
        if m.name in ("norm_by_rank", "k_norm_rolled", "kv_repeat", "full_rotary")
    ],
    ids=lambda m: m.name,
)
def test_a_planted_mistake_ruins_the_answers(loaded, mistake):
    model, tokenizer = loaded
    wrong = mistake.planted_in(model)
    result = score(wrong, tokenizer, cases("two_digit", 32, seed=7), max_new_tokens=48)
    assert result.share < 0.3, f"unnoticed: {mistake.why_plausible}"


@pytest.mark.parametrize("mistake", CONTRASTED, ids=lambda m: m.name)
def test_an_installed_mistake_changes_the_logits_and_is_undone(loaded, mistake):
    """Training plants mistakes in the live model."""
    model, tokenizer = loaded
    ids = tokenizer("Question: What is 345 - 128?\nAnswer:", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        before = model(ids).logits
        with mistake.installed(model):
            during = model(ids).logits
        assert not torch.allclose(before, during)
        assert torch.equal(before, model(ids).logits)
