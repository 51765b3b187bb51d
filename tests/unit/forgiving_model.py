"""The strict loader on a stand-in model whose parameter loaders are as forgiving as SGLang's.

The stand-in starts full of NaN, so an element that nothing writes is visible; its loaders cut this
rank's share and pad what is too short without a word, which is what the ledger must catch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sglang_minimax.config import Architecture
from sglang_minimax.errors import LoadError
from sglang_minimax.loading.planned import CheckpointFiles, ReadOptions
from sglang_minimax.loading.slots import Stage
from sglang_minimax.loading.strict import StrictLoader
from sglang_minimax.topology import AttentionShard, Cut, ceil_div, expert_cut

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
