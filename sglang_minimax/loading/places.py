"""Where SGLang's loader puts an expert: learned from the first, then the others are copied there.

The loader takes longer to find the place of a small tensor than the copy takes, and the places of
two experts differ by the expert alone. So the first expert of each part of a parameter goes through
the loader under watch. If nothing but copies into that expert's own part of the parameter happened,
the others are copied to the same place in theirs; but for one at an end of the parameter, which
goes through the loader again and must land where it would have been put. Where experts are not
stored in order, every expert's w2 does.

Whatever else is seen (padding, values that are looked at, a loader not FusedMoE's own) leaves
all experts to the loader. Good for one load: what follows it may replace parameters. No SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_minimax.errors import LoadError
from sglang_minimax.loading.ledger import Placement
from sglang_minimax.loading.shares import Share, padded, share_of
from sglang_minimax.loading.slots import Slot, Stage

aten: Any = torch.ops.aten

#: The loader whose source we know to keep no books of its own; others are called for each tensor.
LOADER = "FusedMoE.weight_loader"

#: What a loader may do besides copying shares: none of these writes, or tells Python a value.
HARMLESS = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.detach.default,
        aten.permute.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
        aten._to_copy.default,
    }
)

Stored = Mapping[int, tuple[int, ...]]


class Layout(NamedTuple):
    """Where a box lies within one expert's part of a parameter.

    offset: of its first element. strides: elements between neighbours, for each of its dimensions.
    """

    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the experts of one slot go.

    arrives, held: shape of the box as it is read, and as its slot has it, padding left out. boxes:
    the parameter's memory as [local expert, *box]. checked: experts that the loader gets too.
    """

    slot: Slot  # kept alive, because places are found by its identity
    parameter: torch.nn.Parameter
    address: int
    arrives: torch.Size
    held: torch.Size
    dtype: torch.dtype
    is_padded: bool
    layout: Layout
    boxes: torch.Tensor
    stored: Stored
    checked: frozenset[int]


class Places:
    """The places of experts on one rank, in one load."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._stored: dict[int, Stored] = {}
        self._known: dict[int, _Place | None] = {}

    def put(self, parameter: torch.nn.Parameter, placement: Placement, box: torch.Tensor) -> bool:
        """Copy the box of a placement to where the loader would; False where that is not known."""
        place = self._known.get(id(placement.slot))
        if (
            place is None
            or place.parameter is not parameter
            or placement.record.expert in place.checked
            or place.arrives != box.shape
            or place.dtype != box.dtype
            or place.address != parameter.data_ptr()
        ):
            return False
        if place.held != place.arrives:
            box = box.reshape(place.held)
        if place.is_padded:
            box = padded(box, place.slot)
        for index in place.stored[placement.record.expert or 0]:
            place.boxes[index].copy_(box)
        return True

    def load(
        self,
        parameter: torch.nn.Parameter,
        loader: Callable[..., None],
        placement: Placement,
        box: torch.Tensor,
        label: str,
    ) -> Share:
        """Let the loader take a share, and learn from it. Raises LoadError for a surprise."""
        slot, expert = placement.slot, placement.record.expert
        place = self._known.get(id(slot))
        is_first = id(slot) not in self._known and _is_known(loader)
        is_checked = place is not None and expert in place.checked
        watch = _Watch() if is_first or is_checked else None
        share = share_of(placement, box, label, watched=watch is not None)
        if watch is None:
            loader(parameter, share, slot.parameter, shard_id=slot.shard, expert_id=expert)
            return share
        with watch:
            loader(parameter, share, slot.parameter, shard_id=slot.shard, expert_id=expert)
        stored = self._stored_in(placement.record.layer or 0)
        layout = watch.layout(parameter.data, stored.get(-1 if expert is None else expert, ()))
        if is_first:
            self._known[id(slot)] = layout and _place(
                parameter, placement, box, share, layout, stored
            )
        elif place is not None and (layout != place.layout or place.parameter is not parameter):
            raise LoadError(
                f"{label}: SGLang's loader puts it at {layout}, but another expert of the same "
                f"parameter at {place.layout}; report this to sglang-minimax."
            )
        return share

    def _stored_in(self, layer: int) -> Stored:
        """expert -> where this rank stores it; empty where that is not known."""
        stored = self._stored.get(layer)
        if stored is None:
            found: dict[int, tuple[int, ...]] = {}
            for index, expert in enumerate(self._stage.stored(layer) if self._stage.stored else ()):
                found[expert] = (*found.get(expert, ()), index)
            stored = self._stored[layer] = found
        return stored


def _is_known(loader: Callable[..., None]) -> bool:
    function = getattr(loader, "__func__", None)
    return getattr(function, "__qualname__", "") == LOADER and not hasattr(function, "__wrapped__")


def _place(
    parameter: torch.nn.Parameter,
    placement: Placement,
    box: torch.Tensor,
    share: Share,
    layout: Layout,
    stored: Stored,
) -> _Place:
    data = parameter.data
    boxes = data.as_strided(
        (len(data), *share.held.shape),
        (data.stride(0), *layout.strides),
        data.storage_offset() + layout.offset,
    )
    slot = placement.slot
    held = torch.Size(len(cut.lines) for cut in slot.cuts)
    return _Place(
        slot=slot,
        parameter=parameter,
        address=parameter.data_ptr(),
        arrives=box.shape,
        held=held if slot.cuts else box.shape,
        dtype=box.dtype,
        is_padded=any(cut.is_padded for cut in slot.cuts),
        layout=layout,
        boxes=boxes,
        stored=stored,
        checked=_checked(placement, stored),
    )


def _checked(placement: Placement, stored: Stored) -> frozenset[int]:
    """Experts whose place is learned again, after that of `placement`."""
    at = {index: expert for expert, indices in stored.items() for index in indices}
    order = [at[index] for index in sorted(at)]
    if placement.slot.shard == "w2" and order != list(range(order[0], order[0] + len(order))):
        return frozenset(order)
    # An end of the storage tells a wrong distance between experts.
    others = (end for end in (order[-1], order[0]) if end != placement.record.expert)
    return frozenset(list(others)[:1])


class _Watch(TorchDispatchMode):
    """Sees every operation of a loader."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: list[tuple[torch.Tensor, Share]] = []
        self._harmless = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.copy_.default and isinstance(args[1], Share):
            self._copies.append((args[0], args[1]))
        elif func not in HARMLESS:
            self._harmless = False
        return func(*args, **(kwargs or {}))

    def layout(self, data: torch.Tensor, stored: tuple[int, ...]) -> Layout | None:
        """Where the share went in each expert at `stored`; None where that is not all there is.

        data: of the parameter.
        """
        sound = self._harmless and stored and len(self._copies) == len(stored)
        if not sound or data.dim() < 2 or data.is_meta or not data.is_contiguous():
            return None
        copies = sorted(self._copies, key=lambda copy: copy[0].data_ptr())
        layouts = {
            _layout(data, index, target, source)
            for index, (target, source) in zip(sorted(stored), copies, strict=True)
        }
        return layouts.pop() if len(layouts) == 1 else None


def _layout(data: torch.Tensor, index: int, target: torch.Tensor, source: Share) -> Layout | None:
    """Where `target` lies in part `index` of `data`, for `source` with its dimensions put back."""
    order = source.order
    if order is None or target.shape != source.shape or target.dtype != data.dtype:
        return None
    if target.device != data.device or not target.numel() or index >= len(data):
        return None
    elements, odd = divmod(target.data_ptr() - data.data_ptr(), data.itemsize)
    offset = elements - index * data.stride(0)
    last = offset + sum((n - 1) * s for n, s in zip(target.shape, target.stride(), strict=True))
    if odd or offset < 0 or last >= data.stride(0):
        return None
    return Layout(offset, tuple(target.stride(order.index(i)) for i in range(len(order))))
