"""Load a checkpoint so that nothing is skipped: every tensor has a slot, every slot one tensor.

SGLang's loaders pad a tensor that is too short and ignore what they do not know, without a word.
Here each (name, tensor) pair is looked up in the table of slots, and the tensor's *full* shape is
compared before SGLang's loader cuts this rank's share out of it. What does not fit is collected and
raised as one LoadError.

The first load must fill every slot. Later ones (weight updates) may bring any part, unless they run
under `complete()`. `problems_of` judges a call and writes nothing, so that ranks can agree first. A
sequence is checked as a whole before the first parameter is touched; from an iterator, which may be
too large to hold, nothing is written after the first problem. No SGLang: parameters are reached
through their `weight_loader` attribute.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from sglang_minimax.config import Architecture
from sglang_minimax.errors import LoadError
from sglang_minimax.loading.arrival import Arrival, ExpertShare
from sglang_minimax.loading.ledger import Ledger, NamedTensors
from sglang_minimax.loading.problems import Problems
from sglang_minimax.loading.slots import Shape, SlotTable, Stage

logger = logging.getLogger(__name__)


class StrictLoader:
    """Fills one rank's model from (name, tensor) pairs, and says no where the pairs do not fit.

    partial: whether weights may have been written since the last complete load, so that they are
    no longer those of a checkpoint.
    """

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
        self._types = {name: parameter.dtype for name, parameter in parameters.items()}
        self._arrival = Arrival(self._slots)
        self._experts = experts
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

    def problems_of(self, weights: NamedTensors, *, complete: bool = False) -> Problems:
        """What a load of `weights` would refuse; nothing is written. Raises LoadError.

        complete: whether they must fill every slot. Tensors on the meta device are judged by name,
        shape and type. The error is for a source that cannot be read.
        """
        ledger = self._ledger()
        for pair in _readable(weights):
            for _ in ledger.check(*pair):
                pass
        if complete:
            ledger.check_complete()
        return ledger.problems

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
        ledger = self._ledger()
        demand_complete = self._first or self._always_complete
        if demand_complete:
            ledger.check_parameters()
        if self._first:
            self._expect_experts(ledger)
        checked = (item for pair in _readable(weights) for item in ledger.check(*pair))
        for item in list(checked) if isinstance(weights, Sequence) else checked:
            # After the first problem the rest is read for the report only.
            if not ledger.problems:
                ledger.write(*item)
        if demand_complete:
            ledger.check_complete()
        if self._first and not ledger.problems:
            for line in self._arrival.untouched(ledger.parameters):
                ledger.problems.add("missing", line)
        if ledger.problems:
            raise ledger.problems.error()
        if demand_complete:
            logger.info("Weights: %s", ledger.summary())
        self._first = False
        self.partial = not demand_complete
        return ledger.written

    def _ledger(self) -> Ledger:
        return Ledger(self._model, self._arch, self._stage, self._slots, self._types)

    def _expect_experts(self, ledger: Ledger) -> None:
        """Before the first load, when the parameters hold nothing yet."""
        if self._experts:
            hidden = self._arch.hidden_size
            for line in self._arrival.lacking(ledger.parameters, self._experts, hidden):
                ledger.problems.add("misshapen", line)
        self._arrival.mark(ledger.parameters)


def _readable(weights: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """The pairs; a file that breaks while it is read is a LoadError."""
    try:
        yield from weights
    except (SafetensorError, OSError) as error:
        raise LoadError(
            f"the weights cannot be read ({error}); check the disk, and copy or download the "
            "checkpoint again."
        ) from error
