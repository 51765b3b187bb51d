"""FP8: which bytes each rank reads, what they stand for, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_minimax.config import Architecture
from sglang_minimax.errors import ConfigError
from sglang_minimax.loading import slots
from sglang_minimax.loading.formats import recipe_of
from sglang_minimax.loading.formats.base import COLUMNS, PLAIN, ROWS, Axis, Format
from sglang_minimax.loading.plan import plan_of_rank
from sglang_minimax.topology import Topology
from tests.formats.base import Fixture, State, tiny, write
from tests.formats.fp8 import FIXTURES, blocks
from tests.formats.oracle import (
    TOPOLOGIES,
    Layout,
    all_of_it,
    check,
    check_all,
    rows_and_columns,
)


def _in_blocks(tensors: State) -> torch.Tensor:
    scale = tensors["weight_scale_inv"].repeat_interleave(64, 0).repeat_interleave(64, 1)
    return tensors["weight"].float() * scale


def _whole(tensors: State) -> torch.Tensor:
    return tensors["weight"].float() * tensors["weight_scale"]


BLOCKS = Layout(
    {"weight": rows_and_columns(1, 1), "weight_scale_inv": rows_and_columns(64, 64)},
    _in_blocks,
    blocks=True,
)
DYNAMIC = Layout({"weight": rows_and_columns(1, 1), "weight_scale": all_of_it}, _whole, False)
STATIC = Layout({**DYNAMIC.cuts, "input_scale": all_of_it}, _whole, False)
LAYOUTS = {
    "fp8-blocks": BLOCKS,
    "fp8-dynamic": DYNAMIC,
    "fp8-static": STATIC,
    "modelopt-fp8": STATIC,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Fixture, Path]]:
    """A fixture and its checkpoint, written once."""

    @lru_cache
    def made(name: str) -> tuple[Fixture, Path]:
        fixture = FIXTURES[name]()
        return fixture, write(fixture, tmp_path_factory.mktemp(name))

    return made


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
@pytest.mark.parametrize("name", FIXTURES)
def test_every_rank_reads_its_part(written: Any, name: str, topology: Topology) -> None:
    fixture, folder = written(name)
    check(fixture, folder, LAYOUTS[name], topology, Architecture.from_config(fixture.config))


# --- plausible mistakes, each of which the comparison above must notice ---


def _with(fixture: Fixture, kind: str, **changes: Any) -> Architecture:
    """The architecture with one stored tensor of the format described otherwise."""
    arch = Architecture.from_config(fixture.config)
    form = arch.recipe.quantised
    tensors = tuple(replace(t, **changes) if t.kind == kind else t for t in form.tensors)
    wrong: Format = replace(form, tensors=tensors)
    return replace(arch, recipe=replace(arch.recipe, quantised=wrong))


_SCALE = "weight_scale_inv"
FORMAT_MUTANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "a scale a row": (_SCALE, {"axes": (Axis(ROWS), Axis(COLUMNS, per=64))}),
    "scales are not cut by rows": (
        _SCALE,
        {"axes": (Axis(ROWS, 64, whole=True), Axis(COLUMNS, 64))},
    ),
    "scales are not cut by columns": (
        _SCALE,
        {"axes": (Axis(ROWS, 64), Axis(COLUMNS, 64, whole=True))},
    ),
    "rows and columns exchanged": (_SCALE, {"axes": (Axis(COLUMNS, 64), Axis(ROWS, 64))}),
    "weights of padding are one": ("weight", {"padding": 1}),
}


@pytest.mark.parametrize("mutant", FORMAT_MUTANTS)
def test_a_wrong_format_is_noticed(written: Any, mutant: str) -> None:
    fixture, folder = written("fp8-blocks")
    kind, changes = FORMAT_MUTANTS[mutant]
    arch = _with(fixture, kind, **changes)
    with pytest.raises((AssertionError, RuntimeError, KeyError)):
        check_all(fixture, folder, BLOCKS, TOPOLOGIES.values(), arch)


def _last_take_more(width: int, size: int, rank: int, unit: int = 1) -> Any:
    """Blocks dealt from the other end: off by one block on ranks in the middle."""
    cut = slots_expert_cut(width, size, size - 1 - rank, unit)
    lines = range(width - cut.lines.stop, width - cut.lines.start)
    return replace(cut, lines=lines, first=rank * cut.width if cut.is_padded else lines.start)


def _one_block_on(width: int, size: int, rank: int, unit: int = 1) -> Any:
    cut = slots_expert_cut(width, size, rank, unit)
    if rank == 0 or not cut.is_padded:
        return cut
    return replace(cut, lines=range(cut.lines.start - unit, cut.lines.stop - unit))


def _evenly(width: int, size: int, rank: int, unit: int = 1) -> Any:
    return slots_expert_cut(width, size, rank, 1)


slots_expert_cut = slots.expert_cut


@pytest.mark.parametrize("mutant", [_last_take_more, _one_block_on, _evenly])
def test_wrong_lines_are_noticed(
    written: Any, monkeypatch: pytest.MonkeyPatch, mutant: Callable[..., Any]
) -> None:
    fixture, folder = written("fp8-blocks")
    arch = Architecture.from_config(fixture.config)
    monkeypatch.setattr(slots, "expert_cut", mutant)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check(fixture, folder, BLOCKS, TOPOLOGIES["tp4"], arch)


# --- which modules ---


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


_BLOCKS: dict[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
_MODELOPT: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "FP8"}


@pytest.mark.parametrize(
    ("config", "plain", "quantised"),
    [
        # SGLang: _module_path_match, on the boundaries of parts, with or without `model.`
        ({**_BLOCKS, "ignored_layers": ["layers.1.self_attn."]}, "1.self_attn.o_proj", "1.block"),
        ({**_BLOCKS, "modules_to_not_convert": ["model.layers.1"]}, "1.self_attn.o_proj", "10."),
        ({**_BLOCKS, "modules_to_not_convert": ["o_proj"]}, "0.self_attn.o_proj", "0.self_attn.q"),
        ({**_MODELOPT, "ignore": ["*self_attn*"]}, "0.self_attn.o_proj", "0.block"),
        ({**_MODELOPT, "ignore": ["model.layers.2.*"]}, "2.block", "1.block"),
        (
            {"quantization": {"quant_algo": "FP8", "exclude_modules": ["*.o_proj"]}},
            "0.self_attn.o_proj",
            "0.self_attn.q",
        ),
    ],
)
def test_lists_are_read_as_sglang_reads_them(
    config: dict[str, Any], plain: str, quantised: str
) -> None:
    long = {"block": "block_sparse_moe.experts", "q": "q_proj", "": "self_attn.q_proj"}
    recipe = recipe_of(config)
    for short, form in ((plain, PLAIN), (quantised, recipe.quantised)):
        head, _, last = short.rpartition(".")
        assert recipe.format_of(f"model.layers.{head}.{long.get(last, last)}") is form


# --- files and config that do not belong together ---


def _problems(fixture: Fixture, folder: Path) -> str:
    write(fixture, folder)
    arch = Architecture.from_config(fixture.config)
    plan = plan_of_rank([folder / "model.safetensors"], arch, Topology(), 0)
    return str(plan.problems.error()) if plan.problems else ""


_W1 = "model.layers.1.block_sparse_moe.experts.3.w1"
_GATE = "model.layers.1.block_sparse_moe.gate"

WRONG_FILES: Mapping[str, tuple[Callable[[State], Any], str]] = {
    "scale left out": (lambda t: t.pop(f"{_W1}.{_SCALE}"), f"missing: {_W1}.{_SCALE}"),
    "weight in bf16": (
        lambda t: t.update({f"{_W1}.weight": t[f"{_W1}.weight"].bfloat16()}),
        f"contradictory: {_W1}.weight is BF16, expected F8_E4M3",
    ),
    "scale in fp8": (
        lambda t: t.update({f"{_W1}.{_SCALE}": t[f"{_W1}.{_SCALE}"].to(torch.float8_e4m3fn)}),
        f"contradictory: {_W1}.{_SCALE} is F8_E4M3, expected BF16 or F16 or F32",
    ),
    "other blocks": (
        lambda t: t.update({f"{_W1}.{_SCALE}": torch.ones(3, 1)}),
        f"misshapen: {_W1}.{_SCALE} is [3, 1], expected [6, 2]",
    ),
    "scale of a row": (
        lambda t: t.update({f"{_W1}.{_SCALE}": torch.ones(384, 1)}),
        f"misshapen: {_W1}.{_SCALE} is [384, 1], expected [6, 2]",
    ),
    "static inputs": (
        lambda t: t.update({f"{_W1}.input_scale": torch.ones(())}),
        f"contradictory: {_W1}.input_scale (config.json says that this module is FP8",
    ),
    "router quantised": (
        lambda t: t.update({f"{_GATE}.{_SCALE}": torch.ones(1, 2)}),
        f"quantised: {_GATE}.{_SCALE} (the router is kept in full precision",
    ),
    "router in fp8": (
        lambda t: t.update({f"{_GATE}.weight": t[f"{_GATE}.weight"].to(torch.float8_e4m3fn)}),
        f"invalid: {_GATE}.weight is F8_E4M3",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_wrong_files_are_named(tmp_path: Path, wrong: str) -> None:
    change, sentence = WRONG_FILES[wrong]
    fixture = blocks()
    change(fixture.tensors)
    assert sentence in _problems(fixture, tmp_path)


def test_a_config_that_says_fp8_of_plain_files(tmp_path: Path) -> None:
    plain = {name: value.bfloat16() for name, value in tiny().items()}
    found = _problems(replace(blocks(), tensors=plain), tmp_path)
    assert "contradictory: model.layers.0.block_sparse_moe.experts.0.w1.weight is BF16" in found
    assert f"missing: model.layers.0.self_attn.q_proj.{_SCALE}" in found


def test_a_config_that_is_silent_about_scales(tmp_path: Path) -> None:
    fixture = blocks()
    del fixture.config["quantization_config"]
    found = _problems(fixture, tmp_path)
    assert "w1.weight_scale_inv (config.json says that this module is BF16, FP16 or FP32)" in found


# --- refusals ---

REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "static blocks": (
        {**_BLOCKS, "activation_scheme": "static"},
        "config: activation_scheme is 'static' with blocks of 128x128, but SGLang runs blocks with "
        "dynamic activations only; quantise the checkpoint with dynamic ones.",
    ),
    "unknown scheme": (
        {**_BLOCKS, "activation_scheme": "token"},
        "config: activation_scheme is 'token', but it must be static or dynamic; correct "
        "quantization_config in config.json.",
    ),
    "neither": (
        {"quant_method": "fp8"},
        "config: quantization_config of FP8 has neither weight_block_size nor activation_scheme, "
        "so that it does not say which scales there are; add what the checkpoint was quantised "
        "with.",
    ),
    "e5m2": (
        {**_BLOCKS, "fmt": "float8_e5m2"},
        "config: fmt is 'float8_e5m2', but SGLang's FP8 kernels read e4m3; quantise the checkpoint "
        "to float8_e4m3fn.",
    ),
    "one side": (
        {**_BLOCKS, "weight_block_size": [128]},
        "config: weight_block_size is [128], but it must name two numbers such as [128, 128]; "
        "correct quantization_config in config.json.",
    ),
    "empty block": (
        {**_BLOCKS, "weight_block_size": [0, 128]},
        "config: weight_block_size is [0, 128], but both numbers must be at least 1; correct "
        "quantization_config in config.json.",
    ),
    "one of q, k, v": (
        {**_BLOCKS, "ignored_layers": ["q_proj"]},
        "config: ignored_layers keeps model.layers.0.self_attn.q_proj in full precision by "
        "'q_proj', but SGLang looks up model.layers.0.self_attn.qkv_proj",
    ),
    "no list": (
        {**_BLOCKS, "ignored_layers": "lm_head"},
        "config: ignored_layers is 'lm_head', but it must be a list of module names; correct the "
        "quantisation config.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    config, sentence = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        recipe_of(config)
    assert str(caught.value).startswith(sentence)
