"""compressed-tensors: which bytes each rank reads, what they stand for, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_minimax.config import Architecture
from sglang_minimax.errors import ConfigError, LoadError
from sglang_minimax.loading.binding import Binding
from sglang_minimax.loading.formats import recipe_of
from sglang_minimax.loading.formats.base import COLUMNS, PLAIN, ROWS, Axis
from sglang_minimax.loading.plan import plan_of_rank
from sglang_minimax.loading.planned import PlannedWeights, ReadOptions
from sglang_minimax.loading.problems import Problems
from sglang_minimax.loading.slots import SlotTable, Stage
from sglang_minimax.topology import Topology, rank_share
from tests.formats.base import Fixture, State, write
from tests.formats.compressed_tensors import FIXTURES
from tests.formats.oracle import (
    TOPOLOGIES,
    Layout,
    all_of_it,
    check,
    check_all,
    columns_only,
    rows_and_columns,
    rows_only,
)


def _times_rows(tensors: State) -> torch.Tensor:
    return tensors["weight"].float() * tensors["weight_scale"].float()


def _times_blocks(tensors: State) -> torch.Tensor:
    scale = tensors["weight_scale"].float().repeat_interleave(64, 0).repeat_interleave(64, 1)
    return tensors["weight"].float() * scale


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """Value i of a word is at bits 4i to 4i + 3, plus 8."""
    shifts = torch.arange(0, 32, 4)
    return (((words.long()[..., None] >> shifts) & 15) - 8).flatten(-2).float()


def _groups(tensors: State) -> torch.Tensor:
    scale = tensors["weight_scale"].float()
    values = _nibbles(tensors["weight_packed"])
    return values * scale.repeat_interleave(values.shape[1] // scale.shape[1], 1)


def _ordered(tensors: State) -> torch.Tensor:
    columns = tensors["weight_g_idx"].long()
    return _nibbles(tensors["weight_packed"]) * tensors["weight_scale"].float()[:, columns]


_WEIGHT = {"weight": rows_and_columns(1, 1)}
_ROWS = Layout({**_WEIGHT, "weight_scale": rows_only}, _times_rows, blocks=False)
_TENSOR = Layout({**_WEIGHT, "weight_scale": all_of_it}, _times_rows, blocks=False)
_PACKED = {"weight_packed": rows_and_columns(1, 8), "weight_shape": all_of_it}
INT4 = Layout({**_PACKED, "weight_scale": rows_and_columns(1, 64)}, _groups, blocks=True)
ORDERED = Layout(
    {**_PACKED, "weight_scale": rows_only, "weight_g_idx": columns_only}, _ordered, blocks=False
)
LAYOUTS = {
    "ct-fp8-channel": _ROWS,
    "ct-fp8-tensor": _TENSOR,
    "ct-fp8-static": Layout({**_TENSOR.cuts, "input_scale": all_of_it}, _times_rows, False),
    "ct-fp8-blocks": Layout(
        {**_WEIGHT, "weight_scale": rows_and_columns(64, 64)}, _times_blocks, blocks=True
    ),
    "ct-int4": INT4,
    "ct-int4-channel": Layout({**_PACKED, "weight_scale": rows_only}, _groups, blocks=False),
    "ct-int4-ordered": ORDERED,
    "ct-int8": _ROWS,
}
CASES = [
    pytest.param(name, topology, id=f"{name}-{word}")
    for name in FIXTURES
    for word, topology in TOPOLOGIES.items()
    # Its experts are whole on every rank.
    if name != "ct-int4-ordered" or topology.tp == topology.ep
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Fixture, Path]]:
    """A fixture and its checkpoint, written once."""

    @lru_cache
    def made(name: str) -> tuple[Fixture, Path]:
        fixture = FIXTURES[name]()
        return fixture, write(fixture, tmp_path_factory.mktemp(name))

    return made


@pytest.mark.parametrize(("name", "topology"), CASES)
def test_every_rank_reads_its_part(written: Any, name: str, topology: Topology) -> None:
    fixture, folder = written(name)
    check(fixture, folder, LAYOUTS[name], topology, Architecture.from_config(fixture.config))


# --- plausible mistakes, each of which the comparison above must notice ---

MUTANTS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "four values a word": ("ct-int4", "weight_packed", {"axes": (Axis(ROWS), Axis(COLUMNS, 4))}),
    "packed along rows": ("ct-int4", "weight_packed", {"axes": (Axis(ROWS, 8), Axis(COLUMNS))}),
    "words are not cut": (
        "ct-int4",
        "weight_packed",
        {"axes": (Axis(ROWS), Axis(COLUMNS, 8, whole=True))},
    ),
    "words of padding are zero, which is -8": ("ct-int4", "weight_packed", {"padding": 0}),
    "groups are not cut": (
        "ct-int4",
        "weight_scale",
        {"axes": (Axis(ROWS), Axis(COLUMNS, 64, whole=True))},
    ),
    "groups of half the size": (
        "ct-int4",
        "weight_scale",
        {"axes": (Axis(ROWS), Axis(COLUMNS, 32))},
    ),
    "groups are cut under an order": (
        "ct-int4-ordered",
        "weight_scale",
        {"axes": (Axis(ROWS), Axis(COLUMNS, 64))},
    ),
    "the order is not cut": (
        "ct-int4-ordered",
        "weight_g_idx",
        {"axes": (Axis(COLUMNS, whole=True),)},
    ),
    "one scale for all rows": (
        "ct-fp8-channel",
        "weight_scale",
        {"axes": (Axis(ROWS, whole=True), Axis(size=1))},
    ),
    "scales follow columns": ("ct-int8", "weight_scale", {"axes": (Axis(COLUMNS), Axis(size=1))}),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_format_is_noticed(written: Any, mutant: str) -> None:
    name, kind, changes = MUTANTS[mutant]
    fixture, folder = written(name)
    arch = Architecture.from_config(fixture.config)
    form = arch.recipe.quantised
    tensors = tuple(replace(t, **changes) if t.kind == kind else t for t in form.tensors)
    wrong = replace(arch.recipe, quantised=replace(form, tensors=tensors))
    cases = [case.values[1] for case in CASES if case.values[0] == name]
    with pytest.raises((AssertionError, RuntimeError, KeyError)):
        check_all(fixture, folder, LAYOUTS[name], cases, replace(arch, recipe=wrong))


# --- values ---


def _read_all(fixture: Fixture, folder: Path) -> None:
    arch = Architecture.from_config(fixture.config)
    plan = plan_of_rank([write(fixture, folder) / "model.safetensors"], arch, Topology(), 0)
    assert not plan.problems
    for _ in PlannedWeights(plan, ReadOptions(threads=1)):
        pass


_EXPERT = "model.layers.1.block_sparse_moe.experts.3"
_ATTENTION = "model.layers.1.self_attn"

WRONG_VALUES: Mapping[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "transposed shape": (
        "ct-int4",
        f"{_EXPERT}.w1.weight_shape",
        lambda t: t.flip(0),
        "says [128, 384], expected [384, 128]",
    ),
    "no scale": (
        "ct-int4",
        f"{_EXPERT}.w1.weight_scale",
        lambda t: t * 0,
        "has scales from 0.0 to 0.0, expected finite numbers above 0",
    ),
    "w3 has another input": (
        "ct-fp8-static",
        f"{_EXPERT}.w3.input_scale",
        lambda t: t * 2,
        f"differs from {_EXPERT}.w1.input_scale, but SGLang has one input_scale for both",
    ),
    "w3 has another order": (
        "ct-int4-ordered",
        f"{_EXPERT}.w3.weight_g_idx",
        lambda t: t.flip(0) * 0,
        f"differs from {_EXPERT}.w1.weight_g_idx, but SGLang has one weight_g_idx for both",
    ),
    "q has another order": (
        "ct-int4-ordered",
        f"{_ATTENTION}.q_proj.weight_g_idx",
        lambda t: t * 0,
        "differs from",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_VALUES)
def test_wrong_values_are_named(tmp_path: Path, wrong: str) -> None:
    name, tensor, change, sentence = WRONG_VALUES[wrong]
    fixture = FIXTURES[name]()
    fixture.tensors[tensor] = change(fixture.tensors[tensor])
    with pytest.raises(LoadError) as caught:
        _read_all(fixture, tmp_path)
    assert sentence in str(caught.value)
    assert tensor.rpartition(".")[2] in str(caught.value)


def test_q_k_and_v_may_have_inputs_of_their_own(tmp_path: Path) -> None:
    # SGLang has room for three, and takes the largest.
    fixture = FIXTURES["ct-fp8-static"]()
    fixture.tensors[f"{_ATTENTION}.q_proj.input_scale"] *= 2
    _read_all(fixture, tmp_path)


# --- files and config that do not belong together ---


def _problems(fixture: Fixture, folder: Path) -> str:
    arch = Architecture.from_config(fixture.config)
    plan = plan_of_rank([write(fixture, folder) / "model.safetensors"], arch, Topology(), 0)
    return str(plan.problems.error()) if plan.problems else ""


_W1 = f"{_EXPERT}.w1"

WRONG_FILES: Mapping[str, tuple[str, Callable[[State], Any], str]] = {
    "scale left out": (
        "ct-int4",
        lambda t: t.pop(f"{_W1}.weight_scale"),
        f"missing: {_W1}.weight_scale",
    ),
    "shape left out": (
        "ct-int4",
        lambda t: t.pop(f"{_W1}.weight_shape"),
        f"missing: {_W1}.weight_shape",
    ),
    "groups of 128": (
        "ct-int4",
        lambda t: t.update({f"{_W1}.weight_scale": torch.ones(384, 1)}),
        f"misshapen: {_W1}.weight_scale is [384, 1], expected [384, 2]",
    ),
    "words of another type": (
        "ct-int4",
        lambda t: t.update({f"{_W1}.weight_packed": t[f"{_W1}.weight_packed"].long()}),
        f"contradictory: {_W1}.weight_packed is I64, expected I32",
    ),
    "eight bits": (
        "ct-int4",
        lambda t: t.update({f"{_W1}.weight_packed": torch.ones(384, 32, dtype=torch.int32)}),
        f"misshapen: {_W1}.weight_packed is [384, 32], expected [384, 16]",
    ),
    "zero points": (
        "ct-int4",
        lambda t: t.update({f"{_W1}.weight_zero_point": torch.ones(48, 2, dtype=torch.int32)}),
        f"contradictory: {_W1}.weight_zero_point (config.json says that this module is 4-bit",
    ),
    "an order": (
        "ct-int4",
        lambda t: t.update({f"{_W1}.weight_g_idx": torch.ones(128, dtype=torch.int32)}),
        f"contradictory: {_W1}.weight_g_idx",
    ),
    "plain weight": (
        "ct-int4",
        lambda t: t.update({f"{_W1}.weight": torch.ones(384, 128).bfloat16()}),
        f"contradictory: {_W1}.weight (config.json says that this module is 4-bit",
    ),
    "fp8 for int8": (
        "ct-int8",
        lambda t: t.update({f"{_W1}.weight": torch.ones(384, 128).to(torch.float8_e4m3fn)}),
        f"contradictory: {_W1}.weight is F8_E4M3, expected I8",
    ),
    "router quantised": (
        "ct-int4",
        lambda t: t.update({"model.layers.1.block_sparse_moe.gate.weight_scale": torch.ones(8, 2)}),
        "quantised: model.layers.1.block_sparse_moe.gate.weight_scale (the router is kept",
    ),
    "head quantised": (
        "ct-int8",
        lambda t: t.update({"lm_head.weight_scale": torch.ones(512, 1)}),
        "quantised: lm_head.weight_scale (the head is kept in full precision",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_wrong_files_are_named(tmp_path: Path, wrong: str) -> None:
    name, change, sentence = WRONG_FILES[wrong]
    fixture = FIXTURES[name]()
    change(fixture.tensors)
    assert sentence in _problems(fixture, tmp_path)


def test_a_config_that_is_silent_about_words(tmp_path: Path) -> None:
    fixture = FIXTURES["ct-int4"]()
    del fixture.config["quantization_config"]
    found = _problems(fixture, tmp_path)
    assert "weight_shape (config.json says that this module is BF16, FP16 or FP32)" in found


# --- parameters ---


def test_parameters_that_sglang_fills_itself() -> None:
    """Experts have g_idx and g_idx_sort_indices whatever the checkpoint has; nothing else may."""
    arch = Architecture.from_config(FIXTURES["ct-int4"]().config)
    stage = Stage.of(arch, Topology(), rank_share(arch, Topology(), 0))
    table = SlotTable(arch, stage)
    slots = table.build()
    experts = "model.layers.0.block_sparse_moe.experts"
    attention = "model.layers.0.self_attn.qkv_proj"
    sizes = {
        f"{experts}.w13_weight_g_idx": (8, 128),
        f"{experts}.w13_g_idx_sort_indices": (8, 128),
        f"{experts}.w2_weight_g_idx": (8, 384),
        f"{experts}.w2_g_idx_sort_indices": (8, 384),
        f"{experts}.w13_weight_shape": (8, 2),
        f"{attention}.weight_shape": (2,),
        f"{experts}.w13_alien": (8, 2),
    }
    parameters = {}
    for name, size in sizes.items():
        parameters[name] = torch.nn.Parameter(torch.empty(size))
        parameters[name].weight_loader = None
    problems = Problems()
    Binding(slots, parameters, table.made).check_parameters(problems, stage)
    assert problems.groups["missing"] == [f"{experts}.w13_alien (a parameter that no tensor fills)"]
    assert "misshapen" not in problems.groups
    # A record of integers may go to a parameter of floats; no kernel reads it.
    binding = Binding(slots, parameters, table.made)
    slot = next(group[0] for name, group in slots.items() if name.kind == "weight_shape")
    assert binding.obstacle(slot, parameters[f"{attention}.weight_shape"], "I64") is None


# --- which modules, and refusals ---


@pytest.mark.parametrize("name", FIXTURES)
def test_the_config_says_what_is_quantised(name: str) -> None:
    recipe = recipe_of(FIXTURES[name]().config["quantization_config"])
    for layer in (0, 2):
        path = f"model.layers.{layer}"
        for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert recipe.format_of(f"{path}.self_attn.{module}") is recipe.quantised
        assert recipe.format_of(f"{path}.block_sparse_moe.experts") is recipe.quantised
        assert recipe.format_of(f"{path}.block_sparse_moe.gate") is PLAIN
    assert recipe.format_of("lm_head") is PLAIN


def _config(**changes: Any) -> dict[str, Any]:
    """W4A16 in groups of 128, with some keys of the config, the group or the weights changed."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 128,
        "dynamic": False,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*block_sparse_moe\\.gate$"],
    }
    for key, value in changes.items():
        place = next((each for each in (weights, group) if key in each), config)
        place[key] = value
    if "actorder" in config:
        weights["actorder"] = config.pop("actorder")
    config.setdefault("config_groups", {"group_0": group})
    return config


def _fp8(weights: dict[str, Any], inputs: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **weights}
    if inputs is not None:
        inputs = {"num_bits": 8, "type": "float", "symmetric": True, **inputs}
    return _config(weights=weights, input_activations=inputs, format="float-quantized", **more)


def _int8(weights: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    return _config(
        weights={"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", **weights},
        input_activations={
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "dynamic": True,
            "strategy": "token",
            **inputs,
        },
        format="int-quantized",
    )


def _two_groups() -> dict[str, Any]:
    config = _config()
    first = config["config_groups"]["group_0"]
    second = copy.deepcopy(first)
    second["weights"]["group_size"] = 32
    config["config_groups"]["group_1"] = second
    return config


_EXPERTS_ONLY = "re:.*experts.*"
_TOKEN = {"strategy": "token", "dynamic": True}

ACCEPTED: Mapping[str, tuple[dict[str, Any], str]] = {
    "w4a16": (_config(), "ct-int4"),
    "static order": (_config(actorder="static"), "ct-int4"),
    "weight order": (_config(actorder="weight"), "ct-int4"),
    "group order": (_config(actorder="group"), "ct-int4-ordered"),
    "true order": (_config(actorder=True), "ct-int4-ordered"),
    "experts alone": (
        _config(targets=[_EXPERTS_ONLY], ignore=["lm_head", "re:.*self_attn.*"]),
        "ct-int4",
    ),
    "attention alone": (_config(ignore=["lm_head", "re:.*block_sparse_moe.*"]), "ct-int4"),
    "fp8 dynamic": (_fp8({"strategy": "channel"}, _TOKEN), "ct-fp8-channel"),
    "a group twice": (
        _config(
            config_groups={
                name: _config(targets=[target])["config_groups"]["group_0"]
                for name, target in (("a", "re:.*self_attn.*"), ("b", _EXPERTS_ONLY))
            }
        ),
        "ct-int4",
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_accepted(case: str) -> None:
    config, name = ACCEPTED[case]
    recipe = recipe_of(config)
    assert recipe.name == name
    assert (recipe.cut_experts is not None) == ("order" in case and case != "static order")


def test_parents_of_quantised_modules_are_listed_too() -> None:
    """llm-compressor lists modules that it did not touch, and some of them hold what it did."""
    recipe = recipe_of(_config(ignore=["lm_head", "model.layers.0", "self_attn.o_proj"]))
    assert recipe.format_of("model.layers.0.self_attn.q_proj") is recipe.quantised
    assert recipe.format_of("model.layers.0.block_sparse_moe.experts") is recipe.quantised
    assert recipe.format_of("model.layers.7.self_attn.o_proj") is PLAIN


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "asymmetric": (
        _config(symmetric=False),
        "weights are asymmetric, but SGLang cannot load asymmetric experts; quantise the "
        "checkpoint with static symmetric weights.",
    ),
    "dynamic order": (
        _config(actorder="dynamic"),
        "actorder is 'dynamic', for which SGLang leaves out the order of the experts' columns; "
        'quantise the checkpoint with actorder "static", or rename it to "group" in config.json, '
        "which means the same.",
    ),
    "groups of 16": (
        _config(group_size=16),
        "group_size is 16, but SGLang's kernels have groups of 32, 64 and 128; quantise the "
        "checkpoint in one of these.",
    ),
    "four bits a tensor": (
        _config(strategy="tensor"),
        "has 4-bit weights per tensor; use groups of 32, 64 or 128, or channels.",
    ),
    "four bits and activations": (
        _config(input_activations={"num_bits": 8, "type": "int", **_TOKEN}),
        "has 4-bit weights with quantised activations, which SGLang runs on no GPU for them; use a "
        "checkpoint of weights alone (W4A16).",
    ),
    "eight bits packed": (
        _config(num_bits=8),
        "weights are 8-bit int in the format 'pack-quantized', which SGLang does not run for "
        "MiniMax-M2; use 8-bit float, 8-bit int, or 4-bit int as pack-quantized.",
    ),
    "mixed": (
        _two_groups(),
        "groups group_0 and group_1 differ, and mixed precision is not supported for MiniMax-M2; "
        "quantise attention and experts in one way, or leave one of them out.",
    ),
    "no groups": (
        {**_config(), "config_groups": {}},
        "config_groups is {}; it must name a group with targets and weights.",
    ),
    "a format of its own": (
        _config(
            config_groups={
                "group_0": {**_config()["config_groups"]["group_0"], "format": "int-quantized"}
            }
        ),
        "format is 'pack-quantized', but that of its group is 'int-quantized', and SGLang reads "
        "the first for experts and the second for the others; write the same to both in "
        "config.json.",
    ),
    "sparse": (
        _config(sparsity_config={"format": "sparse-24-bitmask"}),
        "has a sparsity_config, which is not supported for MiniMax-M2; quantise without it.",
    ),
    "rotated": (
        _config(transform_config={"config_groups": {"u": {}}}),
        "has a transform_config, which is not supported for MiniMax-M2; quantise without it.",
    ),
    "outputs": (
        _config(output_activations={"num_bits": 8}),
        "output_activations are quantised, which SGLang leaves out without a word; quantise the "
        "checkpoint without them.",
    ),
    "attention forgotten": (
        _config(targets=[_EXPERTS_ONLY]),
        "targets ['re:.*experts.*'] leave out model.layers.0.self_attn.q_proj, for which SGLang "
        'then finds no scheme; target "Linear", and name what is not quantised in ignore.',
    ),
    "published names": (
        _config(targets=["re:.*self_attn.*", "re:.*w[123]$"]),
        "targets ['re:.*self_attn.*', 're:.*w[123]$'] leave out "
        "model.layers.0.block_sparse_moe.experts.0.gate_proj",
    ),
    "the router too wide": (
        _config(ignore=["lm_head", "re:.*gate.*"]),
        "ignore names some matrices of an expert of layer 0 and not others, as w1, w2, w3 or as "
        "gate_proj, down_proj, up_proj, which SGLang looks for; name all of them, as in "
        "re:model.layers.0.block_sparse_moe.experts.*, or the router alone, as in "
        "re:.*block_sparse_moe.gate$.",
    ),
    "experts of one layer by published names": (
        _config(
            ignore=[f"model.layers.5.block_sparse_moe.experts.0.{w}" for w in ("w1", "w2", "w3")]
        ),
        "ignore names some matrices of an expert of layer 5 and not others",
    ),
    "one of q, k, v": (
        _config(ignore=["re:.*q_proj"]),
        "ignore names some of q_proj, k_proj and v_proj of layer 0 and not others, but SGLang has "
        "one module for them; quantise all or none of them.",
    ),
    "fp8 weights alone": (
        _fp8({"strategy": "channel"}, None),
        "has FP8 weights without input_activations, but SGLang's experts quantise both; use a "
        "checkpoint with FP8 activations, such as FP8_DYNAMIC.",
    ),
    "fp8 weights, int8 activations": (
        _fp8({"strategy": "channel"}, {"type": "int", **_TOKEN}),
        "has FP8 weights with 8-bit int activations, but SGLang's experts quantise both to FP8; "
        "use a checkpoint with FP8 activations, such as FP8_DYNAMIC.",
    ),
    "tensor weights, token activations": (
        _fp8({"strategy": "tensor"}, _TOKEN),
        "has FP8 weights per tensor with dynamic activations per token, which SGLang's experts do "
        "not take; use weights per channel with dynamic activations per token (FP8_DYNAMIC), both "
        "per tensor, or blocks with dynamic activations.",
    ),
    "channel weights, static activations": (
        _fp8({"strategy": "channel"}, {"strategy": "tensor", "dynamic": False}),
        "has FP8 weights per channel with static activations per tensor, which SGLang's experts do "
        "not take",
    ),
    "blocks without their size": (
        _fp8({"strategy": "block"}, {"strategy": "group", "dynamic": True}),
        "block_structure is None, but it must name two numbers such as [128, 128]",
    ),
    "blocks without Linear": (
        _fp8(
            {"strategy": "block", "block_structure": [128, 128]},
            {"strategy": "group", "dynamic": True},
            targets=["re:.*proj$"],
        ),
        "has blocks of 128x128 with the targets ['re:.*proj$'], but SGLang looks for the block of "
        'the target Linear; target "Linear".',
    ),
    "int8 static": (
        _int8({}, {"dynamic": False, "strategy": "tensor"}),
        "has INT8 with activations 'tensor', dynamic False, but SGLang runs weights per channel "
        "with dynamic symmetric 8-bit activations per token, whatever the config says; quantise "
        "the checkpoint so (W8A8).",
    ),
    "int8 asymmetric inputs": (
        _int8({}, {"symmetric": False}),
        "has INT8 with symmetric False, but SGLang runs",
    ),
    "int8 per tensor": (
        _int8({"strategy": "tensor"}, {}),
        "has INT8 with weights 'tensor', but SGLang runs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    config, sentence = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        recipe_of(config)
    said = str(caught.value).removeprefix("config: ").removeprefix("compressed-tensors ")
    assert said.startswith(sentence)
