"""The strict loader: updates that are partial or wrong, and loaders that lose what they get."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from sglang_minimax.errors import LoadError
from sglang_minimax.loading.direct import direct_problems
from sglang_minimax.loading.strict import StrictLoader
from sglang_minimax.topology import Cut
from tests.unit.forgiving_model import (
    ARCH,
    FP8,
    IN_FP8,
    StandIn,
    Weights,
    build,
    checkpoint,
    lenient_copy,
    no_gap,
    stored,
    untouched,
    whole_stage,
)

# --- weight updates ---


def test_an_update_may_be_partial_but_not_wrong():
    model, loader = build()
    loader.load(iter(checkpoint().items()))
    name = "model.layers.2.self_attn.o_proj.weight"
    new = torch.full((32, 128), 3.0)
    assert loader.load([(name, new)]) == {name}
    assert torch.equal(model.store[name], new)
    for wrong in ([(name, new[:1])], [("nonsense", new)], [(name, new), (name, new)]):
        with pytest.raises(LoadError):
            loader.load(wrong)


def test_a_wrong_update_in_one_piece_touches_nothing():
    model, loader = build()
    loader.load(iter(checkpoint().items()))
    name = "model.layers.2.self_attn.o_proj.weight"
    before = model.store[name].clone()
    with pytest.raises(LoadError):
        loader.load([(name, torch.zeros(32, 128)), ("nonsense", torch.zeros(1))])
    assert torch.equal(model.store[name], before)


def test_after_a_dummy_start_the_first_load_may_be_partial():
    _, loader = build()
    loader.filled_elsewhere()
    name = "model.norm.weight"
    assert loader.load([(name, torch.ones(32))]) == {name}


def test_an_update_reaches_a_parameter_that_post_processing_replaced():
    model, loader = build(IN_FP8)
    loader.load(iter(checkpoint(IN_FP8).items()))
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    model.store[name] = nn.Parameter(torch.zeros(2, 8), requires_grad=False)
    loader.load([(name, torch.full((2, 8), 0.5))])
    assert model.store[name].eq(0.5).all()


def test_a_failed_first_load_still_demands_everything():
    model, loader = build()
    with pytest.raises(LoadError):
        loader.load([("model.norm.weight", torch.ones(32))])
    with pytest.raises(LoadError):
        loader.load([("model.norm.weight", torch.ones(32))])
    loader.load(list(checkpoint().items()))
    assert no_gap(model)


def test_a_complete_load_can_be_demanded_again():
    model, loader = build()
    loader.load(iter(checkpoint().items()))
    norm = [("model.norm.weight", torch.ones(32))]
    with loader.complete():
        assert loader.load(iter(checkpoint().items())) == set(model.store)
        with pytest.raises(LoadError, match="missing"):
            loader.load(norm)
    with loader.complete(), pytest.raises(LoadError, match="missing"):
        loader.load(norm)
    assert loader.load(norm) == {"model.norm.weight"}
    assert no_gap(model)


def test_after_a_failure_under_complete_nothing_more_is_read():
    """SGLang's way back reads the same source once more, which could then even be accepted."""
    model, loader = build()
    loader.load(iter(checkpoint().items()))
    name = "model.layers.0.input_layernorm.weight"
    before = model.store[name].clone()
    with loader.complete():
        with pytest.raises(LoadError, match="missing"):
            loader.load([])
        with pytest.raises(LoadError, match="missing"):
            loader.load({**checkpoint(), name: before + 1}.items())
    assert torch.equal(model.store[name], before)
    with loader.complete():
        loader.load(iter(checkpoint().items()))


def test_a_model_knows_whether_it_is_that_of_a_checkpoint():
    _, loader = build()
    assert not loader.partial
    loader.load(iter(checkpoint().items()))
    assert not loader.partial
    loader.load([("model.norm.weight", torch.ones(32))])
    assert loader.partial
    with loader.complete(), pytest.raises(LoadError):
        loader.load([])
    assert loader.partial
    with loader.complete():
        loader.load(iter(checkpoint().items()))
    assert not loader.partial


# --- judging without writing ---


def announced(weights: Weights) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.to("meta")) for name, tensor in weights.items()]


@pytest.mark.parametrize("pairs", [lambda w: list(w.items()), announced], ids=["real", "meta"])
def test_looking_writes_nothing_and_finds_what_a_load_would_refuse(pairs):
    model, loader = build()
    loader.load(iter(checkpoint().items()))
    before = {name: parameter.clone() for name, parameter in model.store.items()}
    model.writes.clear()
    weights = {name: tensor + 1 for name, tensor in checkpoint().items()}
    name = "model.layers.2.self_attn.o_proj.weight"
    assert not loader.problems_of(pairs(weights), complete=True)
    for wrong, words in (
        ({**weights, name: weights[name][:1]}, f"misshapen: {name}"),
        ({**weights, "nonsense": torch.ones(1)}, "unexpected: nonsense"),
        ({**weights, name: weights[name].to(torch.int8)}, f"invalid: {name}"),
        ({key: w for key, w in weights.items() if key != name}, f"missing: {name}"),
    ):
        assert words in str(loader.problems_of(pairs(wrong), complete=True).error())
    assert "duplicate" in str(loader.problems_of(pairs(weights) * 2).error())
    assert not loader.problems_of(pairs({name: weights[name]}))
    assert model.writes == []
    assert all(torch.equal(model.store[n], tensor) for n, tensor in before.items())


def test_looking_judges_scales_that_have_values():
    _, loader = build(IN_FP8)
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    scale = torch.zeros(2, 8)
    assert "scales from 0.0" in str(loader.problems_of([(name, scale)]).error())
    assert not loader.problems_of([(name, scale.to("meta"))])


@pytest.mark.parametrize(
    ("arch", "built", "brought", "said"),
    [
        (ARCH, torch.float32, FP8, "is F8_E4M3, expected BF16"),
        (IN_FP8, FP8, torch.bfloat16, "is BF16, expected F8_E4M3"),
        (ARCH, FP8, torch.bfloat16, "is BF16, expected F8_E4M3"),
    ],
)
def test_a_cast_to_or_from_fp8_lacks_the_scale(arch, built, brought, said):
    model = StandIn(arch, whole_stage(arch))
    name = "model.layers.0.self_attn.o_proj.weight"
    model.store[name].data = model.store[name].to(built)
    loader = StrictLoader(model, arch, whole_stage(arch))
    loader.filled_elsewhere()
    weight = torch.ones(32, 128)
    if (arch is IN_FP8) == (built is FP8):
        assert not loader.problems_of([(name, weight.to(built))])
    assert f"{name} {said}" in str(loader.problems_of([(name, weight.to(brought))]).error())


def test_a_weight_that_was_quantised_after_loading_cannot_be_replaced():
    model, loader = build()
    loader.load(iter(checkpoint().items()))
    name = "model.layers.0.self_attn.o_proj.weight"
    model.store[name].data = model.store[name].to(torch.float8_e4m3fn)
    with pytest.raises(LoadError, match=f"{name} cannot be replaced"):
        loader.load([(name, torch.ones(32, 128))])


DIRECT_CASES = {
    "unknown": ([("nonsense", torch.ones(1))], "unexpected: nonsense"),
    "short": ([("a", torch.ones(3))], "misshapen: a is [3], expected [4]"),
    # SGLang's copy would fill the whole parameter with a single value.
    "single": ([("a", torch.ones(1))], "misshapen: a is [1]"),
    "twice": ([("a", torch.ones(4)), ("a", torch.ones(4))], "duplicate: a"),
    "integers": ([("a", torch.ones(4, dtype=torch.int32))], "invalid: a is torch.int32"),
    "fp8": ([("a", torch.ones(4).to(torch.float8_e4m3fn))], "invalid: a is torch.float8_e4m3fn"),
    "scale": ([("a.weight_scale", torch.zeros(1))], "invalid: a.weight_scale has scales"),
}


@pytest.mark.parametrize("case", DIRECT_CASES)
def test_what_is_copied_directly_must_have_the_shape_of_the_parameter(case):
    names = {"a": torch.zeros(4), "a.weight_scale": torch.ones(1)}
    parameters = {name: nn.Parameter(tensor) for name, tensor in names.items()}
    weights, words = DIRECT_CASES[case]
    assert words in str(direct_problems(parameters, weights).error())
    good = [("a", torch.ones(4, dtype=torch.bfloat16)), ("a.weight_scale", torch.ones(1))]
    assert not direct_problems(parameters, good)


def test_a_refused_complete_load_in_one_piece_leaves_no_mark():
    model, loader = build()
    loader.load(iter(checkpoint().items()))
    with loader.complete(), pytest.raises(LoadError):
        loader.load([("nonsense", torch.ones(1))])
    assert no_gap(model)


def test_a_parameter_that_was_renamed_since_is_named():
    """LoRA wraps modules, and their parameters have other names from then on."""
    model, loader = build()
    loader.load(iter(checkpoint().items()))
    name = "model.layers.2.self_attn.o_proj.weight"
    model.store[name.replace("o_proj", "o_proj.base_layer")] = model.store.pop(name)
    with pytest.raises(LoadError, match=f"no parameter {name}"):
        loader.load([(name, torch.ones(32, 128))])


# --- what a loader loses ---


def replaced_loader(model: StandIn, name: str, spoil: Callable) -> None:
    """Put `spoil` before a parameter's loader, which it is given as its first argument."""
    parameter = model.store[name]
    load = parameter.weight_loader
    parameter.weight_loader = lambda *args, **kw: spoil(load, *args, **kw)


EXPERTS = "model.layers.1.block_sparse_moe.experts"


@pytest.mark.parametrize("shard", ["w1", "w2", "w3"])
@pytest.mark.parametrize(
    ("arch", "kind"), [(ARCH, "weight"), (IN_FP8, "weight"), (IN_FP8, "weight_scale_inv")]
)
def test_an_expert_that_the_loader_skips_is_named(arch, kind, shard, tmp_path):
    def skip(load, *args, shard_id, expert_id):
        if (shard_id, expert_id) != (shard, 2):
            load(*args, shard_id=shard_id, expert_id=expert_id)

    for moe_tp in ((1, 0), (2, 1)):
        for source in (checkpoint(arch).items(), stored(checkpoint(arch), tmp_path)):
            model, loader = build(arch, moe_tp=moe_tp)
            replaced_loader(model, f"{EXPERTS}.{'w2' if shard == 'w2' else 'w13'}_{kind}", skip)
            name = f"{EXPERTS}.2.{shard}.{kind}"
            with pytest.raises(LoadError, match=f"{name}: SGLang's loader took 0 of 1 copies"):
                loader.load(iter(source))


def test_a_copy_of_an_expert_that_the_loader_skips_is_named():
    def once(load, param, tensor, name, *, shard_id, expert_id):
        lenient_copy(param.data[0, :64], tensor, Cut.whole(64), 0)

    model, loader = build(experts=[0, 0, 1, 2, 3])
    loader.load(iter(checkpoint().items()))
    assert no_gap(model)
    model, loader = build(experts=[0, 0, 1, 2, 3])
    replaced_loader(model, f"{EXPERTS}.w13_weight", once)
    with pytest.raises(LoadError, match=r"experts\.0\.w1\.weight: .* took 1 of 2 copies"):
        loader.load(iter(checkpoint().items()))


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_projection_that_the_loader_skips_is_named(part):
    def skip(load, param, tensor, shard):
        if shard != part:
            load(param, tensor, shard)

    model, loader = build()
    replaced_loader(model, "model.layers.0.self_attn.qkv_proj.weight", skip)
    with pytest.raises(LoadError, match=f"{part}_proj.weight: .* took 0 of 1 copies"):
        loader.load(iter(checkpoint().items()))


def test_a_loader_that_cuts_another_ranks_part_is_named():
    def first_half(load, param, tensor, name, *, shard_id, expert_id):
        param.data[expert_id].narrow(0, 0, 32).copy_(tensor.narrow(0, 0, 32))

    model, loader = build(moe_tp=(2, 1))
    replaced_loader(model, f"{EXPERTS}.w13_weight", first_half)
    said = r"w1\.weight: SGLang's loader cuts 0 to 32 of dimension 0, .* holds 32 to 64"
    with pytest.raises(LoadError, match=said):
        loader.load(iter(checkpoint().items()))


@pytest.mark.parametrize(("experts", "fits"), [(4, True), (2, False), (5, False)])
def test_the_places_for_experts_are_counted(experts, fits):
    """More places than this rank has experts for would be served as they were allocated."""
    model = StandIn(ARCH, whole_stage(experts=range(4)))
    loader = StrictLoader(model, ARCH, whole_stage(experts=[*range(4), 0][:experts]))
    if fits:
        loader.load(iter(checkpoint().items()))
        return
    with pytest.raises(
        LoadError, match=rf"experts\.w.*_weight is \[4, .*\], expected {experts} experts"
    ):
        loader.load(iter(checkpoint().items()))
    assert untouched(model)


def test_an_expert_parameter_that_is_too_narrow_is_named():
    stage = whole_stage()
    model = StandIn(ARCH, replace(stage, width=Cut.even(range(63), 63)))
    with pytest.raises(LoadError, match=rf"misshapen: {EXPERTS}.w2_weight is \[4, 32, 63\]"):
        StrictLoader(model, ARCH, stage).load(iter(checkpoint().items()))
    assert untouched(model)


def test_a_file_that_breaks_while_it_is_read_is_one_sentence():
    def broken() -> Iterator:
        yield "model.norm.weight", torch.ones(32)
        raise OSError("Input/output error")

    _, loader = build()
    with pytest.raises(LoadError, match="Input/output error"):
        loader.load(broken())


def test_a_small_call_rebuilds_nothing(monkeypatch):
    """A trainer pushes a model in thousands of calls: none may walk the model or the slots."""
    from sglang_minimax.loading import binding, slots

    _, loader = build()
    loader.load(iter(checkpoint().items()))

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("built once more")

    monkeypatch.setattr(slots.SlotTable, "build", again)
    monkeypatch.setattr(binding.Binding, "__init__", again)
    monkeypatch.setattr(binding.Binding, "check_parameters", again)
    for walk in ("named_parameters", "parameters", "named_modules", "modules"):
        monkeypatch.setattr(nn.Module, walk, again)
    for pair in checkpoint().items():
        loader.load([pair])
