"""Load a checkpoint so that nothing is skipped: every tensor has a slot, every slot one tensor.

SGLang's loaders pad a tensor that is too short and ignore what they do not know, without a word.
Here every name, type and shape goes through the ledger first, SGLang's loaders get exactly this
rank's share (`shares.Share`), and a share that a loader did not take is an error. What does not fit
is collected and raised as one LoadError.

Weights come in two ways. From files (`CheckpointFiles`), a plan says what is read, and is judged
before the first byte. In memory, as whole tensors, they are judged here; a sequence as a whole
before the first parameter is touched, an iterator, which may be too large to hold, until the first
problem. The first load must fill every slot. Later ones (weight updates) may bring any part, unless
they run under `complete()`. No SGLang: parameters are reached through their `weight_loader`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError

from sglang_minimax.config import Architecture
from sglang_minimax.errors import LoadError
from sglang_minimax.loading.binding import Binding
from sglang_minimax.loading.headers import Headers, read_headers, without_collector
from sglang_minimax.loading.ledger import Ledger, Placement
from sglang_minimax.loading.places import Places
from sglang_minimax.loading.plan import Plan, make_plan
from sglang_minimax.loading.planned import CheckpointFiles, PlannedWeights
from sglang_minimax.loading.problems import Problems
from sglang_minimax.loading.shares import share_of
from sglang_minimax.loading.slots import SlotTable, Stage
from sglang_minimax.loading.values import SharedValues, header_type, invalid_values

logger = logging.getLogger(__name__)

NamedTensors = Iterable[tuple[str, torch.Tensor]]


class StrictLoader:
    """Fills one rank's model from (name, tensor) pairs, and says no where the pairs do not fit.

    partial: whether weights may have been written since the last complete load, so that they are
    no longer those of a checkpoint.
    """

    def __init__(self, model: torch.nn.Module, arch: Architecture, stage: Stage) -> None:
        """Take note of the model's parameters as it was built; post-processing may replace them."""
        self._modules = dict(model.named_modules())
        self._arch = arch
        self._stage = stage
        table = SlotTable(arch, stage)
        slots = table.build()
        self._binding = Binding(slots, dict(model.named_parameters()), table.made)
        self._first = True
        self._always_complete = False
        self._failure: LoadError | None = None
        self.partial = False

    def filled_elsewhere(self) -> None:
        """The parameters have their values without us; from now on a load may be partial."""
        self._first = False
        self.partial = True

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Every load inside must fill every slot, as the first one; afterwards it is as before.

        After a failure inside, further loads inside fail at once and read nothing: SGLang tries
        the same source once more.
        """
        before, self._always_complete = self._always_complete, True
        try:
            yield
        finally:
            self._always_complete, self._failure = before, None

    def plan(self, headers: Headers) -> Plan:
        """What this rank reads of files, with everything that speaks against it."""
        plan = make_plan(
            headers, self._arch, self._stage, self._binding.slots, self._binding.unused
        )
        self._binding.check_parameters(plan.problems, self._stage)
        sound: set[tuple[str, str]] = set()
        for read in plan.reads:
            what = read.placement.slot.parameter, read.tensor.kind
            if what not in sound and self._check_type(
                plan.problems, read.name, read.tensor.kind, read.placement
            ):
                sound.add(what)
        return plan

    def problems_of(self, weights: NamedTensors, *, complete: bool = False) -> Problems:
        """What a load of `weights` would refuse; nothing is written. Raises LoadError.

        complete: whether they must fill every slot. Tensors on the meta device are judged by name,
        shape and type. The error is for a source that cannot be read.
        """
        ledger, shared = self._ledger(), SharedValues()
        for name, tensor in _readable(weights):
            if isinstance(tensor, CheckpointFiles):
                return self._problems_of_files(tensor)
            self._placed(ledger, shared, name, tensor)
        if complete:
            ledger.check_complete()
        return ledger.problems

    def _problems_of_files(self, files: CheckpointFiles) -> Problems:
        """From the headers; scales, which are small and whose values are judged, are read."""
        plan = self.plan(read_headers(files.files))
        judged = replace(plan, reads=[r for r in plan.reads if r.placement.slot.stored.judged])
        shared = SharedValues()
        if not plan.problems:
            for read, held in PlannedWeights(judged, files.options).pieces():
                slot = read.placement.slot
                invalid = invalid_values(slot.stored, held, slot.matrix)
                if invalid := invalid or shared.conflict(read.name, read.placement, held):
                    plan.problems.add("invalid", f"{read.name} {invalid}")
        return plan.problems

    def load(self, weights: NamedTensors) -> set[str]:
        """Check and load; return the names of the parameters written. Raises LoadError."""
        if self._failure:
            raise self._failure
        try:
            return self._load(weights)
        except LoadError as error:
            if self._always_complete:
                self._failure = error
            raise

    def _load(self, weights: NamedTensors) -> set[str]:
        ledger, demand_complete = self._ledger(), self._first or self._always_complete
        shared, places = SharedValues(), Places(self._stage)
        written: set[str] = set()
        from_files = False
        if demand_complete:
            self._binding.check_parameters(ledger.problems, self._stage)
        for name, tensor in self._judged(ledger, weights):
            if isinstance(tensor, CheckpointFiles):
                written |= self._load_files(tensor)
                from_files = True
                continue
            judged = isinstance(weights, Sequence)
            for placement in self._placed(ledger, shared, name, tensor, judged=judged):
                # After the first problem the rest is read for the report only.
                if not ledger.problems:
                    held = tensor[tuple(slice(part.start, part.stop) for part in placement.box)]
                    written.add(self._write(places, placement, held, name))
        if demand_complete and not from_files:
            ledger.check_complete()
        if ledger.problems:
            raise ledger.problems.error()
        if demand_complete and not from_files:
            logger.info("Weights: %s", ledger.summary())
        self._first = False
        self.partial = not (demand_complete or from_files)
        return written

    def _load_files(self, files: CheckpointFiles) -> set[str]:
        """All of a checkpoint, which is judged before its first byte is read."""
        with without_collector():
            plan = self._plan_of(files)
        if problems := files.options.agree(plan.problems):
            error = problems.error()
            error.is_of_all_ranks = True
            raise error
        weights = PlannedWeights(plan, files.options)
        places = Places(self._stage)
        written = {self._write(places, read.placement, held, read.name) for read, held in weights}
        logger.info("Weights: %s; %s", plan.ledger.summary(), weights.costs())
        return written

    def _plan_of(self, files: CheckpointFiles) -> Plan:
        """The plan; headers that cannot be read are a problem of it, for all ranks to hear of."""
        try:
            return self.plan(read_headers(files.files))
        except LoadError as error:
            ledger = self._ledger()
            ledger.problems.say(str(error))
            return Plan([], ledger.problems, ledger)

    def _judged(self, ledger: Ledger, weights: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
        """The pairs; those of a sequence are all judged before the first one comes out."""
        if isinstance(weights, Sequence):
            complete = self._first or self._always_complete
            if problems := self.problems_of(weights, complete=complete):
                raise problems.error()
        yield from _readable(weights)

    def _ledger(self) -> Ledger:
        return Ledger(self._arch, self._stage, self._binding.slots, self._binding.unused)

    def _placed(
        self,
        ledger: Ledger,
        shared: SharedValues,
        name: str,
        tensor: torch.Tensor,
        judged: bool = False,
    ) -> list[Placement]:
        """Where a tensor in memory goes; [] where nowhere, or where it is refused.

        judged: whether its values have been looked at already.
        """
        kind = header_type(tensor)
        placements = ledger.place(name, kind, tuple(tensor.shape))
        for placement in placements:
            if not self._check_type(ledger.problems, name, kind, placement):
                return []
        for placement in () if judged else placements:
            slot = placement.slot
            box = tensor[tuple(slice(part.start, part.stop) for part in placement.box)]
            invalid = invalid_values(slot.stored, box, slot.matrix)
            if invalid := invalid or shared.conflict(name, placement, box):
                ledger.problems.add("invalid", f"{name} {invalid}")
                return []
        return placements

    def _check_type(self, problems: Problems, name: str, kind: str, placement: Placement) -> bool:
        slot = placement.slot
        parameter = self._parameter(slot.parameter)
        if parameter is None:
            problems.add("unexpected", f"{name} (the model has no parameter {slot.parameter})")
            return False
        reason = self._binding.obstacle(slot, parameter, kind)
        if reason:
            problems.add("invalid", f"{name} {reason}")
        return not reason

    def _parameter(self, name: str) -> torch.nn.Parameter | None:
        """A parameter as it is now: post-processing replaces them, in the same module."""
        path, _, attribute = name.rpartition(".")
        module = self._modules.get(path)
        return None if module is None else module._parameters.get(attribute)

    def _write(self, places: Places, placement: Placement, held: torch.Tensor, label: str) -> str:
        """Let the parameter's loader take this rank's share; return the parameter's name."""
        slot = placement.slot
        self.partial = True  # until the load has ended well
        parameter = self._parameter(slot.parameter)
        if parameter is None:
            raise LoadError(f"{label}: the model has no parameter {slot.parameter} any more.")
        if places.put(parameter, placement, held):
            return slot.parameter
        loader: Any = getattr(parameter, "weight_loader", None)
        if loader is None:
            # A scalar is written as [] or as [1]; both have passed the comparison of shapes.
            share = share_of(placement, held, label)
            parameter.data.copy_(share.held.reshape(parameter.shape))
            return slot.parameter
        if slot.experts:
            share = places.load(parameter, loader, placement, held, label)
        else:
            share = share_of(placement, held, label)
            loader(parameter, share, *([slot.shard] if slot.shard else []))
        if share.taken < placement.copies:
            raise LoadError(
                f"{share.label}: SGLang's loader took {share.taken} of {placement.copies} copies "
                "that this rank holds; report this to sglang-minimax."
            )
        return slot.parameter


def _readable(weights: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """The pairs; a file that breaks while it is read is a LoadError."""
    try:
        yield from weights
    except (SafetensorError, OSError) as error:
        raise LoadError(
            f"the weights cannot be read ({error}); check the disk, and copy or download the "
            "checkpoint again."
        ) from error
