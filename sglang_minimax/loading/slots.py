"""The slots of one rank: where each kind of checkpoint tensor goes, and how much of it.

Made from the architecture, the checkpoint's recipe and a rank's place alone, so that it can be
asked for any rank of any cluster. A slot speaks of one matrix; what a checkpoint packs or stacks is
taken apart by the ledger. No torch, no SGLang.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from sglang_minimax.config import Architecture
from sglang_minimax.loading.formats.base import (
    COLUMNS,
    FLOATS,
    PLAIN,
    ROWS,
    SCALE_TYPES,
    Axis,
    Format,
    Shape,
    StoredTensor,
)
from sglang_minimax.loading.names import KV_SCALES, TensorName
from sglang_minimax.topology import AttentionShard, Cut, RankShare, Topology, expert_cut

#: layer -> the experts of that layer on this rank, and how many copies of each it holds.
ExpertPlaces = Callable[[int], Mapping[int, int]]

SCALAR = StoredTensor("scale", (), SCALE_TYPES, scale=True, optional=True)
VECTOR = StoredTensor("weight", (Axis(ROWS),), FLOATS)


@dataclass(frozen=True)
class Stage:
    """Which part of the model one rank holds.

    embedding, head: rows of the vocabulary, None on a stage without that module. width: of each
    expert. kv_scales: whether the KV cache is quantised, so that its scales have a place.
    stored: layer -> its experts on this rank in the order of their storage, None if not known.
    """

    attention: AttentionShard
    layers: range
    embedding: Cut | None
    head: Cut | None
    width: Cut
    experts: ExpertPlaces
    kv_scales: bool = False
    stored: Callable[[int], Sequence[int]] | None = None

    @classmethod
    def of(cls, arch: Architecture, topology: Topology, share: RankShare) -> Stage:
        """The stage of a rank where experts are placed in order, as without rebalancing."""
        stored = [expert % arch.num_experts for expert in share.experts]
        held = Counter(stored)
        return cls(
            attention=share.attention,
            layers=share.layers,
            embedding=_rows(share.embedding_rows, arch),
            head=_rows(share.head_rows, arch),
            width=expert_cut(
                arch.expert_width, topology.moe_tp, share.moe_tp_rank, arch.expert_unit
            ),
            experts=lambda layer: held,
            stored=lambda layer: stored,
        )


def _rows(rows: range | None, arch: Architecture) -> Cut | None:
    return None if rows is None else Cut.even(rows, arch.vocab_size)


@dataclass(frozen=True)
class Slot:
    """Where one kind of tensor of one matrix goes.

    parameter: its name in the model. shard: what SGLang's loader calls this part of a packed one.
    rows, columns: this rank's part of the matrix; a vector has columns of one. experts: how many of
    the model share this slot, 0 where it is not an expert's.
    """

    parameter: str
    stored: StoredTensor
    rows: Cut
    columns: Cut
    shard: str | None = None
    experts: int = 0

    @cached_property
    def shape(self) -> Shape:
        """The shape in the checkpoint."""
        return self.stored.shape(self.rows.total, self.columns.total)

    @cached_property
    def cuts(self) -> tuple[Cut, ...]:
        """This rank's part of each dimension of the stored tensor."""
        cuts = []
        for axis in self.stored.axes:
            cut = {ROWS: self.rows, COLUMNS: self.columns}.get(axis.along or "")
            if cut is None or axis.whole:
                cuts.append(Cut.whole(axis.extent(self.rows.total, self.columns.total)))
                continue
            total = axis.extent(cut.total, cut.total)
            # A rank without lines may stand at an end that is no whole element.
            lines = axis.part(cut.lines, cut.total) if cut.lines else range(total, total)
            if cut.is_padded:
                width, first, over = (-(-n // axis.per) for n in (cut.width, cut.first, cut.over))
                cuts.append(Cut(lines, total, width, first, over))
            else:
                cuts.append(Cut.even(lines, total))
        return tuple(cuts)

    @cached_property
    def box(self) -> tuple[range, ...]:
        """The elements of the checkpoint's tensor that this rank needs."""
        return tuple(cut.lines for cut in self.cuts)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix in the checkpoint."""
        return self.rows.total, self.columns.total

    @property
    def is_quantised(self) -> bool:
        """Whether it is one of several tensors that stand for a matrix."""
        return not self.stored.types <= FLOATS

    @cached_property
    def is_padded(self) -> bool:
        """Whether this rank's part is larger in memory than in the checkpoint."""
        return any(cut.is_padded for cut in self.cuts)

    @property
    def elements(self) -> int:
        """Elements of the parameter that one tensor fills, padding included."""
        count = 1
        for cut in self.cuts:
            count *= cut.width
        return count


#: A tensor may go to several places: a tied embedding that the head cuts in another way.
Slots = dict[TensorName, tuple[Slot, ...]]


class SlotTable:
    """Builds the slots of one rank. Experts share one record, with expert None.

    made: names of parameters that SGLang may have and fills itself.
    """

    def __init__(self, arch: Architecture, stage: Stage) -> None:
        self.arch = arch
        self.stage = stage
        self.slots: Slots = {}
        self.made: set[str] = set()

    def build(self) -> Slots:
        """All slots of this stage, in the order of the model."""
        arch, stage = self.arch, self.stage
        hidden = Cut.whole(arch.hidden_size)
        if stage.embedding is not None:
            self._add(None, "embed_tokens", "model.embed_tokens", PLAIN, stage.embedding, hidden)
        for layer in stage.layers:
            self._norms(layer)
            self._attention(layer)
            self._router(layer)
            self._experts(layer)
        if stage.head is not None:
            self._vector(None, "norm", "model.norm.weight", hidden)
            if not arch.tie_word_embeddings:
                self._add(None, "lm_head", "lm_head", PLAIN, stage.head, hidden)
            elif stage.head != stage.embedding:
                self._add(None, "embed_tokens", "lm_head", PLAIN, stage.head, hidden)
        return self.slots

    def _enter(self, name: TensorName, slot: Slot) -> None:
        self.slots[name] = (*self.slots.get(name, ()), slot)

    def _add(
        self,
        layer: int | None,
        module: str,
        path: str,
        form: Format,
        rows: Cut,
        columns: Cut,
        shard: str | None = None,
    ) -> None:
        for stored in form.tensors:
            slot = Slot(f"{path}.{stored.kind}", stored, rows, columns, shard)
            self._enter(TensorName(layer, module, stored.kind), slot)
        self.made.update(f"{path}.{kind}" for kind in form.made)

    def _vector(self, layer: int | None, module: str, parameter: str, cut: Cut) -> None:
        self._enter(TensorName(layer, module, "weight"), Slot(parameter, VECTOR, cut, Cut.whole(1)))

    def _norms(self, layer: int) -> None:
        path, shard = f"model.layers.{layer}", self.stage.attention
        for norm in ("input_layernorm", "post_attention_layernorm"):
            self._vector(layer, norm, f"{path}.{norm}.weight", Cut.whole(self.arch.hidden_size))
        q, k = Cut.even(shard.q_rows, shard.q_total), Cut.even(shard.kv_rows, shard.kv_total)
        self._vector(layer, "q_norm", f"{path}.self_attn.q_norm.weight", q)
        self._vector(layer, "k_norm", f"{path}.self_attn.k_norm.weight", k)

    def _attention(self, layer: int) -> None:
        shard, path = self.stage.attention, f"model.layers.{layer}.self_attn"
        q, kv = Cut.even(shard.q_rows, shard.q_total), Cut.even(shard.kv_rows, shard.kv_total)
        hidden = Cut.whole(self.arch.hidden_size)
        for module, part, rows in (("q_proj", "q", q), ("k_proj", "k", kv), ("v_proj", "v", kv)):
            form = self._format(f"{path}.{module}")
            self._add(layer, module, f"{path}.qkv_proj", form, rows, hidden, part)
        self._add(layer, "o_proj", f"{path}.o_proj", self._format(f"{path}.o_proj"), hidden, q)
        if self.stage.kv_scales:
            one = Cut.whole(1)
            for scale in KV_SCALES:
                slot = Slot(f"{path}.attn.{scale}", SCALAR, one, one)
                self._enter(TensorName(layer, "attn", scale), slot)

    def _router(self, layer: int) -> None:
        path, experts = f"model.layers.{layer}.block_sparse_moe", Cut.whole(self.arch.num_experts)
        hidden = Cut.whole(self.arch.hidden_size)
        self._add(layer, "gate", f"{path}.gate", PLAIN, experts, hidden)
        bias = "e_score_correction_bias"
        self._vector(layer, bias, f"{path}.{bias}", experts)

    def _experts(self, layer: int) -> None:
        arch, path = self.arch, f"model.layers.{layer}.block_sparse_moe.experts"
        width, hidden = self.stage.width, Cut.whole(arch.hidden_size)
        form = self._format(path)
        for projection, packed, rows, columns in (
            ("w1", "w13", width, hidden),
            ("w3", "w13", width, hidden),
            ("w2", "w2", hidden, width),
        ):
            for stored in form.tensors:
                name = TensorName(layer, "experts", stored.kind, None, projection)
                parameter = f"{path}.{packed}_{stored.kind}"
                slot = Slot(parameter, stored, rows, columns, projection, arch.num_experts)
                self._enter(name, slot)
            self.made.update(f"{path}.{packed}_{kind}" for kind in form.made)

    def _format(self, module: str) -> Format:
        return self.arch.recipe.format_of(module)
