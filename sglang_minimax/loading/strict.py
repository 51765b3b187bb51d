"""Load a checkpoint so that nothing is skipped: every tensor has a slot, every slot one tensor.

SGLang's loaders pad a tensor that is too short and ignore what they do not know, without a word.
Here each (name, tensor) pair is looked up in the table of slots, and the tensor's *full* shape is
compared before SGLang's loader cuts this rank's share out of it. What does not fit is collected and
raised as one LoadError.

The first load must fill every slot. Later ones (weight updates) may bring any part, unless they run
under `complete()`. A sequence is checked as a whole before the first parameter is touched; from an
iterator, which may be too large to hold, nothing is written after the first problem. No
SGLang: parameters are reached through their `weight_loader` attribute.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError

from sglang_minimax.config import Architecture
from sglang_minimax.errors import LoadError
from sglang_minimax.loading.arrival import Arrival, ExpertShare
from sglang_minimax.loading.names import (
    KV_SCALES,
    MATRIX_SCALES,
    TensorName,
    omission,
    parse,
    spell,
)
from sglang_minimax.loading.slots import Shape, Slot, Slots, SlotTable, Stage

logger = logging.getLogger(__name__)

NamedTensors = Iterable[tuple[str, torch.Tensor]]

LISTED = 10  # problems of one kind that a message spells out


@dataclass(slots=True)
class Problems:
    """What does not fit, by kind, in the order in which it was found."""

    groups: dict[str, list[str]] = field(default_factory=dict)

    def add(self, group: str, line: str) -> None:
        """Enter one: `missing`, `unexpected`, `duplicate`, `misshapen` or `invalid`."""
        self.groups.setdefault(group, []).append(line)

    def __bool__(self) -> bool:
        return bool(self.groups)

    def error(self) -> LoadError:
        """One sentence with the counts, and the first few of each group under it."""
        counts = ", ".join(f"{len(lines)} {group}" for group, lines in self.groups.items())
        message = [
            f"the weights do not fit the model ({counts}); check that the checkpoint is complete "
            "and that config.json belongs to it."
        ]
        for group, lines in self.groups.items():
            message += [f"  {group}: {line}" for line in lines[:LISTED]]
            if len(lines) > LISTED:
                message.append(f"  {group}: ... and {len(lines) - LISTED} more")
        return LoadError("\n".join(message))


class StrictLoader:
    """Fills one rank's model from (name, tensor) pairs, and says no where the pairs do not fit."""

    def __init__(
        self,
        model: torch.nn.Module,
        arch: Architecture,
        stage: Stage,
        *,
        weight_block: Shape | None = None,
        experts: ExpertShare | None = None,
    ) -> None:
        """Take note of the model's parameters as it was built; post-processing may replace them.

        weight_block: (rows, columns) that share a scale, where the configuration does not say.
        experts: what this rank must hold of them; None leaves that unchecked.
        """
        self._model = model
        self._arch = arch
        self._stage = stage
        parameters = dict(model.named_parameters())
        self._slots = SlotTable(arch, stage, parameters, weight_block or arch.weight_block).build()
        self._arrival = Arrival(self._slots)
        self._experts = experts
        self._first = True
        self._always_complete = False

    def filled_elsewhere(self) -> None:
        """The parameters have their values without us; from now on a load may be partial."""
        self._first = False

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Every load inside must fill every slot, as the first one; afterwards it is as before."""
        before, self._always_complete = self._always_complete, True
        try:
            yield
        finally:
            self._always_complete = before

    def load(self, weights: NamedTensors) -> set[str]:
        """Check and load; return the names of the parameters written. Raises LoadError."""
        call = _Call(self._model, self._arch, self._stage, self._slots)
        demand_complete = self._first or self._always_complete
        if demand_complete:
            call.check_parameters()
        if self._first:
            self._expect_experts(call)
        checked = (item for pair in _readable(weights) for item in call.check(*pair))
        for item in list(checked) if isinstance(weights, Sequence) else checked:
            # After the first problem the rest is read for the report only.
            if not call.problems:
                call.write(*item)
        if demand_complete:
            call.check_complete()
        if self._first and not call.problems:
            for line in self._arrival.untouched(call.parameters):
                call.problems.add("missing", line)
        if call.problems:
            raise call.problems.error()
        if demand_complete:
            logger.info("Weights: %s", call.summary())
        self._first = False
        return call.written

    def _expect_experts(self, call: _Call) -> None:
        """Before the first load, when the parameters hold nothing yet."""
        if self._experts:
            hidden = self._arch.hidden_size
            for line in self._arrival.lacking(call.parameters, self._experts, hidden):
                call.problems.add("misshapen", line)
        self._arrival.mark(call.parameters)


def _readable(weights: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """The pairs; a file that breaks while it is read is a LoadError."""
    try:
        yield from weights
    except (SafetensorError, OSError) as error:
        raise LoadError(
            f"the weights cannot be read ({error}); check the disk, and copy or download the "
            "checkpoint again."
        ) from error


class _Call:
    """The ledger of one load."""

    def __init__(
        self, model: torch.nn.Module, arch: Architecture, stage: Stage, slots: Slots
    ) -> None:
        self.arch = arch
        self.stage = stage
        self.slots = slots
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
        invalid = _invalid_values(record, tensor)
        if invalid:
            self.problems.add("invalid", f"{name} {invalid}")
            return ()
        return slots

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


def _invalid_values(record: TensorName, tensor: torch.Tensor) -> str | None:
    """What is wrong with a tensor's values or type, None when nothing is."""
    if record.kind not in MATRIX_SCALES and record.kind not in KV_SCALES:
        return None if tensor.is_floating_point() else f"is {tensor.dtype}, expected a float type"
    # A NaN makes both comparisons false.
    low, high = torch.aminmax(tensor.float())
    if low > 0 and high < float("inf"):
        return None
    return f"has scales from {low.item()} to {high.item()}, expected finite numbers above 0"
