"""The grammar of tensor names, against names that transformers and SGLang make themselves."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

from sglang_minimax.loading import names
from sglang_minimax.loading.names import (
    ATTENTION_KINDS,
    KV_SCALES,
    MATRIX_KINDS,
    MATRIX_SCALES,
    OMISSIONS,
    TensorName,
    omission,
    parse,
    spell,
)

LAYER = "model.layers.3."
MOE = LAYER + "block_sparse_moe."
MLP = LAYER + "mlp."
ATTENTION = LAYER + "self_attn."


def expert(projection: str, kind: str = "weight") -> TensorName:
    return TensorName(3, "experts", kind, 7, projection)


def stacked(projection: str, kind: str = "weight") -> TensorName:
    return TensorName(3, "experts", kind, None, projection)


def owned(module: str, kind: str = "weight") -> TensorName:
    return TensorName(3, module, kind)


BIAS = owned("e_score_correction_bias")
K_SCALE, V_SCALE = (TensorName(3, "attn", scale) for scale in KV_SCALES)

KNOWN = {
    "model.embed_tokens.weight": TensorName(None, "embed_tokens", "weight"),
    "model.norm.weight": TensorName(None, "norm", "weight"),
    "lm_head.weight": TensorName(None, "lm_head", "weight"),
    "model.layers.0.input_layernorm.weight": TensorName(0, "input_layernorm", "weight"),
    "model.layers.10.input_layernorm.weight": TensorName(10, "input_layernorm", "weight"),
    LAYER + "post_attention_layernorm.weight": owned("post_attention_layernorm"),
    # Attention.
    ATTENTION + "q_norm.weight": owned("q_norm"),
    ATTENTION + "k_norm.weight": owned("k_norm"),
    ATTENTION + "q_proj.weight": owned("q_proj"),
    ATTENTION + "q_proj.qweight": owned("q_proj", "qweight"),
    ATTENTION + "k_proj.g_idx": owned("k_proj", "g_idx"),
    ATTENTION + "v_proj.bias": owned("v_proj", "bias"),
    ATTENTION + "o_proj.weight_scale_inv": owned("o_proj", "weight_scale_inv"),
    ATTENTION + "o_proj.output_scale": owned("o_proj", "output_scale"),
    ATTENTION + "o_proj.activation_scale": owned("o_proj", "input_scale"),
    ATTENTION + "qkv_proj.weight": owned("qkv_proj"),
    ATTENTION + "qkv_proj.weight_scale_2": owned("qkv_proj", "weight_scale_2"),
    # The router.
    MOE + "gate.weight": owned("gate"),
    MLP + "gate.weight": owned("gate"),
    MOE + "e_score_correction_bias": BIAS,
    MLP + "e_score_correction_bias": BIAS,
    MOE + "gate.e_score_correction_bias": BIAS,
    MLP + "gate.e_score_correction_bias": BIAS,
    # Experts, one matrix each.
    MOE + "experts.7.w1.weight": expert("w1"),
    MOE + "experts.7.w2.weight": expert("w2"),
    MOE + "experts.7.w3.weight_scale_inv": expert("w3", "weight_scale_inv"),
    MLP + "experts.7.gate_proj.weight": expert("w1"),
    MOE + "experts.7.down_proj.weight_packed": expert("w2", "weight_packed"),
    MLP + "experts.7.up_proj.qzeros": expert("w3", "qzeros"),
    # Experts, gate and up in one matrix: the name says which comes first.
    MOE + "experts.7.w13.weight": expert("w13"),
    MOE + "experts.7.w1_w3.weight": expert("w13"),
    MLP + "experts.7.gate_up_proj.weight_scale": expert("w13", "weight_scale"),
    MOE + "experts.7.w31.weight": expert("w31"),
    MOE + "experts.7.w3_w1.weight": expert("w31"),
    MLP + "experts.7.up_gate_proj.weight": expert("w31"),
    # Experts, all in one tensor.
    MLP + "experts.gate_up_proj": stacked("w13"),
    MLP + "experts.down_proj": stacked("w2"),
    MOE + "experts.gate_up_proj": stacked("w13"),
    MOE + "experts.down_proj": stacked("w2"),
    MLP + "experts.gate_up_proj.weight": stacked("w13"),
    MLP + "experts.down_proj.weight_scale_inv": stacked("w2", "weight_scale_inv"),
    MLP + "experts.gate_up_proj_scale_inv": stacked("w13", "weight_scale_inv"),
    MLP + "experts.down_proj_scale_inv": stacked("w2", "weight_scale_inv"),
    MLP + "experts.gate_up_proj_activation_scale": stacked("w13", "input_scale"),
    MLP + "experts.down_proj.activation_scale": stacked("w2", "input_scale"),
    MLP + "experts.down_proj_bias": stacked("w2", "bias"),
    MLP + "experts.gate_up_proj_weight_scale_2": stacked("w13", "weight_scale_2"),
    MLP + "experts.up_gate_proj": stacked("w31"),
    MOE + "experts.w13_weight": stacked("w13"),
    MOE + "experts.w2_weight": stacked("w2"),
    MOE + "experts.w13_weight_scale_inv": stacked("w13", "weight_scale_inv"),
    MOE + "experts.w13_weight_bias": stacked("w13", "bias"),
    MOE + "experts.w2_bias": stacked("w2", "bias"),
    MOE + "experts.w31_weight": stacked("w31"),
    MOE + "experts.w3_w1_weight_scale": stacked("w31", "weight_scale"),
    MOE + "experts.w2_g_idx": stacked("w2", "g_idx"),
    # Scales of attention.
    ATTENTION + "k_proj.k_scale": K_SCALE,
    ATTENTION + "v_proj.v_scale": V_SCALE,
    ATTENTION + "k_scale": K_SCALE,
    ATTENTION + "v_scale": V_SCALE,
    ATTENTION + "attn.k_scale": K_SCALE,
    ATTENTION + "attn.v_scale": V_SCALE,
    ATTENTION + "k_proj.output_scale": K_SCALE,
    ATTENTION + "v_proj.output_scale": V_SCALE,
    ATTENTION + "qkv_proj.k_scale": K_SCALE,
    ATTENTION + "qkv_proj.v_scale": V_SCALE,
    ATTENTION + "kv_scale": owned("attn", "kv_scale"),
    ATTENTION + "q_proj.output_scale": owned("attn", "q_scale"),
    ATTENTION + "prob_output_scale": owned("attn", "prob_scale"),
    ATTENTION + "k_zero_point": owned("attn", "k_zero_point"),
    # Quantised where nothing published is: a refusal must be able to name them.
    MOE + "gate.weight_scale_inv": owned("gate", "weight_scale_inv"),
    "lm_head.qweight": TensorName(None, "lm_head", "qweight"),
    "model.embed_tokens.weight_scale": TensorName(None, "embed_tokens", "weight_scale"),
    LAYER + "input_layernorm.bias": owned("input_layernorm", "bias"),
    # Inside a wrapper, on disk and in transformers' memory.
    "language_model.lm_head.weight": TensorName(None, "lm_head", "weight"),
    "language_model.model.embed_tokens.weight": TensorName(None, "embed_tokens", "weight"),
    "language_model." + MOE + "experts.7.w2.weight": expert("w2"),
    "model.language_model.norm.weight": TensorName(None, "norm", "weight"),
    "model.language_model.layers.3.mlp.experts.gate_up_proj": stacked("w13"),
}

UNKNOWN = (
    "",
    ".",
    "model.",
    "model.layers.3.",
    "lm_head",
    "lm_head.",
    "model.lm_head.weight",
    "model.embed_tokens",
    "embed_tokens.weight",
    "layers.3.input_layernorm.weight",
    "model.layers.input_layernorm.weight",
    "model.input_layernorm.weight",
    "model.layers.3.norm.weight",
    "model.layers.3.embed_tokens.weight",
    "model.layers.3.lm_head.weight",
    # Numbers have one spelling.
    "model.layers.x.input_layernorm.weight",
    "model.layers.03.input_layernorm.weight",
    "model.layers.00.input_layernorm.weight",
    "model.layers.+3.input_layernorm.weight",
    "model.layers.-3.input_layernorm.weight",
    "model.layers. 3.input_layernorm.weight",
    "model.layers.1_0.input_layernorm.weight",
    "model.layers.\u0663.input_layernorm.weight",  # an Arabic 3, which int() reads
    "model.layers.\uff13.input_layernorm.weight",  # a full-width 3
    "model.layers.1\u0663.input_layernorm.weight",
    "model.layers.1000000.input_layernorm.weight",
    MOE + "experts.07.w1.weight",
    MOE + "experts.\u0667.w1.weight",
    MOE + "experts.-1.w1.weight",
    # Experts.
    MOE + "experts.7.w4.weight",
    MOE + "experts.7.w1",
    MOE + "experts.7.w1_weight",
    MOE + "experts.7.w1.weight_scale_inverse",
    MOE + "experts.7.w1.k_scale",
    MOE + "experts.7.gate.weight",
    MOE + "experts.7.self_attn.q_proj.weight",
    MOE + "experts.w1.weight",  # a stack has gate and up together
    MOE + "experts.w3_weight",
    MLP + "experts.up_proj",
    MOE + "experts.w13",
    MLP + "experts.gate_up_proj_weight",
    MLP + "experts.gate_up_proj_blocks",  # MXFP4 has gate and up rows in turn: neither order
    MLP + "experts.gate_up_proj_scales",
    LAYER + "experts.7.w1.weight",
    LAYER + "feed_forward.experts.7.w1.weight",
    LAYER + "shared_experts.w1.weight",
    MLP + "gate_proj.weight",
    # Attention.
    ATTENTION + "q_proj.k_scale",
    ATTENTION + "k_proj.v_scale",
    ATTENTION + "k_proj.kv_scale",
    ATTENTION + "o_proj.k_scale",
    ATTENTION + "kv_proj.weight",
    ATTENTION + "qkqkv_proj.weight",
    ATTENTION + "attn.attn.k_scale",
    LAYER + "k_scale",
    LAYER + "q_norm.weight",
    ATTENTION + "q_proj",
    # The router.
    MOE + "e_score_correction_bias.weight",
    MOE + "experts.e_score_correction_bias",
    # Before and after.
    "xmodel.layers.3.input_layernorm.weight",
    "model.layers.3.input_layernorm.weight.extra",
    "model.layers.3.input_layernorm.weight ",
    "model.layers.3.input_layernorm.weight\n",
    "model.layers.3.input_layernorm\n.weight",
    "lm_head.weight\n",
    "modelXlayers.3.input_layernorm.weight",
    "Model.layers.3.input_layernorm.weight",
    "language_model.layers.3.input_layernorm.weight",
    "language_model.language_model.model.norm.weight",
    "language_model.language_model.lm_head.weight",
    "language_model.model.language_model.norm.weight",
    "model.language_model.lm_head.weight",
    "model.language_model.model.norm.weight",
    "vision_tower.layers.3.input_layernorm.weight",
    # Left out by name, and so no part of the grammar.
    "model.rotary_emb.inv_freq",
    "model.layers.62.enorm.weight",
    "model.mtp.layers.0.enorm.weight",
)


@pytest.mark.parametrize("name", KNOWN)
def test_known_names(name):
    assert parse(name) == KNOWN[name]


@pytest.mark.parametrize("name", UNKNOWN)
def test_names_outside_the_grammar(name):
    assert parse(name) is None


@pytest.mark.parametrize("kind", MATRIX_KINDS)
def test_every_owner_takes_every_kind(kind):
    for module in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "q_norm", "k_norm"):
        # The output of q, k and v is what attention scales.
        attention = kind == "output_scale" and module in ("q_proj", "k_proj", "v_proj")
        known = owned("attn", f"{module[0]}_scale") if attention else owned(module, kind)
        assert parse(f"{ATTENTION}{module}.{kind}") == known
    for norm in ("input_layernorm", "post_attention_layernorm"):
        assert parse(f"{LAYER}{norm}.{kind}") == owned(norm, kind)
    assert parse(f"model.norm.{kind}") == TensorName(None, "norm", kind)
    assert parse(f"model.embed_tokens.{kind}") == TensorName(None, "embed_tokens", kind)
    assert parse(f"lm_head.{kind}") == TensorName(None, "lm_head", kind)
    for block in (MOE, MLP):
        assert parse(f"{block}gate.{kind}") == owned("gate", kind)
        for word, projection in (
            ("w1 gate_proj", "w1"),
            ("w2 down_proj", "w2"),
            ("w3 up_proj", "w3"),
            ("w13 w1_w3 gate_up_proj", "w13"),
            ("w31 w3_w1 up_gate_proj", "w31"),
        ):
            for spelling in word.split():
                assert parse(f"{block}experts.7.{spelling}.{kind}") == expert(projection, kind)
        for word, projection in (("w13 w1_w3", "w13"), ("w31 w3_w1", "w31"), ("w2", "w2")):
            for spelling in word.split():
                assert parse(f"{block}experts.{spelling}_{kind}") == stacked(projection, kind)
        for word, projection in (
            ("gate_up_proj", "w13"),
            ("up_gate_proj", "w31"),
            ("down_proj", "w2"),
        ):
            assert parse(f"{block}experts.{word}.{kind}") == stacked(projection, kind)


def test_the_kinds_are_apart_from_each_other():
    kinds = (*MATRIX_KINDS, *ATTENTION_KINDS)
    assert len(set(kinds)) == len(kinds)
    assert set(MATRIX_SCALES) < set(MATRIX_KINDS)
    assert set(KV_SCALES) < set(ATTENTION_KINDS)


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
    published = published_names(62, 256)
    records = {parse(name) for name in published}
    assert len(published) == len(records) == 96_103
    assert None not in records
    assert all(spell(parse(name)) == name for name in published)
    assert not any(omitted(name, 62, mtp=3) for name in published)


@pytest.fixture(scope="module")
def tiny_config() -> MiniMaxM2Config:
    return MiniMaxM2Config(
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


def test_every_name_of_transformers_is_known_in_memory_and_on_disk(tiny_config, tmp_path):
    with torch.device("cpu"):
        model = MiniMaxM2ForCausalLM(tiny_config)
    in_memory = list(model.state_dict())
    assert "model.layers.1.mlp.experts.gate_up_proj" in in_memory
    assert [name for name in in_memory if parse(name) is None] == []
    assert len({parse(name) for name in in_memory}) == len(in_memory)
    # What is not saved is left out on purpose.
    unsaved = {name for name, _ in model.named_buffers()} - set(in_memory)
    assert unsaved
    assert all(omitted(name, 2) for name in unsaved)
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert [name for name in file.keys() if parse(name) is None] == []  # noqa: SIM118


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_every_fp8_name_of_transformers_is_known(tiny_config, scheme):
    finegrained_fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    # A static scale goes with a scale of the whole matrix.
    block = None if scheme == "static" else (16, 16)
    with torch.device("meta"):
        experts = finegrained_fp8.FP8Experts(
            tiny_config, block_size=block, activation_scheme=scheme
        )
        linear = finegrained_fp8.FP8Linear(32, 32, block_size=block, activation_scheme=scheme)
    spelled = {
        *(f"{MLP}experts.{name}" for name, _ in experts.named_parameters()),
        *(f"{ATTENTION}o_proj.{name}" for name, _ in linear.named_parameters()),
    }
    kinds = {"weight", "weight_scale_inv"} | ({"input_scale"} if scheme == "static" else set())
    assert {parse(name) for name in spelled} == {
        *(stacked(projection, kind) for projection in ("w13", "w2") for kind in kinds),
        *(owned("o_proj", kind) for kind in kinds),
    }


def sglang_sources(package: str) -> str:
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("SGLang is not installed")
    folder = Path(spec.submodule_search_locations[0], package)
    return "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))


def test_every_parameter_that_a_quantiser_of_sglang_registers_is_known():
    """Read from the sources: creating them all would need every accelerator."""
    sources = sglang_sources("srt/layers/quantization")
    registered = set(re.findall(r'register_parameter\(\s*f?"([^"]+)"', sources))
    of_experts = {
        re.sub(r"\{[\w.]*prefix\}", packed, name)
        for name in registered
        for packed in ("w13", "w2")
        if name.startswith(("w13_", "w2_", "{"))
    }
    of_matrices = {name for name in registered if name.isidentifier()} - of_experts
    assert len(of_experts) > 50, "the expression finds nothing any more"
    assert len(of_matrices) > 20
    assert [name for name in sorted(of_experts) if parse(f"{MOE}experts.{name}") is None] == []
    assert [
        name for name in sorted(of_matrices) if parse(f"{ATTENTION}o_proj.{name}") is None
    ] == []


@pytest.mark.parametrize(
    "inside",
    [
        "k_scale",
        "v_scale",
        "k_proj.k_scale",
        "v_proj.v_scale",
        "q_proj.output_scale",
        "k_proj.output_scale",
        "v_proj.output_scale",
        "kv_scale",
    ],
)
def test_scales_of_attention_as_sglang_reads_them(inside):
    utils = pytest.importorskip("sglang.srt.model_loader.weight_utils")
    parameters = {f"{ATTENTION}attn.{kind}_scale": None for kind in "qkv"}
    remapped = utils.maybe_remap_kv_scale_name(ATTENTION + inside, parameters)
    if inside == "kv_scale":  # SGLang fills k_scale, and v_scale from it when that stays unset
        assert remapped == ATTENTION + "attn.k_scale"
        assert parse(ATTENTION + inside) == owned("attn", "kv_scale")
        return
    assert remapped in parameters
    assert parse(ATTENTION + inside) == parse(remapped) == owned("attn", remapped.split(".")[-1])


@pytest.mark.parametrize(
    "name",
    [
        "self_attn.attn.k_scale",
        "self_attn.k_proj.output_scale",
        "self_attn.qkv_proj.weight",
        "block_sparse_moe.experts.w13_weight",
        "block_sparse_moe.experts.w2_weight",
        "block_sparse_moe.experts.gate_up_proj",
        "block_sparse_moe.experts.down_proj",
        "block_sparse_moe.experts.0.gate_proj.weight",
        "block_sparse_moe.experts.0.up_proj.weight",
        "block_sparse_moe.experts.0.down_proj.weight",
        "mlp.experts.0.w1.weight",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
        "mlp.gate.weight",
        "mlp.e_score_correction_bias",
        "block_sparse_moe.gate.qweight",
        "block_sparse_moe.experts.0.w1.weight_scale",
    ],
)
@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_what_the_in_tree_loader_drops_is_known(prefix, name):
    assert parse(f"{prefix}layers.0.{name}") == parse(f"model.layers.0.{name}") is not None


def omitted(name: str, layers: int, mtp: int = 0) -> str | None:
    return omission(name, num_layers=layers, num_mtp_modules=mtp)


PREFIXES = ("model.", "language_model.model.", "model.language_model.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_deliberate_omissions_are_named(prefix):
    for buffer in ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "cos_sin_cache"):
        assert "computed" in omitted(f"{prefix}rotary_emb.{buffer}", 62)
        assert "computed" in omitted(f"{prefix}layers.0.self_attn.rotary_emb.{buffer}", 62)
    assert "multi-token" in omitted(f"{prefix}layers.62.enorm.weight", 62, mtp=3)
    assert "multi-token" in omitted(f"{prefix}layers.64.self_attn.q_proj.weight", 62, mtp=3)
    assert "multi-token" in omitted(
        f"{prefix}layers.63.block_sparse_moe.experts.1.w1.weight", 62, mtp=3
    )
    assert "multi-token" in omitted(f"{prefix}mtp.layers.2.enorm.weight", 62, mtp=3)
    assert "multi-token" in omitted(f"{prefix}mtp.norm.weight", 62, mtp=1)
    assert all(entry.reason for entry in OMISSIONS)


@pytest.mark.parametrize(
    ("name", "mtp"),
    [
        ("model.layers.65.enorm.weight", 3),
        ("model.layers.62.enorm.weight", 0),
        ("model.layers.61.self_attn.q_proj.weight", 3),
        ("model.layers.6.block_sparse_moe.gate.weight", 3),
        ("model.layers.062.enorm.weight", 3),
        ("xmodel.layers.62.enorm.weight", 3),
        ("layers.62.enorm.weight", 3),
        ("model.mtp.layers.0.enorm.weight", 0),
        ("model.mtp.norm.weight", 0),
        ("model.mtp.layers.3.enorm.weight", 3),
        ("model.mtp.layers.00.enorm.weight", 3),
        ("model.mtp.layers.x.enorm.weight", 3),
        ("model.mtpx.weight", 3),
        ("model.layers.3.mtp.norm.weight", 3),
        ("mtp.layers.0.enorm.weight", 3),
        ("vision_tower.rotary_emb.inv_freq", 3),
        ("model.vision.rotary_emb.inv_freq", 3),
        ("model.layers.3.rotary_emb.inv_freq", 3),
        ("model.self_attn.rotary_emb.inv_freq", 3),
        ("model.layers.3.self_attn.rotary_emb.weight", 3),
        ("model.layers.3.block_sparse_moe.experts.1.rotary_emb.inv_freq", 3),
        ("model.layers.3.block_sparse_moe.experts.1.self_attn.rotary_emb.inv_freq", 3),
        ("lm_head.weight", 3),
        ("", 3),
    ],
)
def test_nothing_else_is_omitted(name, mtp):
    assert omitted(name, 62, mtp=mtp) is None


# Every spelling that the grammar has, with holes for the numbers.
SPELLINGS = (
    *(rest for rest in names._HEAD),
    *(f"model.{rest}" for rest in names._BODY),
    *(f"model.layers.LAYER.{rest}" for rest in names._LAYER),
    *(
        f"model.layers.LAYER.{block}.experts.EXPERT.{rest}"
        for block in ("block_sparse_moe", "mlp")
        for rest in names._EXPERT
    ),
)


def test_spelling_survives_parsing_for_every_record():
    for spelling in SPELLINGS:
        record = parse(spelling.replace("LAYER", "61").replace("EXPERT", "255"))
        assert record is not None, spelling
        assert parse(spell(record)) == record, spelling


numbers = st.integers(0, 999_999)


@given(st.sampled_from(SPELLINGS), numbers, numbers)
def test_numbers_survive_spelling_and_parsing(spelling, layer, expert):
    record = parse(spelling.replace("LAYER", str(layer)).replace("EXPERT", str(expert)))
    assert record.layer == (layer if "LAYER" in spelling else None)
    assert record.expert == (expert if "EXPERT" in spelling else None)
    assert parse(spell(record)) == record


@given(st.sampled_from(SPELLINGS), st.integers(0, 200), st.characters())
def test_a_character_too_many_makes_another_name_or_none(spelling, at, character):
    name = spelling.replace("LAYER", "3").replace("EXPERT", "7")
    longer = name[:at] + character + name[at:]
    record = parse(longer)
    # Some names lie one character apart, as k_scale and kv_scale; they are never the same tensor.
    assert record is None or record != parse(name)


@given(st.text())
def test_any_text_has_an_answer(text):
    for name in (text, f"model.{text}", f"model.layers.{text}", f"{LAYER}{text}", MOE + text):
        record = parse(name)
        assert record is None or parse(spell(record)) == record
        omitted(name, 62, mtp=3)


@pytest.mark.parametrize("piece", ["9", "layers.3.", "model.", "experts.7.", "mtp.layers.", "_"])
def test_a_huge_name_is_not_known(piece):
    huge = piece * 100_000  # int() itself refuses more than 4300 digits
    for name in (
        huge,
        f"model.{huge}",
        f"model.layers.{huge}.norm.weight",
        MOE + "experts." + huge,
    ):
        assert parse(name) is None
        assert omitted(name, 62, mtp=0) is None
