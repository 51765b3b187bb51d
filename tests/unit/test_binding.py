"""The parameters that SGLang built against the slots that the plan knows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from sglang_minimax.loading.binding import Binding
from sglang_minimax.loading.formats.base import COLUMNS, ROWS, SCALE_TYPES, Axis, StoredTensor
from sglang_minimax.loading.names import TensorName
from sglang_minimax.loading.problems import Problems
from sglang_minimax.loading.slots import SCALAR, VECTOR, Slot, Stage
from sglang_minimax.topology import AttentionShard, Cut

STAGE = Stage(AttentionShard(1, 0, 4, 2, 2), range(1), None, None, Cut.whole(4), lambda i: {0: 2})
NORM = TensorName(0, "q_norm", "weight")
SLOT = Slot("a", VECTOR, Cut.whole(4), Cut.whole(1))


def parameter(*shape: int, loaded: bool = True, dtype=torch.float32) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
    if loaded:
        made.weight_loader = lambda *args: None
    return made


def found(slots, parameters, made=frozenset()) -> dict[str, list[str]]:
    problems = Problems()
    Binding(slots, parameters, made).check_parameters(problems, STAGE)
    return problems.groups


def test_a_parameter_is_covered_exactly() -> None:
    slots = {NORM: (SLOT,)}
    assert found(slots, {"a": parameter(4)}) == {}
    assert found(slots, {"a": parameter(5)}) == {"missing": ["1 elements of a"]}
    assert found(slots, {"a": parameter(3)}) == {"misshapen": ["a is [3], 1 too small"]}
    assert found(slots, {}) == {"unexpected": ["a (the model has no such parameter)"]}


def test_a_parameter_without_slots_is_missing_unless_its_owner_makes_it() -> None:
    slots, a = {NORM: (SLOT,)}, parameter(4)
    said = {"missing": ["b (a parameter that no tensor fills)"]}
    assert found(slots, {"a": a, "b": parameter(2)}) == said
    assert found(slots, {"a": a, "b": parameter(2, loaded=False)}) == {}
    assert found(slots, {"a": a, "b": parameter(2)}, frozenset({"b"})) == {}


@pytest.mark.parametrize(("shape", "fits"), [((2, 4), True), ((2, 6), True), ((3, 4), False)])
def test_experts_may_be_padded_but_not_too_many(shape: tuple[int, ...], fits: bool) -> None:
    slot = replace(SLOT, experts=3, shard="w1")
    slots = {TensorName(0, "experts", "weight", None, "w1"): (slot,)}
    assert (found(slots, {"a": parameter(*shape)}) == {}) is fits


def test_a_vocabulary_may_be_padded() -> None:
    slots = {TensorName(None, "lm_head", "weight"): (SLOT,)}
    assert found(slots, {"a": parameter(64)}) == {}


def test_an_optional_tensor_without_a_loaded_parameter_is_unused() -> None:
    name = TensorName(0, "o_proj", "input_scale")
    slots = {name: (Slot("a", SCALAR, Cut.whole(1), Cut.whole(1)),)}
    for parameters in ({}, {"a": parameter(loaded=False)}):
        assert Binding(slots, parameters).unused == {name}
    bound = Binding(slots, {"a": parameter()})
    assert (bound.unused, bound.slots) == (set(), slots)


def test_the_scales_of_sglangs_own_kv_cache_method_have_a_place() -> None:
    """They have no loader, and would be left at one without a word."""
    from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod

    layer = nn.Module()
    BaseKVCacheMethod(None).create_weights(layer)
    name = TensorName(0, "attn", "k_scale")
    slots = {name: (Slot("k_scale", SCALAR, Cut.whole(1), Cut.whole(1)),)}
    bound = Binding(slots, dict(layer.named_parameters()))
    assert (bound.unused, bound.slots) == (set(), slots)


def test_a_quantised_parameter_that_was_repacked_is_not_replaced() -> None:
    stored = StoredTensor("qweight", (Axis(COLUMNS, per=8), Axis(ROWS)), frozenset({"I32"}))
    slot = Slot("a", stored, Cut.whole(16), Cut.whole(64))
    built = nn.Parameter(torch.zeros(8, 16, dtype=torch.int32), requires_grad=False)
    bound = Binding({TensorName(0, "o_proj", "qweight"): (slot,)}, {"a": built})
    assert bound.obstacle(slot, built, "I32") is None
    repacked = nn.Parameter(torch.zeros(4, 32, dtype=torch.int32), requires_grad=False)
    assert "restart" in str(bound.obstacle(slot, repacked, "I32"))


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("built", "kind", "fits"),
    [
        (torch.bfloat16, "F32", True),
        (torch.float32, "BF16", True),
        (FP8, "F8_E4M3", True),
        (FP8, "BF16", False),
        (torch.bfloat16, "F8_E4M3", False),
        (FP8, "F8_E5M2", False),
        (torch.int32, "F32", False),
        (torch.float32, "I32", False),
        (torch.int32, "I32", True),
        (torch.float32, "C64", False),
    ],
)
def test_types_that_need_a_scale_are_not_cast(built: torch.dtype, kind: str, fits: bool) -> None:
    a = parameter(4, dtype=built)
    reason = Binding({NORM: (SLOT,)}, {"a": a}).obstacle(SLOT, a, kind)
    assert (reason is None) is fits


def test_scales_may_be_cast_and_a_quantised_parameter_not_replaced() -> None:
    scale = StoredTensor("scale", (Axis(ROWS),), SCALE_TYPES, scale=True)
    a = parameter(4)
    bound = Binding({NORM: (SLOT,)}, {"a": a})
    assert bound.obstacle(replace(SLOT, stored=scale), a, "BF16") is None
    now = parameter(4, dtype=FP8)
    assert "cannot be replaced" in str(bound.obstacle(SLOT, now, "F32"))
