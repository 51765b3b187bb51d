"""The slots that the plan knows, against the parameters that SGLang built.

A format may store a tensor that the kernel of this device has no parameter for, and a parameter may
have another type than the checkpoint; both are found here, before anything is read. No SGLang.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from sglang_minimax.loading.formats.base import Shape
from sglang_minimax.loading.names import TensorName
from sglang_minimax.loading.problems import Problems
from sglang_minimax.loading.slots import Slot, Slots, Stage
from sglang_minimax.loading.values import TYPES, spelled

Parameters = Mapping[str, torch.nn.Parameter]

#: Modules whose rows SGLang pads to a multiple of 64.
VOCABULARY = ("embed_tokens", "lm_head")


@dataclass(slots=True)
class _Demand:
    """What the slots ask of one parameter.

    elements: that they fill. shared: of the largest part, where parts may share the room. experts:
    that it must have places for, None where that is open. may_be_larger: whether SGLang may pad it.
    """

    elements: int = 0
    shared: int = 0
    experts: int | None = None
    may_be_larger: bool = False

    def check(self, problems: Problems, parameter: str, shape: Shape) -> None:
        """Enter what is wrong with a parameter of that shape."""
        size = math.prod(shape)
        if self.experts is not None and shape[:1] != (self.experts,):
            expected = f"expected {self.experts} experts"
            problems.add("misshapen", f"{parameter} is {list(shape)}, {expected}")
        elif self.shared == size:
            return
        elif self.elements > size:
            lacking = self.elements - size
            problems.add("misshapen", f"{parameter} is {list(shape)}, {lacking} too small")
        elif self.elements < size and not self.may_be_larger:
            problems.add("missing", f"{size - self.elements} elements of {parameter}")


class Binding:
    """The slots of one rank that have a parameter, and what became of the others.

    unused: records of tensors that this device's kernels do not need.
    """

    def __init__(
        self, slots: Slots, parameters: Parameters, made: Collection[str] = frozenset()
    ) -> None:
        """parameters: as the model was built, before post-processing. made: `SlotTable.made`."""
        self._made = made
        self.slots: Slots = {}
        self.unused: set[TensorName] = set()
        self._shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._types = {name: parameter.dtype for name, parameter in parameters.items()}
        self._loaded = {name for name, p in parameters.items() if hasattr(p, "weight_loader")}
        for name, group in slots.items():
            if group[0].stored.optional and not self._is_loaded(name, group[0].parameter):
                self.unused.add(name)
            else:
                self.slots[name] = group

    def _is_loaded(self, name: TensorName, parameter: str) -> bool:
        # A parameter without a loader is made by its owner, such as a computed scale; but the KV
        # cache's scales are plain ones, with the value that they have without a checkpoint's.
        return parameter in (self._shapes if name.module == "attn" else self._loaded)

    def check_parameters(self, problems: Problems, stage: Stage) -> None:
        """Enter parameters that the slots would leave unwritten, wholly or in part."""
        demands = self._demands(stage)
        for parameter, shape in self._shapes.items():
            demand = demands.get(parameter)
            if demand is not None:
                demand.check(problems, parameter, shape)
            elif parameter in self._loaded and parameter not in self._made:
                problems.add("missing", f"{parameter} (a parameter that no tensor fills)")
        for parameter in demands.keys() - self._shapes.keys():
            problems.add("unexpected", f"{parameter} (the model has no such parameter)")

    def _demands(self, stage: Stage) -> dict[str, _Demand]:
        """parameter -> what the slots ask of it."""
        demands: dict[str, _Demand] = {}
        for name, group in self.slots.items():
            for slot in group:
                demand = demands.setdefault(slot.parameter, _Demand())
                # SGLang pads a vocabulary, and kernels want experts padded.
                demand.may_be_larger |= bool(slot.experts) or name.module in VOCABULARY
                copies = 1
                if slot.experts and name.layer is not None:
                    held = sum(stage.experts(name.layer).values())
                    copies = slot.experts if slot.stored.everywhere else held
                    # Some scales are of all experts, whoever holds them.
                    demand.experts = None if slot.stored.scale else copies
                elements = slot.elements * copies
                demand.elements += elements
                if slot.stored.shared:
                    demand.shared = max(demand.shared, elements)
        return demands

    def obstacle(self, slot: Slot, parameter: torch.nn.Parameter, kind: str) -> str | None:
        """Why a tensor of type `kind` cannot be copied into `parameter`, None where it can.

        A cast to or from a quantised type would lack the scale.
        """
        stored, now, dtype = slot.stored, parameter.dtype, TYPES.get(kind)
        if stored.dimensions or stored.only is not None:
            return None
        built = self._types.get(slot.parameter, now)
        if dtype is None or dtype.is_floating_point != built.is_floating_point:
            return f"is {kind}, expected {spelled(built)}"
        repacked = f"cannot be replaced: its parameter became {now} after loading; restart"
        shape = self._shapes.get(slot.parameter)
        if stored.scale or slot.is_quantised:
            # Kernels repack what is quantised in place, and few can undo it.
            changed = now != built or tuple(parameter.shape) != shape
            if changed:
                return repacked.replace(f"{now}", f"{list(parameter.shape)} of {spelled(now)}")
        if stored.scale:
            return None
        integers = not dtype.is_floating_point
        if dtype != built and not integers and 1 in (dtype.itemsize, built.itemsize):
            return f"is {kind}, expected {spelled(built)}"
        if now != built and (now.itemsize == 1 or not now.is_floating_point):
            return repacked
        return None
