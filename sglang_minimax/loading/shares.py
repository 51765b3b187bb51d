"""A rank's share of a tensor, in the shape of the whole: what SGLang's loaders are handed.

SGLang's loaders take a whole tensor, compute this rank's part of it and copy that. They know every
parameter layout of every kernel, so they keep doing it; but only the part is in memory. A `Share`
has the shape of the whole tensor and the data of one box of it. Cutting the box out of it gives an
ordinary tensor, cutting anything else is a LoadError: SGLang's arithmetic and ours must agree.

Where blocks are dealt, the whole is the padded one (`topology.expert_cut`). No SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sglang_minimax.errors import LoadError
from sglang_minimax.loading.ledger import Placement
from sglang_minimax.loading.slots import Slot

aten: Any = torch.ops.aten


class Share(torch.Tensor):
    """A tensor of `whole` shape of which only `data`, the box at `first`, is in memory.

    held: those data. placement: where they go. label: the tensor's name, for messages. order: which
    dimension of the first share of the tensor each one is, None once the elements have been
    changed. watched: whether it stays a share when the box is cut out (`places`); is_cut: it was.
    """

    held: torch.Tensor
    first: tuple[int, ...]
    placement: Placement
    label: str
    counter: list[int]
    order: tuple[int, ...] | None
    watched: bool
    is_cut: bool

    @staticmethod
    def __new__(
        cls,
        held: torch.Tensor,
        first: Sequence[int],
        whole: Sequence[int],
        placement: Placement,
        label: str,
        watched: bool = False,
    ) -> Share:
        share: Share = torch.Tensor._make_wrapper_subclass(
            cls, tuple(whole), dtype=held.dtype, device=held.device, requires_grad=False
        )
        share.held, share.first = held, tuple(first)
        share.placement, share.label = placement, label
        share.counter, share.order = [0], tuple(range(held.dim()))
        share.watched, share.is_cut = watched, False
        return share

    @property
    def taken(self) -> int:
        """How many times the box has been cut out."""
        return self.counter[0]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Share({self.label}, {list(self.held.shape)} of {list(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        source = args[0]
        if isinstance(source, Share):
            handler = _HANDLERS.get(func)
            if handler is not None:
                return handler(source, *args[1:], **(kwargs or {}))
        shares = [each for arg in args for each in _listed(arg) if isinstance(each, Share)]
        if all(share.held.shape == share.shape for share in shares):
            # Complete after all, as one of an expert that is not cut.
            return func(*(_whole(each) for each in args), **(kwargs or {}))
        raise LoadError(
            f"{shares[0].label}: SGLang's loader calls {func} on a tensor of which this rank holds "
            f"{list(shares[0].held.shape)} of {list(shares[0].shape)}; report this to "
            "sglang-minimax."
        )


def _listed(value: Any) -> Sequence[Any]:
    """What an operation takes in one argument, such as the tensors of a stack."""
    return value if isinstance(value, (list, tuple)) else (value,)


def _whole(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_whole(each) for each in value]
    if not isinstance(value, Share):
        return value
    value.counter[0] += 1
    return value.held


def _slice(
    share: Share, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> torch.Tensor:
    size = share.shape[dim]
    begin, stop, _ = slice(start, end).indices(size)
    stop = max(begin, stop)
    first, length = share.first[dim], share.held.shape[dim]
    if step == 1 and (begin, stop) == (0, size):
        return _same(share)
    if share.is_cut:
        cut: torch.Tensor = aten.slice.Tensor(_whole(share), dim, start, end, step)
        return cut
    if step != 1 or (begin, stop) != (first, first + length):
        raise LoadError(
            f"{share.label}: SGLang's loader cuts {begin} to {stop} of dimension {dim}, but this "
            f"rank holds {first} to {first + length}; report this to sglang-minimax."
        )
    whole, firsts = list(share.shape), list(share.first)
    whole[dim], firsts[dim] = length, 0
    return _made(share, share.held, firsts, whole, share.order)


def _transpose(share: Share, dim0: int = 0, dim1: int = 1) -> torch.Tensor:
    if len(share.shape) < 2:
        return _same(share)
    order = list(range(len(share.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(share, order)


def _permute(share: Share, order: Sequence[int]) -> torch.Tensor:
    whole = [share.shape[i] for i in order]
    before = share.order
    after = before and tuple(before[i] for i in order)
    return _made(share, share.held.permute(*order), [share.first[i] for i in order], whole, after)


def _same(share: Share, *_: Any, **__: Any) -> torch.Tensor:
    return _next(share, share.held, share.first, share.shape, share.order, share.is_cut)


def _copied(share: Share, **options: Any) -> torch.Tensor:
    """Another type, device or layout, of the box alone."""
    held = aten._to_copy.default(share.held, **options)
    order = share.order if held.dtype == share.dtype else None
    return _made(share, held, share.first, share.shape, order)


def _clone(share: Share, **options: Any) -> torch.Tensor:
    return _made(share, share.held.clone(**options), share.first, share.shape, share.order)


def _made(
    share: Share,
    held: torch.Tensor,
    first: Sequence[int],
    whole: Sequence[int],
    order: tuple[int, ...] | None,
) -> torch.Tensor:
    """The box itself where nothing is missing any more, else a share of what is left."""
    if tuple(held.shape) != tuple(whole):
        return _next(share, held, first, whole, order, False)
    if share.watched:
        return _next(share, held, first, whole, order, True)
    share.counter[0] += 1
    return held.detach()  # PyTorch wants a new object from a dispatched view


def _next(
    share: Share,
    held: torch.Tensor,
    first: Sequence[int],
    whole: Sequence[int],
    order: tuple[int, ...] | None,
    is_cut: bool,
) -> Share:
    """A share of the same tensor."""
    made = Share(held, first, whole, share.placement, share.label, share.watched)
    made.counter, made.order, made.is_cut = share.counter, order, is_cut
    return made


_HANDLERS: dict[Any, Callable[..., torch.Tensor]] = {
    aten.slice.Tensor: _slice,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten._to_copy.default: _copied,
    aten.clone.default: _clone,
}


def share_of(
    placement: Placement, held: torch.Tensor, label: str, *, watched: bool = False
) -> Share:
    """What a loader of SGLang is handed for `held`, the box of a placement.

    held: the elements of `placement.box`, in its shape. label: the tensor's name, for messages.
    """
    slot = placement.slot
    held = held.reshape(tuple(len(cut.lines) for cut in slot.cuts) if slot.cuts else held.shape)
    first, whole = [cut.first for cut in slot.cuts], [cut.over for cut in slot.cuts]
    if any(cut.is_padded for cut in slot.cuts):
        held = padded(held, slot)
    if not slot.cuts:
        first, whole = [0] * held.dim(), list(held.shape)
    return Share(held, first, whole, placement, label, watched)


def padded(held: torch.Tensor, slot: Slot) -> torch.Tensor:
    """`held` in the corner of a tensor that is as wide as the slot, of its padding."""
    widths = tuple(cut.width for cut in slot.cuts)
    # FP8 has no fill; its bytes of zero are zeros.
    full = torch.zeros(widths, dtype=held.dtype, device=held.device)
    if slot.stored.padding:
        full.fill_(slot.stored.padding)
    full[tuple(slice(0, size) for size in held.shape)] = held
    return full
