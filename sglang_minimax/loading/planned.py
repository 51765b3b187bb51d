"""Weights in files: read by a plan, while they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from sglang_minimax.errors import LoadError
from sglang_minimax.loading.formats.base import Shape
from sglang_minimax.loading.headers import ITEM_BYTES
from sglang_minimax.loading.ledger import Box
from sglang_minimax.loading.plan import Plan, Read
from sglang_minimax.loading.problems import Problems
from sglang_minimax.loading.progress import progress_bar
from sglang_minimax.loading.reader import Reader, Span, Stats, typed
from sglang_minimax.loading.values import TYPES, SharedValues, invalid_values


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How files are read.

    threads: that read ahead. pinned: whether the buffers are page-locked, for a copy to a GPU.
    progress: whether a bar is shown. stop: asked about once a second; a sentence ends the load.
    agree: makes the problems of one rank those of all, before anything is read.
    """

    threads: int = 8
    pinned: bool = False
    progress: bool = False
    stop: Callable[[], str | None] | None = None
    agree: Callable[[Problems], Problems] = lambda problems: problems


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """The weight files of a checkpoint, in the place of its (name, tensor) pairs.

    Whoever filters or renames pairs on the way from SGLang's loader to the model passes this on as
    the one pair that it is; `StrictLoader` makes the plan, which needs the model.
    """

    files: tuple[Path, ...]
    options: ReadOptions = ReadOptions()

    def __iter__(self) -> Iterator[tuple[str, CheckpointFiles]]:
        yield f"{len(self.files)} files", self


#: A read, and the elements of its box.
Piece = tuple[Read, torch.Tensor]


class PlannedWeights:
    """What a plan reads, in the order of the files; to be taken once."""

    def __init__(self, plan: Plan, options: ReadOptions) -> None:
        self.plan = plan
        self._options = options
        self.stats: Stats | None = None
        self._bound = 0

    def __iter__(self) -> Iterator[Piece]:
        """(read, the elements of its box), each valid until the next one. Raises LoadError.

        Their values are judged before they come.
        """
        shared = SharedValues()
        for pieces in self._batches():
            _refuse_invalid(pieces, shared)
            yield from pieces

    def pieces(self) -> Iterator[Piece]:
        """(read, the elements of its box), each valid until the next one. Raises LoadError."""
        for pieces in self._batches():
            yield from pieces

    def _batches(self) -> Iterator[list[Piece]]:
        reads, options = self.plan.reads, self._options
        bar = progress_bar(self.plan.bytes_read, options.progress)
        reader = Reader(
            [Span(read.tensor.file, read.offset, read.length) for read in reads],
            threads=options.threads,
            pinned=options.pinned,
            progress=bar,
            stop=options.stop,
        )
        self.stats, self._bound = reader.stats, reader.host_bytes_bound
        with reader:
            for members, buffer, first in reader.batches():
                boxes = _Boxes(buffer, first)
                yield [(reads[index], boxes.of(reads[index])) for index in members]

    def costs(self) -> str:
        """Bytes and time of the reads, for the log."""
        if self.stats is None:
            return "nothing read"
        held, asked = self.plan.bytes_held, self.stats.bytes_requested
        padding = self.plan.bytes_of_padding
        dealt = f" and {padding / 1e9:.2f} GB of padding of dealt blocks" if padding else ""
        return (
            f"{asked / 1e9:.2f} GB read for {held / 1e9:.2f} GB held{dealt}, in "
            f"{self.stats.seconds:.1f} s, with at most {self._bound / 2**20:.0f} MiB of buffers"
        )


class _Boxes:
    """Boxes of tensors in a buffer whose first byte has offset `first` in its file."""

    def __init__(self, buffer: torch.Tensor, first: int) -> None:
        self._buffer = buffer
        self._first = first
        self._typed: dict[str, torch.Tensor] = {}

    def of(self, read: Read) -> torch.Tensor:
        """The elements of its box: a view, or a copy where they are at an odd offset."""
        kind, start = read.tensor.kind, read.offset - self._first
        item = ITEM_BYTES[kind]
        sizes, strides, offset, elements = _view(read.shape, read.inner)
        if start % item or elements * item != read.length or not elements:
            data = self._buffer.narrow(0, start if read.length else 0, read.length)
            rows = typed(data, TYPES[kind], read.shape)
            return rows[tuple(slice(part.start, part.stop) for part in read.inner)]
        whole = self._typed.get(kind)
        if whole is None:
            even = self._buffer.numel() // item * item
            whole = self._typed[kind] = self._buffer.narrow(0, 0, even).view(TYPES[kind])
        return whole.as_strided(sizes, strides, start // item + offset)


@lru_cache(maxsize=4096)  # thousands of experts have the same
def _view(shape: Shape, inner: Box) -> tuple[Shape, Shape, int, int]:
    """Sizes, strides and first element of the box `inner` of `shape`, and the elements of that."""
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    first = sum(part.start * stride for part, stride in zip(inner, strides, strict=True))
    return tuple(map(len, inner)), strides, first, math.prod(shape)


def _refuse_invalid(pieces: Sequence[Piece], shared: SharedValues) -> None:
    """Raises LoadError for the first piece with impossible values."""
    alike: dict[tuple[object, ...], list[Piece]] = {}
    for piece in pieces:
        stored, held = piece[0].placement.slot.stored, piece[1]
        if stored.judged:
            alike.setdefault((id(stored), held.shape, held.dtype), []).append(piece)
    for group in alike.values():
        slot = group[0][0].placement.slot
        only_scales = slot.stored.scale and not slot.stored.equal
        # One look at thousands of small tensors; they are looked at singly to find the bad one.
        if only_scales and not invalid_values(
            slot.stored, torch.stack([held for _, held in group])
        ):
            continue
        for read, held in group:
            slot = read.placement.slot
            invalid = invalid_values(slot.stored, held, slot.matrix)
            if invalid := invalid or shared.conflict(read.name, read.placement, held):
                raise LoadError(f"{read.name} {invalid}; quantise the checkpoint again.")
