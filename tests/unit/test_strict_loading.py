"""The strict loader on a stand-in model whose parameter loaders are as forgiving as SGLang's.

The stand-in starts full of NaN, so an element that nothing writes is visible; its loaders cut this
rank's share and pad what is too short without a word, which is what the ledger must catch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from sglang_minimax.config import Architecture
from sglang_minimax.errors import LoadError
from sglang_minimax.loading.arrival import ExpertShare
from sglang_minimax.loading.ledger import direct_problems
from sglang_minimax.loading.slots import Stage
from sglang_minimax.loading.strict import StrictLoader
from sglang_minimax.topology import AttentionShard, ceil_div, expert_range, expert_rows

BLOCK = (16, 16)
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


def checkpoint(arch: Architecture = ARCH, *, fp8: bool = False, kv_scales: bool = False) -> Weights:
    """A complete checkpoint with published names; every tensor has its own values."""
    hidden, width = arch.hidden_size, arch.expert_width
    q_total, kv_total = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    weights: Weights = {}

    def add(name: str, *shape: int, scaled: bool = False) -> None:
        generator = torch.Generator().manual_seed(len(weights))
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator)
        if scaled and fp8:
            blocks = [ceil_div(n, b) for n, b in zip(shape, BLOCK, strict=True)]
            weights[f"{name}.weight_scale_inv"] = torch.rand(blocks, generator=generator) + 0.1

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
        weights[f"{moe}.e_score_correction_bias"] = torch.randn(arch.num_experts)
        for expert in range(arch.num_experts):
            for name, shape in (("w1", (width, hidden)), ("w2", (hidden, width))):
                add(f"{moe}.experts.{expert}.{name}", *shape, scaled=True)
            add(f"{moe}.experts.{expert}.w3", width, hidden, scaled=True)
    return weights


def lenient_copy(target: torch.Tensor, full: torch.Tensor, rows: range, dim: int) -> None:
    """Cut `rows` along `dim` and copy; a short tensor is padded with zeros, as in SGLang."""
    target.zero_()
    share = full.narrow(dim, min(rows.start, full.shape[dim]), 0)
    if rows.start < full.shape[dim]:
        share = full.narrow(dim, rows.start, min(len(rows), full.shape[dim] - rows.start))
    target.narrow(dim, 0, share.shape[dim]).copy_(share)


def scaled_range(rows: range, block: int) -> range:
    return range(rows.start // block, ceil_div(rows.stop, block))


class StandIn(nn.Module):
    """The parameters of one rank under SGLang's names, with loaders that record each write."""

    def __init__(
        self,
        arch: Architecture,
        stage: Stage,
        *,
        moe_tp: tuple[int, int] = (1, 0),
        experts: range | None = None,
        fp8: bool = False,
        kv_scales: bool = False,
    ) -> None:
        super().__init__()
        self.arch, self.stage, self.fp8 = arch, stage, fp8
        self.experts = range(arch.num_experts) if experts is None else experts
        self.expert_rows = expert_rows(arch.expert_width, *moe_tp)
        self.store: dict[str, nn.Parameter] = {}
        self.writes: list[tuple[str, object]] = []
        if stage.embed:
            self.vocabulary("model.embed_tokens.weight")
        if stage.head:
            self.plain("model.norm.weight", arch.hidden_size)
            if not (arch.tie_word_embeddings and stage.embed):
                self.vocabulary("lm_head.weight")
        for layer in stage.layers:
            self.layer(f"model.layers.{layer}", kv_scales)

    def named_parameters(self, *args: object, **kwargs: object) -> Iterator:
        return iter(self.store.items())

    def plain(self, name: str, *shape: int) -> nn.Parameter:
        parameter = nn.Parameter(torch.full(shape, float("nan")), requires_grad=False)
        self.store[name] = parameter
        return parameter

    def loaded(self, name: str, shape: tuple[int, ...], load: Callable) -> None:
        parameter = self.plain(name, *shape)

        def recorded(param: nn.Parameter, tensor: torch.Tensor, *args: object, **kw: object):
            self.writes.append((name, (*args, *sorted(kw.items()))))
            load(param, tensor, *args, **kw)

        parameter.weight_loader = recorded

    def vocabulary(self, name: str) -> None:
        rows = range(ceil_div(self.arch.vocab_size, 64) * 64)
        shape = (len(rows), self.arch.hidden_size)
        self.loaded(name, shape, lambda p, t: lenient_copy(p.data, t, rows, 0))

    def layer(self, layer: str, kv_scales: bool) -> None:
        hidden, shard = self.arch.hidden_size, self.stage.attention
        self.plain(f"{layer}.input_layernorm.weight", hidden)
        self.plain(f"{layer}.post_attention_layernorm.weight", hidden)
        for name, rows in (("q_norm", shard.q_rows), ("k_norm", shard.kv_rows)):
            self.loaded(
                f"{layer}.self_attn.{name}.weight",
                (len(rows),),
                lambda p, t, rows=rows: lenient_copy(p.data, t, rows, 0),
            )
        for kind, (tall, wide) in self.kinds():
            self.qkv(f"{layer}.self_attn.qkv_proj.{kind}", tall, wide)
            columns = scaled_range(shard.q_rows, wide)
            self.loaded(
                f"{layer}.self_attn.o_proj.{kind}",
                (hidden // tall, len(columns)),
                lambda p, t, columns=columns: lenient_copy(p.data, t, columns, 1),
            )
            self.moe(f"{layer}.block_sparse_moe.experts", kind, tall, wide)
        for scale in ("k_scale", "v_scale") if kv_scales else ():
            self.plain(f"{layer}.self_attn.attn.{scale}")
        self.plain(f"{layer}.block_sparse_moe.gate.weight", self.arch.num_experts, hidden)
        bias = f"{layer}.block_sparse_moe.e_score_correction_bias"
        self.plain(bias, self.arch.num_experts)

    def kinds(self) -> list[tuple[str, tuple[int, int]]]:
        return [("weight", (1, 1)), *([("weight_scale_inv", BLOCK)] if self.fp8 else [])]

    def qkv(self, name: str, tall: int, wide: int) -> None:
        shard = self.stage.attention
        q, kv = scaled_range(shard.q_rows, tall), scaled_range(shard.kv_rows, tall)
        places = {"q": (0, q), "k": (len(q), kv), "v": (len(q) + len(kv), kv)}

        def load(param: nn.Parameter, tensor: torch.Tensor, part: str) -> None:
            start, rows = places[part]
            lenient_copy(param.data.narrow(0, start, len(rows)), tensor, rows, 0)

        self.loaded(name, (len(q) + 2 * len(kv), self.arch.hidden_size // wide), load)

    def moe(self, path: str, kind: str, tall: int, wide: int) -> None:
        rows = scaled_range(self.expert_rows, tall)
        columns = scaled_range(self.expert_rows, wide)
        hidden = self.arch.hidden_size

        def load(param: nn.Parameter, tensor: torch.Tensor, name: str, shard_id: str, expert_id):
            if expert_id not in self.experts:
                return
            data = param.data[expert_id - self.experts.start]
            if shard_id == "w2":
                lenient_copy(data, tensor, columns, 1)
            else:
                start = 0 if shard_id == "w1" else len(rows)
                lenient_copy(data.narrow(0, start, len(rows)), tensor, rows, 0)

        count = len(self.experts)
        self.loaded(f"{path}.w13_{kind}", (count, 2 * len(rows), hidden // wide), load)
        self.loaded(f"{path}.w2_{kind}", (count, hidden // tall, len(columns)), load)


def whole_stage(arch: Architecture = ARCH, size: int = 1, rank: int = 0, **changes) -> Stage:
    shard = AttentionShard(size, rank, arch.head_dim, arch.num_heads, arch.num_kv_heads)
    values = {"layers": range(arch.num_layers), "embed": True, "head": True, **changes}
    return Stage(attention=shard, **values)


def build(arch: Architecture = ARCH, stage: Stage | None = None, **kw):
    stage = stage or whole_stage(arch)
    model = StandIn(arch, stage, **kw)
    block = BLOCK if kw.get("fp8") else None
    return model, StrictLoader(model, arch, stage, weight_block=block)


def no_gap(model: StandIn) -> bool:
    return not any(parameter.isnan().any() for parameter in model.store.values())


def failure(weights: Weights | list, arch: Architecture = ARCH, **kw: object) -> str:
    _, loader = build(arch, **kw)
    pairs = weights.items() if isinstance(weights, dict) else weights
    with pytest.raises(LoadError) as caught:
        loader.load(iter(pairs))
    return str(caught.value)


# --- what must load ---


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_complete_checkpoint_leaves_no_gap_on_any_rank(size, fp8):
    weights = checkpoint(fp8=fp8)
    moe_tp = min(size, 4)
    for rank in range(size):
        model, loader = build(
            stage=whole_stage(size=size, rank=rank), moe_tp=(moe_tp, rank % moe_tp), fp8=fp8
        )
        written = loader.load(iter(weights.items()))
        assert written == set(model.store)
        assert no_gap(model)
        assert len(model.writes) == len(set(model.writes))


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
    {"layers": range(1), "head": False},
    {"layers": range(1, 2), "embed": False, "head": False},
    {"layers": range(2, 3), "embed": False},
)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("part", STAGES, ids=["first", "middle", "last"])
def test_a_pipeline_stage_takes_its_part(part, tied):
    arch = architecture(tie_word_embeddings=tied)
    model, loader = build(arch, whole_stage(arch, **part))
    loader.load(iter(checkpoint(arch).items()))
    assert no_gap(model)
    if tied and part.get("head", True):
        head = model.store["lm_head.weight"][: arch.vocab_size]
        assert torch.equal(head, checkpoint(arch)["model.embed_tokens.weight"])


def test_a_tied_head_is_shared_on_one_stage_and_its_tensor_left_out():
    arch = architecture(tie_word_embeddings=True)
    model, loader = build(arch)
    extra = torch.zeros(arch.vocab_size, arch.hidden_size)
    loader.load(iter([*checkpoint(arch).items(), ("lm_head.weight", extra)]))
    assert "lm_head.weight" not in model.store
    assert no_gap(model)


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


def test_every_single_missing_tensor_is_named():
    weights = checkpoint(fp8=True)
    for name in weights:
        rest = {key: value for key, value in weights.items() if key != name}
        message = failure(rest, fp8=True)
        assert f"missing: {name}" in message
        assert "1 missing)" in message


@pytest.mark.parametrize("change", ["shorter", "longer", "narrower", "transposed"])
def test_every_single_misshapen_tensor_is_named(change):
    weights = checkpoint(fp8=True)
    for name, tensor in weights.items():
        wrong = {
            "shorter": lambda t: t[:-1],
            "longer": lambda t: torch.cat([t, t[:1]]),
            "narrower": lambda t: t[..., :-1],
            "transposed": lambda t: t.t(),
        }[change](tensor)
        if wrong.shape == tensor.shape:
            continue
        message = failure({**weights, name: wrong.contiguous()}, fp8=True)
        assert f"misshapen: {name} is {list(wrong.shape)}, expected {list(tensor.shape)}" in message


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
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.block_sparse_moe.experts.4.w1.weight",
        "model.layers.0.self_attn.q_proj.weight_scale_inv",
        "model.layers.4.input_layernorm.weight",
        "model.layers.99.enorm.weight",
        "visual.patch_embed.weight",
    ],
)
def test_every_unexpected_tensor_is_named(name):
    message = failure({**checkpoint(), name: torch.ones(64, 32)})
    assert f"unexpected: {name}" in message


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_and_positive_is_named(bad):
    weights = checkpoint(fp8=True, kv_scales=True)
    for name in (
        "model.layers.1.self_attn.k_proj.weight_scale_inv",
        "model.layers.1.block_sparse_moe.experts.3.w2.weight_scale_inv",
        "model.layers.1.self_attn.v_proj.v_scale",
    ):
        scale = weights[name].clone()
        scale.view(-1)[-1] = bad
        message = failure({**weights, name: scale}, fp8=True, kv_scales=True)
        assert f"invalid: {name} has scales from" in message


def test_integers_are_no_weights():
    name = "model.layers.0.self_attn.o_proj.weight"
    wrong = checkpoint()[name].to(torch.int8)
    assert f"invalid: {name} is torch.int8" in failure({**checkpoint(), name: wrong})


def test_a_bf16_checkpoint_does_not_fill_an_fp8_model_nor_the_other_way_round():
    assert "weight_scale_inv" in failure(checkpoint(), fp8=True)
    assert "unexpected" in failure(checkpoint(fp8=True))


def test_a_parameter_that_no_tensor_fills_is_named():
    model, loader = build()
    model.loaded("model.layers.0.self_attn.qkv_proj.g_idx", (4,), lambda p, t: None)
    with pytest.raises(LoadError, match="g_idx"):
        loader.load(iter(checkpoint().items()))


def test_a_parameter_with_more_elements_than_its_tensors_fill_is_named():
    model, loader = build()
    model.plain("model.layers.0.block_sparse_moe.gate.weight", 5, 32)
    with pytest.raises(LoadError, match=r"32 elements of .*gate"):
        loader.load(iter(checkpoint().items()))


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
    model, loader = build(fp8=True)
    loader.load(iter(checkpoint(fp8=True).items()))
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
    _, loader = build(fp8=True)
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    scale = torch.zeros(2, 8)
    assert "scales from 0.0" in str(loader.problems_of([(name, scale)]).error())
    assert not loader.problems_of([(name, scale.to("meta"))])


@pytest.mark.parametrize(
    ("built", "brought"),
    [(torch.float32, torch.float8_e4m3fn), (torch.float8_e4m3fn, torch.bfloat16)],
)
def test_a_cast_to_or_from_fp8_lacks_the_scale(built, brought):
    model, _ = build()
    name = "model.layers.0.self_attn.o_proj.weight"
    model.store[name].data = model.store[name].to(built)
    loader = StrictLoader(model, ARCH, whole_stage())
    loader.filled_elsewhere()
    weight = torch.ones(32, 128)
    assert not loader.problems_of([(name, weight.to(built))])
    assert f"{name} is {brought}, expected {built}" in str(
        loader.problems_of([(name, weight.to(brought))]).error()
    )


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


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shard", ["w1", "w2", "w3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_an_expert_that_the_loader_skips_is_named(shard, fp8, dtype):
    model, loader = build(fp8=fp8)
    packed = "w2" if shard == "w2" else "w13"
    name = f"model.layers.1.block_sparse_moe.experts.{packed}_weight"
    parameter = model.store[name]
    load = parameter.weight_loader
    parameter.data = torch.zeros(parameter.shape, dtype=dtype)
    loader = StrictLoader(model, ARCH, whole_stage(), weight_block=BLOCK if fp8 else None)

    def lossy(param, tensor, *args, shard_id, expert_id):
        if (shard_id, expert_id) != (shard, 2):
            load(param, tensor, *args, shard_id=shard_id, expert_id=expert_id)

    parameter.weight_loader = lossy
    weights = checkpoint(fp8=fp8)
    if dtype.itemsize == 1:
        expert = re.compile(
            rf"model\.layers\.1\..*experts\.\d\.{packed.replace('13', '[13]')}\.weight"
        )
        weights = {n: w.to(dtype) if expert.fullmatch(n) else w for n, w in weights.items()}
    with pytest.raises(LoadError) as caught:
        loader.load(iter(weights.items()))
    assert "(1 missing)" in str(caught.value)
    assert f"missing: {shard} of local expert 2 in {name}" in str(caught.value)


@pytest.mark.parametrize(
    ("experts", "rows", "fits"), [(4, 64, True), (2, 64, False), (4, 65, False)]
)
def test_the_room_for_experts_is_counted(experts, rows, fits):
    stage = whole_stage()
    model = StandIn(ARCH, stage)
    loader = StrictLoader(model, ARCH, stage, experts=ExpertShare(experts, rows))
    if fits:
        loader.load(iter(checkpoint().items()))
        return
    with pytest.raises(LoadError, match=f"expected {experts} experts"):
        loader.load(iter(checkpoint().items()))


def test_a_file_that_breaks_while_it_is_read_is_one_sentence():
    def broken() -> Iterator:
        yield "model.norm.weight", torch.ones(32)
        raise OSError("Input/output error")

    _, loader = build()
    with pytest.raises(LoadError, match="Input/output error"):
        loader.load(broken())
