"""The ledger of one load: which tensor fills what, and what does not fit.

Looking (`check`) and writing (`write`) are apart, so that a whole call can be judged, on every
rank, before the first byte of a parameter changes. Tensors on the meta device stand for announced
ones: their names, shapes and types are judged, their values are not there yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from sglang_minimax.config import Architecture
from sglang_minimax.loading.names import (
    KV_SCALES,
    MATRIX_SCALES,
    TensorName,
    omission,
    parse,
    spell,
)
from sglang_minimax.loading.problems import Problems
from sglang_minimax.loading.slots import Shape, Slot, Slots, Stage

NamedTensors = Iterable[tuple[str, torch.Tensor]]
Types = Mapping[str, torch.dtype]

SCALES = frozenset({*MATRIX_SCALES, *KV_SCALES})


class Ledger:
    """The ledger of one load on one rank."""

    def __init__(
        self, model: torch.nn.Module, arch: Architecture, stage: Stage, slots: Slots, types: Types
    ) -> None:
        """types: of the parameters as the model was built, before any post-processing."""
        self.arch = arch
        self.stage = stage
        self.slots = slots
        self.types = types
        self.parameters = dict(model.named_parameters())
        self.seen: set[TensorName] = set()
        self.problems = Problems()
        self.written: set[str] = set()
        self.elsewhere = 0
        self.omitted: dict[str, int] = {}

    def check(
        self, name: str, tensor: torch.Tensor
    ) -> Iterator[tuple[Slot, TensorName, torch.Tensor]]:
        """Yield what a tensor fills, after every check; report it and yield nothing otherwise."""
        arch = self.arch
        record = parse(name)
        reason = omission(
            name, num_layers=arch.num_layers, num_mtp_modules=arch.num_mtp_modules
        ) or self._left_out(record)
        if reason:
            self.omitted[reason] = self.omitted.get(reason, 0) + 1
            return
        if record is None:
            self.problems.add("unexpected", name)
            return
        for part, share in self._unstacked(name, record, tensor):
            if self._belongs_elsewhere(part):
                self.elsewhere += 1
                continue
            if part in self.seen:
                self.problems.add("duplicate", name)
                return
            self.seen.add(part)
            for slot in self._fitting(name, part, share):
                yield slot, part, share

    def _left_out(self, record: TensorName | None) -> str | None:
        if record is None:
            return None
        if record.module == "lm_head" and self.arch.tie_word_embeddings:
            return "the head is tied to the embedding"
        if record.module == "attn" and record.layer in self.stage.layers:
            return None if record in self.slots else "KV scales without a quantised KV cache"
        return None

    def _unstacked(
        self, name: str, record: TensorName, tensor: torch.Tensor
    ) -> Iterator[tuple[TensorName, torch.Tensor]]:
        """A tensor of all experts, one expert and projection at a time; any other as it is."""
        if record.module != "experts" or record.expert is not None:
            yield record, tensor
            return
        arch = self.arch
        parts = ("w1", "w3") if record.projection == "gate_up" else ("w2",)
        each = arch.expert_width if record.projection == "gate_up" else arch.hidden_size
        columns = arch.hidden_size if record.projection == "gate_up" else arch.expert_width
        shape = (arch.num_experts, len(parts) * each, columns)
        if tuple(tensor.shape) != shape:
            self._misshapen(name, tensor, (shape,))
            return
        for expert in range(arch.num_experts):
            for i, projection in enumerate(parts):
                part = record._replace(expert=expert, projection=projection)
                yield part, tensor[expert, i * each : (i + 1) * each]

    def _belongs_elsewhere(self, record: TensorName) -> bool:
        """Whether another pipeline stage holds this tensor."""
        if record.layer is not None:
            return record.layer not in self.stage.layers and record.layer < self.arch.num_layers
        if record in self.slots:
            return False
        return not (self.stage.embed if record.module == "embed_tokens" else self.stage.head)

    def _fitting(self, name: str, record: TensorName, tensor: torch.Tensor) -> tuple[Slot, ...]:
        """The slots of a tensor whose expert, shape and values are right; none otherwise."""
        slots = self.slots.get(record._replace(expert=None))
        if slots is None or (record.expert or 0) >= max(slots[0].experts, 1):
            self.problems.add("unexpected", name)
            return ()
        if tuple(tensor.shape) not in slots[0].shapes:
            self._misshapen(name, tensor, slots[0].shapes)
            return ()
        absent = [slot.parameter for slot in slots if slot.parameter not in self.parameters]
        if absent:
            self.problems.add("unexpected", f"{name} (the model has no parameter {absent[0]})")
            return ()
        invalid = invalid_values(record.kind, tensor) or self._invalid_type(record, slots, tensor)
        if invalid:
            self.problems.add("invalid", f"{name} {invalid}")
            return ()
        return slots

    def _invalid_type(
        self, record: TensorName, slots: tuple[Slot, ...], tensor: torch.Tensor
    ) -> str | None:
        """Why a weight's type does not fit: a cast to or from FP8 would lack the scale."""
        if record.kind in SCALES:
            return None
        for slot in slots:
            now = self.parameters[slot.parameter].dtype
            built = self.types.get(slot.parameter, now)
            if (tensor.itemsize == 1 or built.itemsize == 1) and tensor.dtype != built:
                return f"is {tensor.dtype}, expected {built}"
            if now != built and (now.itemsize == 1 or not now.is_floating_point):
                return f"cannot be replaced: its parameter became {now} after loading; restart"
        return None

    def _misshapen(self, name: str, tensor: torch.Tensor, shapes: tuple[Shape, ...]) -> None:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        self.problems.add("misshapen", f"{name} is {list(tensor.shape)}, expected {wanted}")

    def write(self, slot: Slot, name: TensorName, tensor: torch.Tensor) -> None:
        """Let the parameter's loader cut this rank's share and copy it."""
        parameter = self.parameters[slot.parameter]
        loader: Any = getattr(parameter, "weight_loader", _copy_whole)
        if slot.experts:
            # The loader finds out by itself whether, and how often, this rank holds the expert.
            loader(parameter, tensor, slot.parameter, shard_id=slot.shard, expert_id=name.expert)
        elif slot.shard:
            loader(parameter, tensor, slot.shard)
        else:
            loader(parameter, tensor)
        self.written.add(slot.parameter)

    def check_parameters(self) -> None:
        """Report parameters that the slots would leave unwritten, wholly or in part."""
        covered: dict[str, int] = {}
        uncounted: set[str] = set()
        for slot in (slot for slots in self.slots.values() for slot in slots):
            covered[slot.parameter] = covered.get(slot.parameter, 0) + (slot.elements or 0)
            if slot.elements is None:
                uncounted.add(slot.parameter)
        for name, parameter in self.parameters.items():
            if name not in covered:
                # A parameter without a loader is made by its owner, such as a computed scale.
                if hasattr(parameter, "weight_loader"):
                    self.problems.add("missing", f"{name} (a parameter that no tensor fills)")
            elif name not in uncounted and covered[name] != parameter.numel():
                lacking = parameter.numel() - covered[name]
                self.problems.add("missing", f"{lacking} elements of {name}")
        for name in covered.keys() - self.parameters.keys():
            self.problems.add("unexpected", f"{name} (the model has no such parameter)")

    def check_complete(self) -> None:
        """Report the slots that nothing filled."""
        for name, slots in self.slots.items():
            if slots[0].optional:
                continue
            for expert in range(slots[0].experts) if slots[0].experts else (None,):
                record = name._replace(expert=expert)
                if record not in self.seen:
                    self.problems.add("missing", spell(record))

    def summary(self) -> str:
        """Counts for the log."""
        counts = [f"{len(self.seen)} tensors loaded"]
        if self.elsewhere:
            counts.append(f"{self.elsewhere} for other pipeline stages")
        counts += [f"{count} left out ({reason})" for reason, count in self.omitted.items()]
        return ", ".join(counts)


def _copy_whole(parameter: torch.nn.Parameter, tensor: torch.Tensor) -> None:
    # A scalar is written as [] or as [1]; both have passed the comparison of shapes.
    parameter.data.copy_(tensor.reshape(parameter.shape))


def invalid_values(kind: str, tensor: torch.Tensor) -> str | None:
    """What is wrong with the values or the type of a `kind` of tensor, None when nothing is."""
    if kind not in SCALES:
        return None if tensor.is_floating_point() else f"is {tensor.dtype}, expected a float type"
    if tensor.is_meta:
        return None
    # A NaN makes both comparisons false.
    low, high = torch.aminmax(tensor.float())
    if low > 0 and high < float("inf"):
        return None
    return f"has scales from {low.item()} to {high.item()}, expected finite numbers above 0"


def direct_problems(
    parameters: Mapping[str, torch.nn.Parameter], weights: NamedTensors
) -> Problems:
    """What does not fit where tensors are copied as they are into parameters of the same name.

    Each must have the shape of this rank's parameter, and its type where either is of one byte.
    """
    problems, seen = Problems(), set()
    for name, tensor in weights:
        parameter = parameters.get(name)
        if parameter is None:
            problems.add("unexpected", f"{name} (the model has no such parameter)")
        elif name in seen:
            problems.add("duplicate", name)
        elif tensor.shape != parameter.shape:
            problems.add(
                "misshapen", f"{name} is {list(tensor.shape)}, expected {list(parameter.shape)}"
            )
        elif tensor.dtype != parameter.dtype and 1 in (tensor.itemsize, parameter.itemsize):
            problems.add("invalid", f"{name} is {tensor.dtype}, expected {parameter.dtype}")
        elif invalid := invalid_values(name.rpartition(".")[2], tensor):
            problems.add("invalid", f"{name} {invalid}")
        seen.add(name)
    return problems
