"""The strict loader: what must load, and what must not."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file

from sglang_minimax.errors import LoadError
from sglang_minimax.loading.headers import read_headers
from sglang_minimax.loading.planned import CheckpointFiles
from sglang_minimax.loading.problems import Problems
from sglang_minimax.loading.strict import StrictLoader
from sglang_minimax.topology import Cut, expert_range
from tests.unit.forgiving_model import (
    ARCH,
    FP8,
    IN_FP8,
    StandIn,
    Weights,
    architecture,
    build,
    checkpoint,
    failure,
    failure_from_files,
    no_gap,
    same,
    stored,
    untouched,
    whole_stage,
)

# --- what must load ---


@pytest.mark.parametrize("arch", [ARCH, IN_FP8], ids=["plain", "fp8"])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_complete_checkpoint_leaves_no_gap_on_any_rank(size, arch, tmp_path):
    weights = checkpoint(arch)
    files = stored(weights, tmp_path)
    # Eight ranks share the four blocks of an expert: half of them hold padding only.
    moe_tp = size if arch is IN_FP8 else min(size, 4)
    for rank in range(size):
        models = []
        for source in (iter(weights.items()), list(weights.items()), iter(files)):
            stage = whole_stage(arch, size, rank, moe_tp=(moe_tp, rank % moe_tp))
            model, loader = build(arch, stage)
            assert loader.load(source) == set(model.store)
            assert no_gap(model)
            assert len(model.writes) == len(set(model.writes))
            models.append(model)
        assert same(models[0], models[1])
        assert same(models[0], models[2])


def test_dealt_blocks_of_all_ranks_are_the_expert_and_padding_is_neutral():
    """Four blocks over three ranks: two, one and one, each padded to two."""
    weights, path = checkpoint(IN_FP8), "model.layers.1.block_sparse_moe.experts"
    rows, scales, columns = [], [], []
    for rank, held in enumerate((32, 16, 16)):
        model, loader = build(IN_FP8, moe_tp=(3, rank))
        loader.load(iter(weights.items()))
        w13, w13_scale, w2 = (
            model.store[f"{path}.{name}"].float()
            for name in ("w13_weight", "w13_weight_scale_inv", "w2_weight")
        )
        assert w13[2].shape == (64, 32)
        rows.append(w13[2, 32 : 32 + held])
        scales.append(w13_scale[2, 2 : 2 + held // 16])
        columns.append(w2[2, :, :held])
        assert w13[2, 32 + held :].eq(0).all()
        assert w13_scale[2, 2 + held // 16 :].eq(1).all()
        assert w2[2, :, held:].eq(0).all()
    assert torch.equal(torch.cat(rows), weights[f"{path}.2.w3.weight"].float())
    assert torch.equal(torch.cat(scales), weights[f"{path}.2.w3.weight_scale_inv"])
    assert torch.equal(torch.cat(columns, dim=1), weights[f"{path}.2.w2.weight"].float())


def test_the_shares_of_all_ranks_are_the_checkpoint():
    weights, size = checkpoint(), 8
    query, key = [], []
    for rank in range(size):
        model, loader = build(stage=whole_stage(size=size, rank=rank))
        loader.load(iter(weights.items()))
        qkv = model.store["model.layers.1.self_attn.qkv_proj.weight"]
        query.append(qkv[:16])
        key.append(qkv[16:32])
    assert torch.equal(torch.cat(query), weights["model.layers.1.self_attn.q_proj.weight"])
    # Two KV heads on eight ranks: four neighbours hold the same one.
    assert torch.equal(torch.cat(key[::4]), weights["model.layers.1.self_attn.k_proj.weight"])
    assert all(torch.equal(key[rank], key[rank // 4 * 4]) for rank in range(size))


@pytest.mark.parametrize("rank", range(4))
def test_experts_of_other_ranks_are_accounted_for_but_not_loaded(rank):
    experts = expert_range(ARCH.num_experts, 4, rank)
    model, loader = build(experts=experts)
    loader.load(iter(checkpoint().items()))
    assert no_gap(model)
    lost = checkpoint()
    other = (experts.start + 1) % 4
    del lost[f"model.layers.0.block_sparse_moe.experts.{other}.w2.weight"]
    assert f"experts.{other}.w2.weight" in failure(lost, experts=experts)


STAGES = (
    {"layers": range(1), "head": None},
    {"layers": range(1, 2), "embedding": None, "head": None},
    {"layers": range(2, 3), "embedding": None},
)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("part", STAGES, ids=["first", "middle", "last"])
def test_a_pipeline_stage_takes_its_part(part, tied):
    arch = architecture(tie_word_embeddings=tied)
    model, loader = build(arch, whole_stage(arch, **part))
    loader.load(iter(checkpoint(arch).items()))
    assert no_gap(model)
    if tied and "head" not in part:
        head = model.store["lm_head.weight"][: arch.vocab_size]
        assert torch.equal(head, checkpoint(arch)["model.embed_tokens.weight"])


def test_a_tied_head_is_shared_on_one_stage_and_its_tensor_left_out():
    arch = architecture(tie_word_embeddings=True)
    model, loader = build(arch)
    extra = torch.zeros(arch.vocab_size, arch.hidden_size)
    loader.load(iter([*checkpoint(arch).items(), ("lm_head.weight", extra)]))
    assert "lm_head.weight" not in model.store
    assert no_gap(model)


def test_a_tied_head_that_is_cut_otherwise_is_filled_from_the_embedding():
    arch = architecture(tie_word_embeddings=True)
    rows = Cut.even(range(16, 40), arch.vocab_size)
    model, loader = build(arch, whole_stage(arch, head=rows))
    loader.load(iter(checkpoint(arch).items()))
    embedding = checkpoint(arch)["model.embed_tokens.weight"]
    assert torch.equal(model.store["lm_head.weight"][:24], embedding[16:])
    assert torch.equal(model.store["model.embed_tokens.weight"][:40], embedding)


def in_memory_names(weights: Weights) -> Weights:
    """The same weights as transformers >= 5 holds them."""
    renamed: Weights = {}
    for name, tensor in weights.items():
        if ".experts." not in name:
            renamed[name.replace("block_sparse_moe", "mlp")] = tensor
    for layer in range(ARCH.num_layers):
        experts = f"model.layers.{layer}.block_sparse_moe.experts"
        w1, w2, w3 = (
            torch.stack([weights[f"{experts}.{e}.{p}.weight"] for e in range(ARCH.num_experts)])
            for p in ("w1", "w2", "w3")
        )
        stacked = experts.replace("block_sparse_moe", "mlp")
        renamed[f"{stacked}.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        renamed[f"{stacked}.down_proj"] = w2
    return renamed


def test_the_names_that_transformers_has_in_memory_fill_the_same_model():
    models = []
    for weights in (checkpoint(), in_memory_names(checkpoint())):
        torch.manual_seed(0)
        model, loader = build(moe_tp=(2, 1))
        loader.load(iter(weights.items()))
        models.append(model)
    for name, parameter in models[0].store.items():
        if "bias" not in name:
            assert torch.equal(parameter, models[1].store[name])


def test_deliberate_omissions_do_not_disturb():
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.3.enorm.weight": torch.ones(4),
    }
    model, loader = build()
    loader.load(iter({**checkpoint(), **extra}.items()))
    assert no_gap(model)


def test_kv_scales_are_optional_and_used_where_the_cache_is_quantised():
    model, loader = build(kv_scales=True)
    loader.load(iter(checkpoint(kv_scales=True).items()))
    assert model.store["model.layers.2.self_attn.attn.k_scale"].item() == 2.5
    assert model.store["model.layers.2.self_attn.attn.v_scale"].item() == 2.25
    model, loader = build(kv_scales=True)
    loader.load(iter(checkpoint().items()))
    model, loader = build()
    loader.load(iter(checkpoint(kv_scales=True).items()))
    assert no_gap(model)


# --- what must not ---


def test_every_single_missing_tensor_is_named(tmp_path):
    weights = checkpoint(IN_FP8)
    for i, name in enumerate(weights):
        rest = {key: value for key, value in weights.items() if key != name}
        said = [failure(rest, IN_FP8)]
        if i % 9 == 0:
            said.append(failure_from_files(rest, tmp_path, IN_FP8))
        for message in said:
            assert f"missing: {name}" in message
            assert "(1 missing)" in message


@pytest.mark.parametrize("change", ["shorter", "longer", "narrower", "transposed"])
def test_every_single_misshapen_tensor_is_named(change, tmp_path):
    weights = checkpoint(IN_FP8)
    for i, (name, tensor) in enumerate(weights.items()):
        wrong = {
            "shorter": lambda t: t[:-1],
            "longer": lambda t: torch.cat([t.float(), t[:1].float()]).to(t.dtype),
            "narrower": lambda t: t[..., :-1],
            "transposed": lambda t: t.t(),
        }[change](tensor)
        if wrong.shape == tensor.shape:
            continue
        changed = {**weights, name: wrong.contiguous()}
        said = [failure(changed, IN_FP8)]
        if i % 9 == 0:
            said.append(failure_from_files(changed, tmp_path, IN_FP8))
        for message in said:
            assert "(1 misshapen)" in message
            assert f"misshapen: {name} is {list(wrong.shape)}, expected {list(tensor.shape)}" in (
                message
            )


def test_the_stand_in_would_not_have_noticed():
    """Without the comparison of full shapes a short tensor leaves zeros, and no complaint."""
    model, _ = build(stage=whole_stage(size=4, rank=3))
    parameter = model.store["model.layers.0.self_attn.qkv_proj.weight"]
    parameter.weight_loader(parameter, torch.ones(100, ARCH.hidden_size), "q")
    assert parameter[:4].eq(1).all()
    assert parameter[4:32].eq(0).all()


def test_duplicates_are_named_also_across_spellings():
    twice = [*checkpoint().items(), ("model.norm.weight", torch.ones(32))]
    assert "1 duplicate" in failure(twice)
    gate = torch.ones(ARCH.num_experts, 32)
    assert "duplicate: model.layers.1.mlp.gate.weight" in failure(
        [*checkpoint().items(), ("model.layers.1.mlp.gate.weight", gate)]
    )
    stacked = in_memory_names(checkpoint())["model.layers.1.mlp.experts.down_proj"]
    assert "duplicate: model.layers.1.mlp.experts.down_proj" in failure(
        [*checkpoint().items(), ("model.layers.1.mlp.experts.down_proj", stacked)]
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.z_proj.weight",
        "model.layers.0.block_sparse_moe.experts.4.w1.weight",
        "model.layers.4.input_layernorm.weight",
        "model.layers.99.enorm.weight",
        "visual.patch_embed.weight",
    ],
)
def test_every_unexpected_tensor_is_named(name):
    message = failure({**checkpoint(), name: torch.ones(64, 32)})
    assert f"unexpected: {name}" in message


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_and_positive_is_named(bad, tmp_path):
    weights = checkpoint(IN_FP8, kv_scales=True)
    for name in (
        "model.layers.1.self_attn.k_proj.weight_scale_inv",
        "model.layers.1.block_sparse_moe.experts.3.w2.weight_scale_inv",
        "model.layers.1.self_attn.v_proj.v_scale",
    ):
        scale = weights[name].clone()
        scale.view(-1)[-1] = bad
        changed = {**weights, name: scale}
        message = failure(changed, IN_FP8, kv_scales=True)
        assert "(1 invalid)" in message
        assert f"invalid: {name} has scales from" in message
        model, loader = build(IN_FP8, kv_scales=True)
        files = stored(changed, tmp_path)
        found = loader.problems_of(files, complete=True)
        assert f"invalid: {name} has scales from" in str(found.error())
        assert untouched(model)
        with pytest.raises(LoadError, match=f"{name} has scales from"):
            loader.load(iter(files))


def test_integers_are_no_weights(tmp_path):
    name = "model.layers.0.self_attn.o_proj.weight"
    wrong = {**checkpoint(), name: checkpoint()[name].to(torch.int8)}
    for message in (failure(wrong), failure_from_files(wrong, tmp_path)):
        assert "(1 invalid)" in message
        assert f"invalid: {name} is I8, expected BF16 or F16 or F32 or F64" in message


def test_a_bf16_checkpoint_does_not_fill_an_fp8_model_nor_the_other_way_round(tmp_path):
    for plain in (
        failure(checkpoint(), IN_FP8),
        failure_from_files(checkpoint(), tmp_path, IN_FP8),
    ):
        assert "(48 contradictory, 48 missing)" in plain
        assert "weight is F32, expected F8_E4M3" in plain
        assert "missing: model.layers.0.self_attn.q_proj.weight_scale_inv" in plain
    for fp8 in (failure(checkpoint(IN_FP8)), failure_from_files(checkpoint(IN_FP8), tmp_path)):
        assert re.search(r"\((48 invalid, 48 contradictory|48 contradictory, 48 invalid)\)", fp8)
        assert "weight is F8_E4M3, expected BF16" in fp8
        assert re.search("contradictory: .*weight_scale_inv .config.json says", fp8)


def test_files_are_judged_together_and_before_they_are_read(tmp_path):
    files = stored(checkpoint(), tmp_path)
    extra = tmp_path / "3.safetensors"
    save_file({"model.norm.weight": torch.ones(32)}, extra)
    model, loader = build()
    with pytest.raises(LoadError, match=r"duplicate: model\.norm\.weight \(in \d\."):
        loader.load(iter(CheckpointFiles((*files.files, extra))))
    assert untouched(model)
    extra.write_bytes(extra.read_bytes()[:-1])
    with pytest.raises(LoadError, match=r"3\.safetensors is incomplete"):
        loader.load(iter(CheckpointFiles((*files.files, extra))))
    assert untouched(model)


def test_what_another_rank_finds_in_files_ends_the_load_of_all(tmp_path):
    def agree(mine: Problems) -> Problems:
        mine.add("missing", "something of another rank")
        return mine

    model, loader = build()
    with pytest.raises(LoadError, match="something of another rank"):
        loader.load(iter(stored(checkpoint(), tmp_path, agree=agree)))
    assert untouched(model)
    assert model.writes == []


def test_a_plan_has_what_speaks_against_the_parameters(tmp_path):
    model, _ = build()
    name = "model.layers.0.self_attn.o_proj.weight"
    model.store[name].data = model.store[name].to(FP8)
    loader = StrictLoader(model, ARCH, whole_stage())
    headers = read_headers(stored(checkpoint(), tmp_path).files)
    said = str(loader.plan(headers).problems.error())
    assert f"invalid: {name} is F32, expected F8_E4M3" in said


def failure_with(change: Callable[[StandIn], object]) -> str:
    """The message for a model that was built otherwise; nothing may be written to it."""
    model = StandIn(ARCH, whole_stage())
    change(model)
    loader = StrictLoader(model, ARCH, whole_stage())
    with pytest.raises(LoadError) as caught:
        loader.load(iter(checkpoint().items()))
    assert untouched(model)
    return str(caught.value)


def test_a_parameter_that_no_tensor_fills_is_named():
    name = "model.layers.0.self_attn.qkv_proj.g_idx"
    said = failure_with(lambda model: model.loaded(name, (4,), lambda p, t: None))
    assert f"missing: {name} (a parameter that no tensor fills)" in said


def test_a_parameter_with_more_elements_than_its_tensors_fill_is_named():
    name = "model.layers.0.block_sparse_moe.gate.weight"
    assert f"missing: 32 elements of {name}" in failure_with(lambda m: m.plain(name, 5, 32))


def test_a_parameter_with_fewer_elements_than_its_tensors_have_is_named():
    name = "model.layers.0.block_sparse_moe.gate.weight"
    assert f"misshapen: {name} is [3, 32]" in failure_with(lambda m: m.plain(name, 3, 32))


def test_the_message_is_a_sentence_and_a_short_list():
    weights = {k: v for k, v in checkpoint().items() if ".experts.1." not in k}
    first, *rest = failure({**weights, "what.weight": torch.ones(1)}).splitlines()
    assert first.startswith("the weights do not fit the model (1 unexpected, 9 missing)")
    assert first.endswith(".")
    assert len(rest) == 10
    many = {k: v for k, v in checkpoint().items() if ".experts." not in k}
    *_, last = failure(many).splitlines()
    assert last == "  missing: ... and 26 more"
