"""Who reads which bytes: from headers, an architecture and a rank's place to a list of reads.

The plan of a rank names, for each tensor that it needs, the box of elements, the span of bytes in
the file that holds the box, and the parameter that the box goes to. It needs no data and no device,
so the plan of any rank of any cluster can be made on a laptop. No torch, no SGLang.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from sglang_minimax.config import Architecture
from sglang_minimax.loading.formats.base import Shape
from sglang_minimax.loading.headers import ITEM_BYTES, Headers, Tensor, read_headers
from sglang_minimax.loading.ledger import Box, Ledger, Placement
from sglang_minimax.loading.names import TensorName, parse
from sglang_minimax.loading.problems import Problems
from sglang_minimax.loading.slots import Slots, SlotTable, Stage
from sglang_minimax.topology import Topology, rank_share


class Read(NamedTuple):
    """One box of one tensor, on its way to a parameter.

    offset, length: bytes of the file that hold the box. shape: of the elements in that span, whole
    rows of the tensor. inner: the box inside of them.
    """

    name: str
    tensor: Tensor
    placement: Placement
    offset: int
    length: int
    shape: Shape
    inner: Box

    @property
    def boxed_bytes(self) -> int:
        """Bytes of the box alone; `length` is more where rows are cut."""
        return math.prod(map(len, self.placement.box)) * ITEM_BYTES[self.tensor.kind]


@dataclass(frozen=True, slots=True)
class Plan:
    """What one rank reads, in the order of the files, and what does not fit.

    summary: counts for the log. Nothing may be read where there are problems.
    """

    reads: list[Read]
    problems: Problems
    ledger: Ledger

    @property
    def bytes_read(self) -> int:
        """Bytes that are asked of the files."""
        return sum(read.length for read in self.reads)

    @property
    def bytes_held(self) -> int:
        """Bytes of the checkpoint's elements that this rank holds, copies of experts included."""
        return sum(read.boxed_bytes * read.placement.copies for read in self.reads)

    @property
    def bytes_of_padding(self) -> int:
        """Bytes that dealt blocks take in memory beyond what the checkpoint has for them."""
        return sum(
            read.placement.slot.elements * ITEM_BYTES[read.tensor.kind] * read.placement.copies
            - read.boxed_bytes * read.placement.copies
            for read in self.reads
            if read.placement.slot.is_padded
        )


def plan_of_rank(
    headers: Headers | Iterable[Path],
    arch: Architecture,
    topology: Topology,
    rank: int,
    *,
    dp_lm_head: bool = False,
    redundant_experts: int = 0,
) -> Plan:
    """The plan of global rank `rank`, experts placed in order. Raises TopologyError, LoadError.

    Where SGLang has placed the experts otherwise, `make_plan` takes a stage that says so.
    """
    if not isinstance(headers, Headers):
        headers = read_headers(headers)
    share = rank_share(
        arch, topology, rank, dp_lm_head=dp_lm_head, redundant_experts=redundant_experts
    )
    stage = Stage.of(arch, topology, share)
    return make_plan(headers, arch, stage, SlotTable(arch, stage).build())


def make_plan(
    headers: Headers,
    arch: Architecture,
    stage: Stage,
    slots: Slots,
    unused: Collection[TensorName] = frozenset(),
) -> Plan:
    """What a rank with these slots reads of the announced tensors; all of them are judged.

    unused: records without a slot because the kernels of this device have no use for them.
    """
    ledger = Ledger(arch, stage, slots, unused)
    reads = [
        read_of(name, tensor, placement)
        for name, _, tensor, placements in judged(headers, ledger)
        for placement in placements
    ]
    files = {file: i for i, file in enumerate(sorted({read.tensor.file for read in reads}))}
    reads.sort(key=lambda read: (files[read.tensor.file], read.offset))
    return Plan(reads, ledger.problems, ledger)


class Judged(NamedTuple):
    """An announced tensor, what its name says, and its places on a rank."""

    name: str
    record: TensorName | None
    tensor: Tensor
    placements: Sequence[Placement]


def judged(headers: Headers, ledger: Ledger) -> Iterator[Judged]:
    """Every announced tensor; the ledger has all problems after the last one."""
    for name, first, second in headers.repeated:
        ledger.problems.add("duplicate", f"{name} (in {first.name} and in {second.name})")
    for name, tensor in headers.tensors.items():
        record = parse(name)
        placements = ledger.place_record(name, record, tensor.kind, tensor.shape)
        yield Judged(name, record, tensor, placements)
    ledger.check_complete()


def read_of(name: str, tensor: Tensor, placement: Placement) -> Read:
    """The read of one placement: the span of whole rows that holds its box."""
    item = ITEM_BYTES[tensor.kind]
    begin, length, shape, inner = _span(placement.box, tensor.shape)
    offset = tensor.offset + begin * item
    return Read(name, tensor, placement, offset, length * item, shape, inner)


@lru_cache(maxsize=4096)  # thousands of experts have the same
def _span(box: Box, of: Shape) -> tuple[int, int, Shape, Box]:
    """Where the span begins in a tensor of shape `of`, its elements, its shape, the box in it.

    Exact indices first, then the first range; nothing for an empty box.
    """
    if not all(box):
        return 0, 0, tuple(map(len, box)), tuple(range(len(part)) for part in box)
    begin, end = 0, 1
    shape: list[int] = []
    inner: list[range] = []
    for i, (part, stride) in enumerate(zip(box, _strides(of), strict=True)):
        begin += part.start * stride
        end = len(part) * stride
        if len(part) == 1 and of[i] > 1:
            shape.append(1)
            inner.append(range(1))
            continue
        shape += [len(part), *of[i + 1 :]]
        inner += [range(len(part)), *box[i + 1 :]]
        break
    return begin, end, tuple(shape), tuple(inner)


def _strides(shape: Shape) -> Iterator[int]:
    """Elements between neighbours in each dimension of a tensor without gaps."""
    for i in range(len(shape)):
        yield math.prod(shape[i + 1 :])
