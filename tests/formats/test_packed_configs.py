"""Configs of the packed formats: what is read from them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sglang_minimax.errors import ConfigError
from sglang_minimax.loading.formats import awq as our_awq
from sglang_minimax.loading.formats import gptq as our_gptq
from sglang_minimax.loading.formats import modelslim as our_modelslim
from sglang_minimax.loading.formats import mxfp4 as our_mxfp4
from sglang_minimax.loading.formats import nvfp4 as our_nvfp4
from sglang_minimax.loading.formats import quantisation_config, recipe_of
from tests.formats import awq, gptq, mxfp4, nvfp4
from tests.formats.base import LAYERS
from tests.formats.packed_oracle import FIXTURES, checkpoint

# --- recipes ---

FORMATS = {
    "awq": ("awq", "awq", "awq"),
    "awq-experts": ("plain", "plain", "awq"),
    "gptq": ("gptq", "gptq", "gptq"),
    "gptq-act-order": ("gptq-act-order",) * 3,
    "gptq-whole-rows": ("gptq",) * 3,
    "gptq-v2": ("gptq",) * 3,
    "nvfp4": ("nvfp4",) * 3,
    "nvfp4-experts": ("plain", "plain", "nvfp4"),
    "nvfp4-own-file": ("plain", "plain", "nvfp4"),
    "mxfp4": ("mxfp4",) * 3,
    "mxfp4-experts": ("plain", "plain", "mxfp4"),
    "modelslim": ("modelslim-dynamic",) * 3,
    "modelslim-static": ("modelslim-static", "modelslim-static", "modelslim-dynamic"),
}


@pytest.mark.parametrize("name", FIXTURES)
def test_the_format_of_each_module(name: str):
    recipe = checkpoint(name).arch.recipe
    for layer in range(LAYERS):
        path = f"model.layers.{layer}"
        modules = [f"{path}.self_attn.{each}" for each in ("q_proj", "k_proj", "v_proj")]
        found = {recipe.format_of(module).name for module in modules}
        assert found == {FORMATS[name][0]}
        assert recipe.format_of(f"{path}.self_attn.o_proj").name == FORMATS[name][1]
        assert recipe.format_of(f"{path}.block_sparse_moe.experts").name == FORMATS[name][2]


@pytest.mark.parametrize(
    ("name", "clause"),
    [
        ("gptq", "wrong groups"),
        ("gptq-v2", "wrong groups"),
        ("gptq-act-order", "act-order names on every rank"),
        ("gptq-whole-rows", None),
        ("awq", None),
        ("nvfp4", None),
    ],
)
def test_whether_ranks_may_share_an_expert(name: str, clause: str | None):
    found = checkpoint(name).arch.recipe.cut_experts
    assert (found is None) if clause is None else (clause in str(found))


@pytest.mark.parametrize("module", [our_awq, our_gptq, our_nvfp4, our_mxfp4, our_modelslim])
def test_kernels_name_a_file_of_sglang(module: Any):
    root = Path(find_spec("sglang").submodule_search_locations[0]) / "srt"
    assert module.KERNELS
    assert all((root / kernel.source).is_file() for kernel in module.KERNELS)


Q0 = "model.layers.0.self_attn.q_proj"
W1 = "model.layers.0.block_sparse_moe.experts.0.w1"
DESCRIBED = {"quant_method": "modelslim", f"{W1}.weight": "W8A8_DYNAMIC"}
REFUSED: list[tuple[Mapping[str, Any], dict[str, Any], str]] = [
    (awq.CONFIG, {"bits": None, "w_bit": 4}, "has w_bit but not bits.*rename w_bit"),
    (awq.CONFIG, {"bits": 8}, "bits 8"),
    (awq.CONFIG, {"version": "gemv"}, "version 'gemv'"),
    (awq.CONFIG, {"group_size": 16}, "group_size 16"),
    (awq.CONFIG, {"group_size": -1}, "group_size -1"),
    (awq.CONFIG, {"zero_point": False}, "zero_point False"),
    (awq.CONFIG, {"modules_to_not_convert": [Q0]}, f"{Q0} in full precision.*list it under"),
    (awq.CONFIG, {"modules_to_not_convert": [W1]}, f"{W1} in full precision"),
    (awq.CONFIG, {"modules_to_not_convert": ["v_proj"]}, "but not .*q_proj, and SGLang makes one"),
    (awq.CONFIG, {"modules_to_not_convert": "gate"}, "must be a list"),
    (gptq.CONFIG, {"sym": None}, "has no sym"),
    (gptq.CONFIG, {"sym": False}, "sym False"),
    (gptq.CONFIG, {"bits": 8}, "bits 8"),
    (gptq.CONFIG, {"group_size": 256}, "group_size 256"),
    (gptq.CONFIG, {"desc_act": "yes"}, "desc_act 'yes'"),
    (gptq.CONFIG, {"lm_head": True}, "lm_head true"),
    (gptq.CONFIG, {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    (gptq.CONFIG, {"dynamic": {"+:.*layers.1.*": {"bits": 8}}}, "bits 8 where the rest has 4"),
    (gptq.CONFIG, {"dynamic": {"-:.*experts.*": {}}}, "always quantises the experts"),
    (gptq.CONFIG, {"dynamic": {"-:.*q_proj": {}}}, "q_proj in full precision"),
    (gptq.CONFIG, {"dynamic": {"-:(": {}}}, "no regular expression"),
    (nvfp4.CONFIG, {"quant_algo": "NVFP4_AWQ"}, "NVFP4_AWQ"),
    (nvfp4.CONFIG, {"quant_algo": "MIXED_PRECISION"}, "MIXED_PRECISION"),
    (nvfp4.CONFIG, {"group_size": 32}, "group_size 32"),
    (nvfp4.CONFIG, {"kv_cache_quant_algo": "NVFP4"}, "KV cache is NVFP4"),
    (nvfp4.CONFIG, {"kv_cache_scheme": {"type": "int", "num_bits": 8}}, "8-bit int"),
    (nvfp4.CONFIG, {"ignore": [Q0]}, f"{Q0} in full precision"),
    (nvfp4.CONFIG, {"ignore": ["model.layers.0.block_sparse_moe"]}, "looks up .*experts"),
    (nvfp4.CONFIG, {"ignore": ["model.(layers"]}, "no regular expression"),
    (mxfp4.CONFIG, {"export": None}, "no export"),
    (mxfp4.CONFIG, {"layer_quant_config": None}, "no layer_quant_config"),
    (mxfp4.CONFIG, {"global_quant_config": {}}, "dtype None for weight"),
    (mxfp4.CONFIG, {"layer_quant_config": {"*o_proj": {"weight": None}}}, r"'\*o_proj'"),
    (mxfp4.CONFIG, {"exclude": [Q0]}, f"{Q0} in full precision"),
    (mxfp4.CONFIG, {"exclude": ["*self_attn*"]}, "looks up"),
    (DESCRIBED, {f"{W1}.weight": "W4A8_DYNAMIC"}, "W4A8_DYNAMIC"),
    (DESCRIBED, {f"{W1}.weight": "FLOAT"}, "FLOAT, but MiniMax-M2 runs with W8A8_DYNAMIC"),
    (DESCRIBED, {W1.replace("0.w1", "5.w2.weight"): "FLOAT"}, "5.w2.weight is FLOAT"),
    (DESCRIBED, {f"{Q0}.weight": "W4A4"}, "W4A4"),
    (
        DESCRIBED,
        {f"{Q0}.weight": "W8A8", Q0.replace("q_proj", "k_proj.weight"): "W8A8_DYNAMIC"},
        "k_proj is ModelSlim W8A8_DYNAMIC",
    ),
    (DESCRIBED, {Q0.replace("q_proj", "v_proj.weight"): "W8A8"}, "v_proj is ModelSlim W8A8"),
    (DESCRIBED, {"lm_head.weight": "W8A8"}, "lm_head.weight is W8A8"),
    (DESCRIBED, {"model.layers.0.block_sparse_moe.gate.weight": "W8A8"}, "gate.weight is W8A8"),
    (DESCRIBED, {"model.layers.0.input_layernorm.bias": "FLOAT"}, "norms of MiniMax-M2 have no"),
    (DESCRIBED, {f"{W1}.weight": None}, "names no expert"),
]


@pytest.mark.parametrize(("config", "change", "sentence"), REFUSED, ids=lambda v: str(v)[:40])
def test_a_config_is_refused_in_one_sentence(config, change, sentence: str):
    recipe_of(config)
    made = {key: value for key, value in {**config, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=sentence) as refusal:
        recipe_of(made)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith((".", "false."))


@pytest.mark.parametrize(
    ("config", "change", "plain"),
    [
        (awq.CONFIG, {"modules_to_not_convert": ["self_attn", "gate"]}, "qo"),
        (awq.CONFIG, {"modules_to_not_convert": ["layers.0.self_attn.qkv_proj"]}, "q"),
        (awq.CONFIG, {"modules_to_not_convert": None}, ""),
        (gptq.CONFIG, {"dynamic": {"-:.*self_attn.*": {}}}, "qo"),
        (gptq.CONFIG, {"dynamic": {"-:.*[qkv]_proj$": {}}}, "q"),
        (gptq.CONFIG, {"dynamic": {r"-:model\.layers\.0\.self_attn\.o_proj": {}}}, "o"),
        (nvfp4.CONFIG, {"ignore": ["*.self_attn*"]}, "qo"),
        (nvfp4.CONFIG, {"ignore": [f"{Q0[:-6]}{x}_proj" for x in "qkvo"]}, "qo"),
        (nvfp4.CONFIG, {"ignore": ["self_attn"]}, "qo"),
        (nvfp4.CONFIG, {"ignore": ["lm_head", "*gate", "mtp*"]}, ""),
        (nvfp4.CONFIG, {"ignore": ["model.layers.0.*"]}, "qoe"),
        (mxfp4.CONFIG, {"exclude": ["re:.*self_attn.*", "re:.*gate$"]}, "qo"),
        (mxfp4.CONFIG, {"exclude": [f"{W1[:-2]}w{n}" for n in (1, 2, 3)]}, "e"),
    ],
    ids=str,
)
def test_exclusions_are_read_as_sglang_reads_them(config, change, plain: str):
    recipe = recipe_of({**config, **change})
    path = "model.layers.0"
    modules = {
        "q": [f"{path}.self_attn.{shard}_proj" for shard in "qkv"],
        "o": [f"{path}.self_attn.o_proj"],
        "e": [f"{path}.block_sparse_moe.experts"],
    }
    for letter, names in modules.items():
        for name in names:
            assert (recipe.format_of(name).name == "plain") is (letter in plain), name


# --- where the config is ---


def test_the_config_is_found_in_the_order_of_sglang(tmp_path: Path):
    own, other = {"quant_method": "awq"}, {"quant_method": "compressed-tensors"}
    assert quantisation_config(tmp_path, {}) is None
    both = {"quantization_config": own, "compression_config": other}
    assert quantisation_config(tmp_path, both) == own
    assert quantisation_config(tmp_path, {"compression_config": other}) == other
    nested = {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(nested))
    assert quantisation_config(tmp_path, {}) == nested
    assert recipe_of(nested).name == "nvfp4"
    agreed = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    assert quantisation_config(tmp_path, agreed) == agreed["quantization_config"]
    with pytest.raises(ConfigError, match="says quant_algo 'NVFP4' and"):
        quantisation_config(tmp_path, {"quantization_config": own})
    (tmp_path / our_modelslim.DESCRIPTION).write_text(json.dumps({"lm_head.weight": "FLOAT"}))
    assert quantisation_config(tmp_path, {})["quant_method"] == "modelslim"
    with pytest.raises(ConfigError, match="and SGLang would mix them up"):
        quantisation_config(tmp_path, {"quantization_config": own})
    (tmp_path / our_modelslim.DESCRIPTION).write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        quantisation_config(tmp_path, {})
