"""The strict loader on a stand-in model whose parameter loaders are as forgiving as SGLang's.

The stand-in starts full of NaN, so an element that nothing writes is visible; its loaders cut this
rank's share and pad what is too short without a word, which is what the ledger must catch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sglang_minimax.config import Architecture
from sglang_minimax.errors import LoadError
from sglang_minimax.loading.direct import direct_problems
from sglang_minimax.loading.headers import read_headers
from sglang_minimax.loading.planned import CheckpointFiles, ReadOptions
from sglang_minimax.loading.problems import Problems
from sglang_minimax.loading.slots import Stage
from sglang_minimax.loading.strict import StrictLoader
from sglang_minimax.topology import AttentionShard, Cut, ceil_div, expert_cut, expert_range

BLOCK = (16, 16)
FP8 = torch.float8_e4m3fn
CONFIG = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_mtp_modules": 1,
    "vocab_size": 40,
}
Weights = dict[str, torch.Tensor]


def architecture(**changes: object) -> Architecture:
    return Architecture.from_config({**CONFIG, **changes})


ARCH = architecture()
IN_FP8 = architecture(quantization_config={"quant_method": "fp8", "weight_block_size": list(BLOCK)})


def is_fp8(arch: Architecture) -> bool:
    return arch.recipe.method is not None


def checkpoint(arch: Architecture = ARCH, *, kv_scales: bool = False) -> Weights:
    """A complete checkpoint with published names; every tensor has its own values."""
    hidden, width = arch.hidden_size, arch.expert_width
    q_total, kv_total = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    weights: Weights = {}

    def add(name: str, *shape: int, scaled: bool = False) -> None:
        generator = torch.Generator().manual_seed(len(weights))
        values = torch.randn(shape, generator=generator)
        if scaled and is_fp8(arch):
            blocks = [ceil_div(n, b) for n, b in zip(shape, BLOCK, strict=True)]
            weights[f"{name}.weight"] = values.to(FP8)
            weights[f"{name}.weight_scale_inv"] = torch.rand(blocks, generator=generator) + 0.1
        else:
            weights[f"{name}.weight"] = values

    add("model.embed_tokens", arch.vocab_size, hidden)
    add("model.norm", hidden)
    if not arch.tie_word_embeddings:
        add("lm_head", arch.vocab_size, hidden)
    for i in range(arch.num_layers):
        layer = f"model.layers.{i}"
        add(f"{layer}.input_layernorm", hidden)
        add(f"{layer}.post_attention_layernorm", hidden)
        for name, rows in (("q", q_total), ("k", kv_total), ("v", kv_total)):
            add(f"{layer}.self_attn.{name}_proj", rows, hidden, scaled=True)
        add(f"{layer}.self_attn.o_proj", hidden, q_total, scaled=True)
        add(f"{layer}.self_attn.q_norm", q_total)
        add(f"{layer}.self_attn.k_norm", kv_total)
        if kv_scales:
            weights[f"{layer}.self_attn.k_proj.k_scale"] = torch.tensor(0.5 + i)
            weights[f"{layer}.self_attn.v_proj.v_scale"] = torch.tensor([0.25 + i])
        moe = f"{layer}.block_sparse_moe"
        add(f"{moe}.gate", arch.num_experts, hidden)
        weights[f"{moe}.e_score_correction_bias"] = torch.linspace(i, i + 1, arch.num_experts)
        for expert in range(arch.num_experts):
            for name, shape in (("w1", (width, hidden)), ("w2", (hidden, width))):
                add(f"{moe}.experts.{expert}.{name}", *shape, scaled=True)
            add(f"{moe}.experts.{expert}.w3", width, hidden, scaled=True)
    return weights


def lenient_copy(target: torch.Tensor, full: torch.Tensor, cut: Cut, dim: int) -> None:
    """Cut a part along `dim` and copy; a short tensor is padded with zeros, as in SGLang."""
    target.zero_()
    size = min(cut.width, full.shape[dim] - cut.first)
    if size > 0 or not cut.width:
        target.narrow(dim, 0, size).copy_(full.narrow(dim, cut.first, size))


def in_blocks(cut: Cut, block: int) -> Cut:
    """The blocks of a part that cuts none."""
    lines = range(cut.lines.start // block, ceil_div(cut.lines.stop, block))
    sizes = (ceil_div(n, block) for n in (cut.total, cut.width, cut.first, cut.over))
    return Cut(lines, *sizes)


class Store(dict[str, nn.Parameter]):
    """The parameters of a model by name; what is set here is set in its modules."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def owner(self, name: str) -> tuple[nn.Module, str]:
        module = self.model
        *path, attribute = name.split(".")
        for each in path:
            if each not in module._modules:
                module.add_module(each, nn.Module())
            module = module._modules[each]
        return module, attribute

    def __setitem__(self, name: str, parameter: nn.Parameter) -> None:
        super().__setitem__(name, parameter)
        module, attribute = self.owner(name)
        module.register_parameter(attribute, parameter)

    def pop(self, name: str) -> nn.Parameter:
        module, attribute = self.owner(name)
        delattr(module, attribute)
        return super().pop(name)


class StandIn(nn.Module):
    """The parameters of one rank under SGLang's names, with loaders that record each write."""

    def __init__(self, arch: Architecture, stage: Stage) -> None:
        super().__init__()
        self.arch, self.stage = arch, stage
        self.store = Store(self)
        self.writes: list[tuple[str, object]] = []
        if stage.embedding:
            self.vocabulary("model.embed_tokens.weight", stage.embedding)
        if stage.head:
            self.plain("model.norm.weight", arch.hidden_size)
            if not (arch.tie_word_embeddings and stage.embedding == stage.head):
                self.vocabulary("lm_head.weight", stage.head)
        for layer in stage.layers:
            self.layer(layer, f"model.layers.{layer}")

    def plain(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
        data = torch.full(shape, float("nan")).to(dtype)
        self.store[name] = parameter = nn.Parameter(data, requires_grad=False)
        return parameter

    def loaded(self, name: str, shape: tuple[int, ...], load: Callable) -> None:
        in_fp8 = is_fp8(self.arch) and name.endswith(
            ("_proj.weight", "experts.w13_weight", "experts.w2_weight")
        )
        parameter = self.plain(name, *shape, dtype=FP8 if in_fp8 else torch.float32)

        def recorded(param: nn.Parameter, tensor: torch.Tensor, *args: object, **kw: object):
            self.writes.append((name, (*args, *sorted(kw.items()))))
            load(param, tensor, *args, **kw)

        parameter.weight_loader = recorded

    def vocabulary(self, name: str, cut: Cut) -> None:
        shape = (ceil_div(len(cut.lines), 64) * 64, self.arch.hidden_size)

        def load(param: nn.Parameter, tensor: torch.Tensor) -> None:
            param.data.zero_()
            lenient_copy(param.data[: len(cut.lines)], tensor, cut, 0)

        self.loaded(name, shape, load)

    def layer(self, number: int, layer: str) -> None:
        hidden, shard = self.arch.hidden_size, self.stage.attention
        self.plain(f"{layer}.input_layernorm.weight", hidden)
        self.plain(f"{layer}.post_attention_layernorm.weight", hidden)
        q, kv = Cut.even(shard.q_rows, shard.q_total), Cut.even(shard.kv_rows, shard.kv_total)
        for name, cut in (("q_norm", q), ("k_norm", kv)):
            self.loaded(
                f"{layer}.self_attn.{name}.weight",
                (cut.width,),
                lambda p, t, cut=cut: lenient_copy(p.data, t, cut, 0),
            )
        for kind, (tall, wide) in self.kinds():
            self.qkv(f"{layer}.self_attn.qkv_proj.{kind}", in_blocks(q, tall), in_blocks(kv, tall))
            columns = in_blocks(q, wide)
            self.loaded(
                f"{layer}.self_attn.o_proj.{kind}",
                (hidden // tall, columns.width),
                lambda p, t, columns=columns: lenient_copy(p.data, t, columns, 1),
            )
            self.moe(number, f"{layer}.block_sparse_moe.experts", kind, tall, wide)
        for scale in ("k_scale", "v_scale") if self.stage.kv_scales else ():
            # As BaseKVCacheMethod.create_weights makes them: without a loader.
            self.plain(f"{layer}.self_attn.attn.{scale}")
        self.plain(f"{layer}.block_sparse_moe.gate.weight", self.arch.num_experts, hidden)
        bias = f"{layer}.block_sparse_moe.e_score_correction_bias"
        self.plain(bias, self.arch.num_experts)

    def kinds(self) -> list[tuple[str, tuple[int, int]]]:
        return [
            ("weight", (1, 1)),
            *([("weight_scale_inv", BLOCK)] if is_fp8(self.arch) else []),
        ]

    def qkv(self, name: str, q: Cut, kv: Cut) -> None:
        places = {"q": (0, q), "k": (q.width, kv), "v": (q.width + kv.width, kv)}

        def load(param: nn.Parameter, tensor: torch.Tensor, part: str) -> None:
            start, cut = places[part]
            lenient_copy(param.data.narrow(0, start, cut.width), tensor, cut, 0)

        wide = BLOCK[1] if name.endswith("scale_inv") else 1
        self.loaded(name, (q.width + 2 * kv.width, self.arch.hidden_size // wide), load)

    def moe(self, layer: int, path: str, kind: str, tall: int, wide: int) -> None:
        rows, columns = (in_blocks(self.stage.width, block) for block in (tall, wide))
        hidden = self.arch.hidden_size
        held = list(Counter(self.stage.experts(layer)).elements())

        def load(param: nn.Parameter, tensor: torch.Tensor, name: str, shard_id: str, expert_id):
            for place, expert in enumerate(held):
                if expert == expert_id:
                    self.expert(param.data[place], tensor, shard_id, rows, columns)

        self.loaded(f"{path}.w13_{kind}", (len(held), 2 * rows.width, hidden // wide), load)
        self.loaded(f"{path}.w2_{kind}", (len(held), hidden // tall, columns.width), load)

    def expert(self, data: torch.Tensor, tensor: torch.Tensor, part: str, rows: Cut, columns: Cut):
        if part == "w2":
            lenient_copy(data, tensor, columns, 1)
        else:
            start = 0 if part == "w1" else rows.width
            lenient_copy(data.narrow(0, start, rows.width), tensor, rows, 0)


def whole_stage(
    arch: Architecture = ARCH,
    size: int = 1,
    rank: int = 0,
    *,
    moe_tp: tuple[int, int] = (1, 0),
    experts: Sequence[int] | None = None,
    **changes: Any,
) -> Stage:
    """experts: those of this rank, in the order of their places; a number twice has two copies."""
    vocabulary = Cut.whole(arch.vocab_size)
    held = Counter(range(arch.num_experts) if experts is None else experts)
    values = {"layers": range(arch.num_layers), "embedding": vocabulary, "head": vocabulary}
    return Stage(
        attention=AttentionShard.of(arch, size, rank),
        width=expert_cut(arch.expert_width, *moe_tp, arch.expert_unit),
        experts=lambda layer: held,
        **{**values, **changes},
    )


def build(arch: Architecture = ARCH, stage: Stage | None = None, **kw: Any):
    stage = stage or whole_stage(arch, **kw)
    model = StandIn(arch, stage)
    return model, StrictLoader(model, arch, stage)


def no_gap(model: StandIn) -> bool:
    return not any(parameter.float().isnan().any() for parameter in model.store.values())


def untouched(model: StandIn) -> bool:
    return all(parameter.float().isnan().all() for parameter in model.store.values())


def failure(weights: Weights | list, arch: Architecture = ARCH, **kw: Any) -> str:
    """The message; the same for tensors one by one and in one piece, which must write nothing."""
    pairs = list(weights.items() if isinstance(weights, dict) else weights)
    said = []
    for source in (iter(pairs), pairs):
        model, loader = build(arch, **kw)
        with pytest.raises(LoadError) as caught:
            loader.load(source)
        said.append(str(caught.value))
    assert untouched(model)
    assert said[0] == said[1]
    return said[0]


def stored(weights: Weights, folder: Path, **options: Any) -> CheckpointFiles:
    """The weights in two files."""
    files = (folder / "1.safetensors", folder / "2.safetensors")
    for i, file in enumerate(files):
        # A tensor in the file of its own: save_file refuses views of one storage.
        part = {n: w.contiguous().clone() for n, w in list(weights.items())[i::2]}
        save_file(part, file)
    return CheckpointFiles(files, ReadOptions(threads=2, **options))


def failure_from_files(weights: Weights, folder: Path, arch: Architecture = ARCH) -> str:
    model, loader = build(arch)
    with pytest.raises(LoadError) as caught:
        loader.load(iter(stored(weights, folder)))
    assert untouched(model)
    assert model.writes == []
    return str(caught.value)


def same(one: StandIn, other: StandIn) -> bool:
    return one.store.keys() == other.store.keys() and all(
        torch.equal(parameter.float(), other.store[name].float())
        for name, parameter in one.store.items()
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
