"""What the headers of a checkpoint announce, counted; and what a rank of any cluster takes of it.

The tensors are judged once, as one rank that holds the whole model would: which part of a tensor a
rank takes has no bearing on whether it fits. Experts of a layer and layers are alike for the most
part, so a rank's bytes follow from one expert of one layer. No torch, no SGLang.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from sglang_minimax.config import Architecture
from sglang_minimax.loading.formats.base import Shape, StoredTensor
from sglang_minimax.loading.headers import ITEM_BYTES, Headers, Tensor
from sglang_minimax.loading.ledger import Ledger, Placement
from sglang_minimax.loading.names import TensorName
from sglang_minimax.loading.plan import judged, read_of
from sglang_minimax.loading.problems import Problems
from sglang_minimax.loading.slots import SlotTable, Stage
from sglang_minimax.shards import AttentionShard, Cut


class Kind(NamedTuple):
    """One kind of tensor, over all layers and experts. projection: of experts, else ""."""

    module: str
    projection: str
    kind: str
    type: str


@dataclass(slots=True)
class Count:
    """How many tensors, their bytes, and the shapes that they have."""

    tensors: int = 0
    nbytes: int = 0
    shapes: set[Shape] = field(default_factory=set)

    def add(self, tensor: Tensor) -> None:
        """Count one more."""
        self.tensors += 1
        self.nbytes += tensor.nbytes
        self.shapes.add(tensor.shape)


@dataclass(frozen=True, slots=True)
class Load:
    """What a rank reads and holds, in bytes as the checkpoint stores them.

    read: of the files. held: of those, elements that are the rank's, copies of experts included.
    padding: that experts take beyond these in memory. experts: of `held`, those of experts.
    """

    tensors: int = 0
    read: int = 0
    held: int = 0
    padding: int = 0
    experts: int = 0

    def plus(self, other: Load, times: int = 1) -> Load:
        """This and `times` the other."""
        return Load(
            self.tensors + times * other.tensors,
            self.read + times * other.read,
            self.held + times * other.held,
            self.padding + times * other.padding,
            self.experts + times * other.experts,
        )


@dataclass(slots=True)
class _Like:
    """Tensors of a layer that differ in the expert only. names: expert, None without -> name."""

    sample: Tensor
    stored: StoredTensor
    names: dict[int | None, str] = field(default_factory=dict)


# module, projection, kind, type, shape
_Likeness = tuple[str, str | None, str, str, Shape]


class Census:
    """The tensors of a checkpoint by kind, and every problem that any rank would find.

    kinds: of tensors with a known name. left_out: reason -> those left out on purpose. unknown:
    those whose name says nothing.
    """

    def __init__(self, headers: Headers, arch: Architecture) -> None:
        self.kinds: dict[Kind, Count] = {}
        self.left_out: dict[str, Count] = {}
        self.unknown = Count()
        self.arch = arch
        self._layers: dict[int | None, dict[_Likeness, _Like]] = {}
        stage = _whole(arch)
        ledger = Ledger(arch, stage, SlotTable(arch, stage).build())
        for name, record, tensor, placements in judged(headers, ledger):
            if record is not None and placements:
                self._count(record, tensor)
                self._enter(name, record, tensor, placements[0])
            elif reason := ledger.omission_of(name, record):
                self.left_out.setdefault(reason, Count()).add(tensor)
            elif record is not None:
                self._count(record, tensor)
            else:
                self.unknown.add(tensor)
        self.problems: Problems = ledger.problems
        self._groups = self._alike()

    def _count(self, record: TensorName, tensor: Tensor) -> None:
        kind = Kind(record.module, record.projection or "", record.kind, tensor.kind)
        self.kinds.setdefault(kind, Count()).add(tensor)

    def _enter(self, name: str, record: TensorName, tensor: Tensor, place: Placement) -> None:
        layer, module, kind, expert, projection = record
        in_layer = self._layers.setdefault(layer, {})
        likeness = (module, projection, kind, tensor.kind, tensor.shape)
        like = in_layer.get(likeness)
        if like is None:
            like = in_layer[likeness] = _Like(tensor, place.slot.stored)
        like.names[expert] = name

    def _alike(self) -> dict[int, list[int]]:
        """A layer -> those with the same tensors for the same experts, itself included."""
        groups: dict[frozenset[object], list[int]] = {}
        for layer, likes in self._layers.items():
            if layer is not None:
                items = ((key, like.stored, frozenset(like.names)) for key, like in likes.items())
                groups.setdefault(frozenset(items), []).append(layer)
        return {layers[0]: layers for layers in groups.values()}

    @cached_property
    def even_experts(self) -> bool:
        """Whether every layer has the same of each expert, so that only their number counts."""
        everything = set(range(self.arch.num_experts))
        return all(
            set(like.names) in ({None}, everything)
            for layer in self._groups
            for like in self._layers[layer].values()
        )

    def load_of(self, stage: Stage) -> Load:
        """What the rank of `stage` reads and holds of the tensors that fit."""
        total = self._load(replace(stage, layers=range(0)), None)
        for layer, alike in self._groups.items():
            times = sum(each in stage.layers for each in alike)
            if times:
                one = replace(stage, layers=range(layer, layer + 1), embedding=None, head=None)
                total = total.plus(self._load(one, layer), times)
        return total

    def _load(self, stage: Stage, layer: int | None) -> Load:
        """The same for the tensors of one layer, or of none."""
        ledger = Ledger(self.arch, stage, SlotTable(self.arch, stage).build())
        held = {} if layer is None else stage.experts(layer)
        total = Load()
        for like in self._layers.get(layer, {}).values():
            for name, times in _samples(like.names, held):
                placements = ledger.place(name, like.sample.kind, like.sample.shape)
                total = total.plus(_load_of_one(name, like.sample, placements), times)
        return total


def _samples(names: Mapping[int | None, str], held: Mapping[int, int]) -> Iterator[tuple[str, int]]:
    """(a tensor, how many it stands for): those of experts that a rank holds equally often."""
    if None in names:
        yield names[None], 1
    copies: dict[int, list[str]] = {}
    for expert, name in names.items():
        if expert is not None and expert in held:
            copies.setdefault(held[expert], []).append(name)
    for alike in copies.values():
        yield alike[0], len(alike)


def _load_of_one(name: str, tensor: Tensor, placements: Sequence[Placement]) -> Load:
    read = held = padding = experts = 0
    for placement in placements:
        one = read_of(name, tensor, placement)
        read += one.length
        held += one.boxed_bytes * placement.copies
        if placement.slot.experts:
            experts += one.boxed_bytes * placement.copies
            in_memory = placement.slot.elements * ITEM_BYTES[tensor.kind]
            padding += (in_memory - one.boxed_bytes) * placement.copies
    return Load(int(read > 0), read, held, padding, experts)


def _whole(arch: Architecture) -> Stage:
    """All of the model, whether or not one rank may hold it."""
    experts = dict.fromkeys(range(arch.num_experts), 1)
    vocabulary = Cut.whole(arch.vocab_size)
    return Stage(
        attention=AttentionShard.of(arch, 1, 0),
        layers=range(arch.num_layers),
        embedding=vocabulary,
        head=vocabulary,
        width=Cut.whole(arch.expert_width),
        experts=lambda layer: experts,
    )
