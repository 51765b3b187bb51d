"""The slots of one rank: where each kind of checkpoint tensor goes, and its full shape.

Made from the architecture, from this rank's place, and from the parameters that the model built: a
format's scales have a slot exactly where the model has a parameter that loads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sglang_minimax.config import Architecture
from sglang_minimax.loading.names import KV_SCALES, MATRIX_KINDS, TensorName
from sglang_minimax.topology import AttentionShard, ceil_div

Shape = tuple[int, ...]
SCALARS: tuple[Shape, ...] = ((), (1,))


@dataclass(frozen=True, slots=True)
class Stage:
    """Which part of the model this rank's modules hold.

    layers: of this pipeline stage. embed: whether it has the embedding. head: whether it has the
    last norm and the head.
    """

    attention: AttentionShard
    layers: range
    embed: bool
    head: bool


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one kind of checkpoint tensor goes.

    parameter: its name in the model. shapes: the full shapes it may have in the checkpoint.
    shard: what SGLang's loader calls this part of a packed parameter. experts: for expert tensors,
    how many share this slot, else 0. elements: of the parameter that this slot fills, None where
    the loader may pad.
    """

    parameter: str
    shapes: tuple[Shape, ...]
    shard: str | None = None
    experts: int = 0
    elements: int | None = None
    optional: bool = False


Slots = dict[TensorName, tuple[Slot, ...]]


def full_shapes(rows: int, columns: int, kind: str, block: Shape | None) -> tuple[Shape, ...]:
    """The shapes that a [rows, columns] matrix's `kind` of tensor may have in a checkpoint."""
    if kind == "weight":
        return ((rows, columns),)
    if kind == "weight_scale_inv":
        if block is None:
            return SCALARS
        return ((ceil_div(rows, block[0]), ceil_div(columns, block[1])),)
    if kind == "weight_scale":
        return (*SCALARS, (rows,), (rows, 1))
    return SCALARS


class SlotTable:
    """Builds the slots of one rank; a slot exists where the model has a parameter to load."""

    def __init__(
        self,
        arch: Architecture,
        stage: Stage,
        parameters: Mapping[str, torch.nn.Parameter],
        block: Shape | None,
    ) -> None:
        self.arch = arch
        self.stage = stage
        self.parameters = parameters
        self.block = block
        self.slots: Slots = {}

    def build(self) -> Slots:
        """All slots of this stage, by record (experts share one record with expert None)."""
        arch = self.arch
        table = ((arch.vocab_size, arch.hidden_size),)
        if self.stage.embed:
            self._add(
                TensorName(None, "embed_tokens", "weight"), "model.embed_tokens.weight", table
            )
        if self.stage.head:
            self._add(
                TensorName(None, "norm", "weight"),
                "model.norm.weight",
                ((arch.hidden_size,),),
                elements=arch.hidden_size,
            )
            owner = "embed_tokens" if arch.tie_word_embeddings else "lm_head"
            shared = arch.tie_word_embeddings and "lm_head.weight" not in self.parameters
            if not shared:
                self._add(TensorName(None, owner, "weight"), "lm_head.weight", table)
        for layer in self.stage.layers:
            self._norms(layer)
            self._attention(layer)
            self._router(layer)
            self._experts(layer)
        return self.slots

    def _add(
        self, name: TensorName, parameter: str, shapes: tuple[Shape, ...], **rest: Any
    ) -> None:
        slot = Slot(parameter, shapes, **rest)
        self.slots[name] = (*self.slots.get(name, ()), slot)

    def _vector(self, layer: int, module: str, path: str, full: int, local: int) -> None:
        name = TensorName(layer, module, "weight")
        self._add(name, f"model.layers.{layer}.{path}", ((full,),), elements=local)

    def _norms(self, layer: int) -> None:
        hidden, shard = self.arch.hidden_size, self.stage.attention
        for norm in ("input_layernorm", "post_attention_layernorm"):
            self._vector(layer, norm, f"{norm}.weight", hidden, hidden)
        self._vector(layer, "q_norm", "self_attn.q_norm.weight", shard.q_total, len(shard.q_rows))
        self._vector(layer, "k_norm", "self_attn.k_norm.weight", shard.kv_total, len(shard.kv_rows))

    def _attention(self, layer: int) -> None:
        hidden, shard = self.arch.hidden_size, self.stage.attention
        packed = (
            ("q_proj", "q", shard.q_total, shard.q_width),
            ("k_proj", "k", shard.kv_total, shard.kv_width),
            ("v_proj", "v", shard.kv_total, shard.kv_width),
        )
        for module, part, full, local in packed:
            self._matrix(layer, module, "self_attn.qkv_proj", full, hidden, local * hidden, part)
        self._matrix(
            layer, "o_proj", "self_attn.o_proj", hidden, shard.q_total, hidden * shard.q_width, None
        )
        for scale in KV_SCALES:
            parameter = f"model.layers.{layer}.self_attn.attn.{scale}"
            if parameter in self.parameters:
                self._add(TensorName(layer, "attn", scale), parameter, SCALARS, optional=True)

    def _matrix(
        self,
        layer: int,
        module: str,
        path: str,
        rows: int,
        columns: int,
        elements: int,
        part: str | None,
    ) -> None:
        for kind in MATRIX_KINDS:
            parameter = f"model.layers.{layer}.{path}.{kind}"
            if kind != "weight" and not self._loads(parameter):
                continue
            self._add(
                TensorName(layer, module, kind),
                parameter,
                full_shapes(rows, columns, kind, self.block),
                shard=part,
                elements=elements if kind == "weight" else None,
            )

    def _router(self, layer: int) -> None:
        arch, path = self.arch, "block_sparse_moe"
        self._add(
            TensorName(layer, "gate", "weight"),
            f"model.layers.{layer}.{path}.gate.weight",
            ((arch.num_experts, arch.hidden_size),),
            elements=arch.num_experts * arch.hidden_size,
        )
        bias = "e_score_correction_bias"
        self._vector(layer, bias, f"{path}.{bias}", arch.num_experts, arch.num_experts)

    def _experts(self, layer: int) -> None:
        arch = self.arch
        wide, narrow = (arch.expert_width, arch.hidden_size), (arch.hidden_size, arch.expert_width)
        for projection, packed, matrix in (
            ("w1", "w13", wide),
            ("w3", "w13", wide),
            ("w2", "w2", narrow),
        ):
            for kind in MATRIX_KINDS:
                parameter = f"model.layers.{layer}.block_sparse_moe.experts.{packed}_{kind}"
                if kind != "weight" and not self._loads(parameter):
                    continue
                self._add(
                    TensorName(layer, "experts", kind, None, projection),
                    parameter,
                    full_shapes(*matrix, kind, self.block),
                    shard=projection,
                    experts=arch.num_experts,
                )

    def _loads(self, parameter: str) -> bool:
        """Whether a scale is read from the checkpoint; one that is computed has no loader."""
        return hasattr(self.parameters.get(parameter), "weight_loader")
