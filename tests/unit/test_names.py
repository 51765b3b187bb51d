"""The grammar of tensor names, against names that transformers makes itself."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, MiniMaxM2Config

from sglang_minimax.loading.names import MATRIX_KINDS, TensorName, omission, parse, spell

LAYER = "model.layers.3."

KNOWN = {
    "model.embed_tokens.weight": (None, "embed_tokens", "weight"),
    "model.norm.weight": (None, "norm", "weight"),
    "lm_head.weight": (None, "lm_head", "weight"),
    LAYER + "input_layernorm.weight": (3, "input_layernorm", "weight"),
    LAYER + "self_attn.q_norm.weight": (3, "q_norm", "weight"),
    LAYER + "self_attn.o_proj.weight_scale_inv": (3, "o_proj", "weight_scale_inv"),
    LAYER + "self_attn.k_proj.k_scale": (3, "attn", "k_scale"),
    LAYER + "self_attn.v_proj.output_scale": (3, "attn", "v_scale"),
    LAYER + "self_attn.attn.v_scale": (3, "attn", "v_scale"),
    LAYER + "self_attn.k_scale": (3, "attn", "k_scale"),
    LAYER + "block_sparse_moe.gate.weight": (3, "gate", "weight"),
    LAYER + "mlp.gate.weight": (3, "gate", "weight"),
    LAYER + "block_sparse_moe.e_score_correction_bias": (3, "e_score_correction_bias", "weight"),
    LAYER + "mlp.e_score_correction_bias": (3, "e_score_correction_bias", "weight"),
    LAYER + "block_sparse_moe.experts.7.w2.weight": (3, "experts", "weight", 7, "w2"),
    LAYER + "mlp.experts.7.up_proj.weight": (3, "experts", "weight", 7, "w3"),
    LAYER + "mlp.experts.gate_up_proj": (3, "experts", "weight", None, "gate_up"),
    LAYER + "mlp.experts.down_proj": (3, "experts", "weight", None, "down"),
}

UNKNOWN = (
    "",
    "model.embed_tokens.bias",
    "model.layers.3.self_attn.qkv_proj.weight",
    "model.layers.3.self_attn.q_proj.qweight",
    "model.layers.3.self_attn.q_proj.k_scale",
    "model.layers.3.self_attn.q_norm.bias",
    "model.layers.x.input_layernorm.weight",
    "model.layers.3.block_sparse_moe.experts.7.w4.weight",
    "model.layers.3.block_sparse_moe.experts.w1.weight",
    "model.layers.3.block_sparse_moe.experts.7.w1.bias",
    "model.layers.3.block_sparse_moe.gate.weight_scale_inv",
    "language_model.model.layers.3.input_layernorm.weight",
    "model.layers.3.input_layernorm.weight.extra",
    "xmodel.layers.3.input_layernorm.weight",
)


@pytest.mark.parametrize("name", KNOWN)
def test_known_names(name):
    assert parse(name) == TensorName(*KNOWN[name])


@pytest.mark.parametrize("name", UNKNOWN)
def test_names_outside_the_grammar(name):
    assert parse(name) is None


def published_names(layers: int, experts: int) -> list[str]:
    """The names of an FP8 checkpoint, from the facts about the published one."""
    scaled = ("weight", "weight_scale_inv")
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for layer in (f"model.layers.{i}" for i in range(layers)):
        names += [f"{layer}.{norm}_layernorm.weight" for norm in ("input", "post_attention")]
        names += [f"{layer}.self_attn.{p}_proj.{k}" for p in "qkvo" for k in scaled]
        names += [f"{layer}.self_attn.{p}_norm.weight" for p in "qk"]
        names += [f"{layer}.block_sparse_moe.gate.weight"]
        names += [f"{layer}.block_sparse_moe.e_score_correction_bias"]
        names += [
            f"{layer}.block_sparse_moe.experts.{e}.w{w}.{k}"
            for e in range(experts)
            for w in (1, 2, 3)
            for k in scaled
        ]
    return names


def test_the_published_checkpoint_is_known_in_full_and_one_to_one():
    names = published_names(62, 256)
    records = {parse(name) for name in names}
    assert len(names) == len(records) == 96_103
    assert None not in records
    assert all(spell(parse(name)) == name for name in names)


def test_every_name_of_transformers_is_known_in_memory_and_on_disk(tmp_path):
    config = MiniMaxM2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config)
    in_memory = [name for name in model.state_dict() if not omitted(name, 2)]
    assert [name for name in in_memory if parse(name) is None] == []
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert [name for name in file.keys() if parse(name) is None] == []  # noqa: SIM118


def omitted(name: str, layers: int, mtp: int = 0) -> str | None:
    return omission(name, num_layers=layers, num_mtp_modules=mtp)


def test_deliberate_omissions_are_named_and_nothing_else_is():
    assert "computed" in omitted("model.layers.0.self_attn.rotary_emb.inv_freq", 62)
    assert "computed" in omitted("model.rotary_emb.inv_freq", 62)
    assert "multi-token" in omitted("model.layers.62.enorm.weight", 62, mtp=3)
    assert "multi-token" in omitted("model.layers.64.self_attn.q_proj.weight", 62, mtp=3)
    assert omitted("model.layers.65.enorm.weight", 62, mtp=3) is None
    assert omitted("model.layers.62.enorm.weight", 62) is None
    assert omitted("model.layers.61.self_attn.q_proj.weight", 62, mtp=3) is None
    assert omitted("model.layers.6.block_sparse_moe.gate.weight", 62, mtp=3) is None


def test_spelling_survives_parsing():
    for kind in MATRIX_KINDS:
        for record in (
            TensorName(0, "q_proj", kind),
            TensorName(61, "experts", kind, 255, "w3"),
        ):
            assert parse(spell(record)) == record
    for stacked in ("gate_up", "down"):
        record = TensorName(1, "experts", "weight", None, stacked)
        assert parse(spell(record)) == record
