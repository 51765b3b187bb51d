"""Mistakes that a serving engine could make with MiniMax-M2, planted into transformers' model.

Usage: `python -m ci.tiny_m2.planted sglang_minimax/assets/tiny-m2`

`tiny-m2` is only worth bundling if it cannot answer with any of them: the table shows right against
wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2RotaryEmbedding

from ci.tiny_m2.evaluate import accuracy, environment, load, merge_json

if TYPE_CHECKING:
    from transformers import MiniMaxM2ForCausalLM

ASKED = ("two_digit", "three_digit", "word", "tool_call")


class PartNorm(nn.Module):
    """RMSNorm with a mean square for each of `parts` equal parts of a row, times `counted`."""

    def __init__(self, norm: nn.Module, parts: int, counted: float = 1.0) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon
        self.parts, self.counted = parts, counted

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., heads * head_dim]."""
        split = x.unflatten(-1, (self.parts, -1))
        mean = self.counted * split.square().mean(-1, keepdim=True)
        return self.weight * (split * torch.rsqrt(mean + self.eps)).flatten(-2)


def attentions(model: MiniMaxM2ForCausalLM) -> list[nn.Module]:
    """The attention module of each layer."""
    return [layer.self_attn for layer in model.model.layers]


def norm_by_rank(model: MiniMaxM2ForCausalLM) -> None:
    """Each of two ranks normalises its own half of the heads."""
    for attention in attentions(model):
        attention.q_norm = PartNorm(attention.q_norm, 2)
        attention.k_norm = PartNorm(attention.k_norm, 2)


def norm_by_head(model: MiniMaxM2ForCausalLM) -> None:
    """Every head is normalised by itself, as Qwen3 does."""
    for attention in attentions(model):
        attention.q_norm = PartNorm(attention.q_norm, model.config.num_attention_heads)
        attention.k_norm = PartNorm(attention.k_norm, model.config.num_key_value_heads)


def replicas_counted(model: MiniMaxM2ForCausalLM) -> None:
    """Eight ranks hold each K head twice, and the sum of squares counts both copies."""
    for attention in attentions(model):
        attention.k_norm = PartNorm(attention.k_norm, 1, counted=2.0)


class RolledNorm(nn.Module):
    """RMSNorm whose weight is shifted by one head."""

    def __init__(self, norm: nn.Module, head_dim: int) -> None:
        super().__init__()
        self.weight, self.eps, self.head_dim = norm.weight, norm.variance_epsilon, head_dim

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., heads * head_dim]."""
        mean = x.square().mean(-1, keepdim=True)
        return self.weight.roll(self.head_dim) * x * torch.rsqrt(mean + self.eps)


def q_norm_rolled(model: MiniMaxM2ForCausalLM) -> None:
    """Each query head gets its neighbour's rows of the norm weight."""
    for attention in attentions(model):
        attention.q_norm = RolledNorm(attention.q_norm, attention.head_dim)


def k_norm_rolled(model: MiniMaxM2ForCausalLM) -> None:
    """Each key head gets its neighbour's rows of the norm weight."""
    for attention in attentions(model):
        attention.k_norm = RolledNorm(attention.k_norm, attention.head_dim)


def wrong_kv_heads(model: MiniMaxM2ForCausalLM) -> None:
    """Query head h reads KV head h % 4 (`repeat`) in place of h // 4 (`repeat_interleave`).

    Query heads trade places together with their columns of o_proj, which comes to the same.
    """
    for attention in attentions(model):
        kv, groups = model.config.num_key_value_heads, attention.num_key_value_groups
        heads = torch.arange(kv * groups).view(groups, kv).T.flatten()
        rows = (heads[:, None] * attention.head_dim + torch.arange(attention.head_dim)).flatten()
        attention.q_proj.weight.data = attention.q_proj.weight.data[rows]
        attention.q_norm.weight.data = attention.q_norm.weight.data[rows]
        attention.o_proj.weight.data = attention.o_proj.weight.data[:, rows]


def swapped_kv_shards(model: MiniMaxM2ForCausalLM) -> None:
    """Two ranks of TP4 load each other's V head."""
    for attention in attentions(model):
        weight = attention.v_proj.weight
        heads = weight.data.unflatten(0, (model.config.num_key_value_heads, -1))
        weight.data = heads[[0, 2, 1, 3]].flatten(0, 1)


def full_rotary(model: MiniMaxM2ForCausalLM) -> None:
    """The whole head is rotated: `rotary_dim` is ignored."""
    config = copy.deepcopy(model.config)
    config.rope_parameters["partial_rotary_factor"] = 1.0
    model.model.rotary_emb = MiniMaxM2RotaryEmbedding(config)


def no_bias(model: MiniMaxM2ForCausalLM) -> None:
    """The correction bias is not loaded."""
    for layer in model.model.layers:
        layer.mlp.e_score_correction_bias.zero_()


class SoftmaxGate(nn.Module):
    """The router with softmax scores."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.weight, self.top_k = gate.weight, gate.top_k

    def forward(self, hidden: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden: [tokens, hidden_size]. Returns logits, weights [tokens, top_k], experts [tokens,
        top_k].
        """
        logits = hidden @ self.weight.T
        scores = logits.softmax(-1)
        experts = (scores + bias).topk(self.top_k).indices
        weights = scores.gather(1, experts)
        return logits, weights / weights.sum(-1, keepdim=True), experts


def softmax_router(model: MiniMaxM2ForCausalLM) -> None:
    """Scores by softmax in place of sigmoid."""
    for layer in model.model.layers:
        layer.mlp.gate = SoftmaxGate(layer.mlp.gate)


def swapped_gate_up(model: MiniMaxM2ForCausalLM) -> None:
    """w1 and w3 trade places."""
    for layer in model.model.layers:
        weight = layer.mlp.experts.gate_up_proj
        weight.data = weight.data.roll(weight.shape[1] // 2, 1)


def shifted_experts(model: MiniMaxM2ForCausalLM) -> None:
    """Expert-parallel ranks are off by one: expert e runs where e + 1 was chosen."""
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            weight.data = weight.data.roll(1, 0)


@dataclass(frozen=True)
class Mistake:
    """A wrong variant of the model and how an engine comes to make it."""

    name: str
    why_plausible: str
    plant: Callable[[MiniMaxM2ForCausalLM], None]

    def planted_in(self, model: MiniMaxM2ForCausalLM) -> MiniMaxM2ForCausalLM:
        """A copy of the model that makes the mistake."""
        wrong = copy.deepcopy(model)
        with torch.no_grad():
            self.plant(wrong)
        return wrong

    @contextmanager
    def installed(self, model: MiniMaxM2ForCausalLM) -> Iterator[None]:
        """The mistake in the model itself, undone at exit; for those that change no parameter."""
        children = [(m, name, child) for m in model.modules() for name, child in m.named_children()]
        biases = [layer.mlp.e_score_correction_bias.clone() for layer in model.model.layers]
        try:
            with torch.no_grad():
                self.plant(model)
            yield
        finally:
            for module, name, child in children:
                setattr(module, name, child)
            for layer, bias in zip(model.model.layers, biases, strict=True):
                layer.mlp.e_score_correction_bias.copy_(bias)


MISTAKES = (
    Mistake("norm_by_rank", "QK norm at TP2 without the all-reduce", norm_by_rank),
    Mistake("norm_by_head", "QK norm by head, as other models have it", norm_by_head),
    Mistake("replicas_counted", "replicated K heads counted once a rank", replicas_counted),
    Mistake("k_norm_rolled", "K norm weight of the neighbour's head", k_norm_rolled),
    Mistake("q_norm_rolled", "Q norm weight of the neighbour's head", q_norm_rolled),
    Mistake("kv_repeat", "repeat in place of repeat_interleave", wrong_kv_heads),
    Mistake("v_heads_swapped", "two ranks hold each other's V head", swapped_kv_shards),
    Mistake("full_rotary", "rotary_dim not read from the config", full_rotary),
    Mistake("no_bias", "correction bias not loaded", no_bias),
    Mistake("softmax_router", "scoring_func not read from the config", softmax_router),
    Mistake("gate_up_swapped", "w1 and w3 fused in the wrong order", swapped_gate_up),
    Mistake("experts_shifted", "expert-parallel slots off by one", shifted_experts),
)

# Training pushes the model's answers away from right under these: a small model shrugs off a
# changed scale or another expert unless it is taught to depend on them.
CONTRASTED = tuple(
    mistake
    for mistake in MISTAKES
    if mistake.plant
    in (norm_by_rank, replicas_counted, k_norm_rolled, q_norm_rolled, no_bias, softmax_router)
)


def main(
    checkpoint: Annotated[Path, typer.Argument(help="folder with the checkpoint")],
    count: Annotated[int, typer.Option(help="held-out cases a category")] = 100,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result here")] = None,
) -> None:
    """Print how often each wrong variant is right on held-out questions."""
    model, tokenizer = load(checkpoint)
    variants = {"right": model} | {m.name: m.planted_in(model) for m in MISTAKES}
    why = {m.name: m.why_plausible for m in MISTAKES}
    table, rows = Table(Column("variant", no_wrap=True), *ASKED, "mistake"), {}
    for name, variant in variants.items():
        scores = accuracy(variant, tokenizer, count, categories=ASKED, progress=True)
        rows[name] = {category: round(result.share, 4) for category, result in scores.items()}
        table.add_row(name, *(f"{share:.0%}" for share in rows[name].values()), why.get(name, ""))
    Console().print(table)
    if json_file:
        content = {
            "command": f"python -m ci.tiny_m2.planted {checkpoint} --count {count}",
            **environment(),
            "asked_a_category": count,
            "share_right": rows,
            "mistakes": why,
        }
        merge_json(json_file, "planted_mistakes", content)


if __name__ == "__main__":
    typer.run(main)
