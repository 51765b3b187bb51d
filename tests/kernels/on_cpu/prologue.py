"""Run the CUDA source of the attention prologue for whole groups on the emulated machine.

shapes -> Kernels (compiled) ;  cases.cut -> ranks ;  Exchange (buffers and tickets of a group)
run(kernels, [batch, batch, ...], exchange, ...)   every rank calls every batch, in its own time
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from jit_kernels.qk_norm_rope.contract import CacheWrite
from jit_kernels.qk_norm_rope.cuda import TYPES
from tests.kernels import cases
from tests.kernels.on_cpu import emulator
from tests.kernels.on_cpu.emulator import READ_ONLY, READ_WRITE, WORDS


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for: qk_norm_rope::Shape of heads.cuh."""

    dtype: torch.dtype
    cache_dtype: torch.dtype | None
    heads: tuple[int, int]  # of one rank
    head_dim: int
    rotary_dim: int
    ranks: int
    virtual: bool = False

    @classmethod
    def of(cls, case: cases.Case, size: int, virtual: bool = False) -> Shape:
        """The shape that serves a case cut into `size` ranks."""
        shard = cases.AttentionShard(size, 0, case.head_dim, *case.heads)
        rotary = 0 if case.cos_sin_cache is None else case.cos_sin_cache.shape[1]
        heads = (shard.q_width // case.head_dim, shard.kv_heads)
        return cls(case.q.dtype, case.cache_dtype, heads, case.head_dim, rotary, size, virtual)

    def cpp(self) -> str:
        """The template arguments."""
        types = f"{TYPES[self.dtype]}, {TYPES[self.cache_dtype]}"
        numbers = (*self.heads, self.head_dim, self.rotary_dim, self.ranks)
        return f"Shape<{types}, {', '.join(map(str, numbers))}, {str(self.virtual).lower()}>"


def _integers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


def _doubles(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_double) for name in names]


class _Rows(ctypes.Structure):
    _fields_ = _integers("data", "stride", "rank_stride")


class _Cache(ctypes.Structure):
    _fields_ = [
        *_integers("data", "page_stride", "slot_stride", "rank_stride"),
        *_doubles("scale"),
    ]


class Arguments(ctypes.Structure):
    """Arguments of prologue.h, field by field: qk_norm_rope::Params with nothing to align."""

    _fields_ = [
        *((name, _Rows) for name in ("q", "k", "v")),
        *((name, _Cache) for name in ("k_cache", "v_cache")),
        *_integers("q_weight", "k_weight", "positions", "slots", "cos_sin", "buffers", "ticket"),
        *_integers("tokens", "buffer_slots", "page_size", "first_slot", "rank"),
        *_integers("wide_positions", "wide_slots", "launch_early"),
        *_doubles("q_divisor", "k_divisor", "eps"),
    ]


class Kernels:
    """The prologue compiled for some shapes. root: jit_kernels, or a changed copy of it."""

    def __init__(self, shapes: Sequence[Shape], root: Path = emulator.JIT_KERNELS) -> None:
        self.shapes = list(dict.fromkeys(shapes))
        entries = ", ".join(f"entry<{shape.cpp()}>()" for shape in self.shapes)
        source = '#include "prologue.h"\nnamespace {\n'
        source += f"const Entry kEntries[] = {{{entries}}};\n}}\n"
        self.library = emulator.build("prologue", source, root)
        assert self.library.prologue_arguments_bytes() == ctypes.sizeof(Arguments)


@dataclass
class Exchange:
    """Buffers and tickets of a group: words [rank][half][slot][sender][which]."""

    size: int
    slots: int
    epoch: int = 1
    words: list[np.ndarray] = field(init=False)
    tickets: np.ndarray = field(init=False)
    pointers: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        shape = (2, self.slots, self.size, 2)
        self.words = [np.zeros(shape, dtype=np.uint64) for _ in range(self.size)]
        self.tickets = np.full(self.size, self.epoch << 32, dtype=np.uint64)
        self.pointers = np.array([words.ctypes.data for words in self.words], dtype=np.uint64)

    def plant(self, tag: int, value: float) -> None:
        """Leave a stale word with this tag everywhere in the half that the tag belongs to."""
        word = tag << 32 | int(np.float32(value).view(np.uint32))
        for words in self.words:
            words[tag & 1] = word

    def add_to(self, machine: emulator.Machine) -> None:
        machine.add("pointers", self.pointers.ctypes.data, self.pointers.nbytes)
        for rank, words in enumerate(self.words):
            machine.add(f"words of rank {rank}", words.ctypes.data, words.nbytes, rank, WORDS)
            machine.add("ticket", self.tickets[rank:].ctypes.data, 8, rank, WORDS)

    def epochs(self) -> list[int]:
        """The next epoch of each rank; no arrivals may be left over."""
        assert not (self.tickets & np.uint64(0xFFFFFFFF)).any()
        return [int(ticket) >> 32 for ticket in self.tickets]


@dataclass(frozen=True)
class Options:
    """How a group runs. blocks: of a rank's grid, at most. overlaps: programmatic launches."""

    seed: int = 0
    blocks: int = 3
    overlaps: bool = False
    launch_early: bool = False
    virtual: bool = False
    k_divisor_of: int | None = None  # plant: K's sum divided as if nobody held a replica


def run(
    kernels: Kernels,
    batches: Sequence[tuple[cases.Case, list[cases.Rank]]],
    exchange: Exchange,
    options: Options = Options(),
) -> int:
    """Every rank calls every batch in order; a batch of more tokens than slots goes in pieces.

    Returns by how many launches one rank was ahead of another at most. Raises KernelError.
    """
    with emulator.Machine(kernels.library, exchange.size, options.seed) as machine:
        exchange.add_to(machine)
        for case, ranks in batches:
            shape = kernels.shapes.index(Shape.of(case, exchange.size, options.virtual))
            for rank in ranks:
                _register(machine, rank)
            for first in range(0, case.tokens, exchange.slots):
                tokens = range(first, min(case.tokens, first + exchange.slots))
                for rank in ranks[:1] if options.virtual else ranks:
                    arguments = _arguments(rank, exchange, tokens, options)
                    if options.virtual:
                        _spread(arguments, ranks)
                    fits = kernels.library.prologue_launch(
                        machine.handle,
                        shape,
                        rank.shard.rank,
                        ctypes.byref(arguments),
                        min(len(tokens), options.blocks),
                        options.overlaps,
                    )
                    assert fits, "an argument does not fit its field of Params"
            machine.keep(ranks)
        machine.run()
    return machine.furthest_ahead


def run_case(
    kernels: Kernels,
    case: cases.Case,
    size: int,
    exchange: Exchange | None = None,
    options: Options = Options(),
    **layout: int,
) -> list[cases.Rank]:
    """One call of a group; returns its ranks with what they hold then."""
    ranks = cut(case, size, options.virtual, **layout)
    run(kernels, [(case, ranks)], exchange or Exchange(size, max(case.tokens, 1)), options)
    return ranks


def cut(
    case: cases.Case, size: int, virtual: bool = False, *, spare_columns: int = 8, offset: int = 0
) -> list[cases.Rank]:
    """The ranks of a group; virtual ones with each kind of tensor in one storage, evenly apart."""
    ranks = [
        cases.cut(case, size, rank, spare_columns=spare_columns, offset=offset)
        for rank in range(size)
    ]
    if not virtual:
        return ranks
    packed = _together([rank.packed for rank in ranks])
    weights = [_together([getattr(r.norm, n) for r in ranks]) for n in ("q_weight", "k_weight")]
    for i, rank in enumerate(ranks):
        widths = [rank.shard.q_width, rank.shard.kv_width, rank.shard.kv_width]
        rank.packed = packed[i]
        rank.q, rank.k, rank.v = packed[i].split(widths, dim=-1)
        rank.norm = replace(rank.norm, q_weight=weights[0][i], k_weight=weights[1][i])
        # Tensors that do not depend on the rank are one.
        rank.rotation = ranks[0].rotation
    if ranks[0].cache is not None:
        caches = [_caches(ranks, name) for name in ("k_cache", "v_cache")]
        slots = ranks[0].cache.slots
        for i, rank in enumerate(ranks):
            assert rank.cache is not None
            k_cache, v_cache = caches[0][i], caches[1][i]
            rank.cache = replace(
                rank.cache, v=rank.v, k_cache=k_cache, v_cache=v_cache, slots=slots
            )
    return ranks


def _caches(ranks: list[cases.Rank], name: str) -> list[torch.Tensor]:
    return _together([getattr(rank.cache, name) for rank in ranks])


def _extent(x: torch.Tensor) -> int:
    """Elements from the first to the last, both included."""
    if not x.numel():
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))


def _together(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of tensors of one shape in one storage; weights contiguous, the rest with a gap."""
    extent = _extent(tensors[0])
    apart = extent if tensors[0].dim() == 1 else math.ceil(extent / 16) * 16 + 64
    storage = torch.zeros(apart * len(tensors) + 1, dtype=tensors[0].dtype)
    copies = []
    for i, x in enumerate(tensors):
        copy = storage.as_strided(x.shape, x.stride(), i * apart)
        copies.append(copy.copy_(x))
    return copies


def _register(machine: emulator.Machine, rank: cases.Rank) -> None:
    """Every row on its own, so that what lies between rows is nobody's."""
    number, norm = rank.shard.rank, rank.norm
    for name, x, kind in (
        ("q", rank.q, READ_WRITE),
        ("k", rank.k, READ_WRITE),
        ("v", rank.v, READ_ONLY if rank.cache else -1),
    ):
        for token in range(x.shape[0] if kind >= 0 else 0):
            row = x[token]
            machine.add(f"{name}[{token}]", row.data_ptr(), row.nbytes, number, kind)
    _add(machine, "q_weight", norm.q_weight)
    _add(machine, "k_weight", norm.k_weight)
    if rank.rotation is not None:
        _add(machine, "positions", rank.rotation.positions)
        _add(machine, "cos_sin", rank.rotation.cos_sin_cache)
    if rank.cache is None:
        return
    _add(machine, "slots", rank.cache.slots)
    for name in ("k_cache", "v_cache"):
        buffer = getattr(rank.cache, name)
        rows = buffer.flatten(-2).unbind(0) if buffer.dim() == 3 else _paged_rows(buffer)
        for slot, row in enumerate(rows):
            machine.add(f"{name}[{slot}]", row.data_ptr(), row.nbytes, number, READ_WRITE)


def _add(machine: emulator.Machine, name: str, x: torch.Tensor) -> None:
    machine.add(name, x.data_ptr(), x.nbytes, kind=READ_ONLY)


def _paged_rows(buffer: torch.Tensor) -> list[torch.Tensor]:
    return [row for page in buffer.flatten(-2).unbind(0) for row in page.unbind(0)]


def _arguments(rank: cases.Rank, exchange: Exchange, tokens: range, options: Options) -> Arguments:
    arguments = Arguments()
    for name in ("q", "k", "v"):
        x = getattr(rank, name)[tokens.start :]
        setattr(arguments, name, _Rows(x.data_ptr(), x.stride(0), 0))
    arguments.q_weight, arguments.k_weight = (
        rank.norm.q_weight.data_ptr(),
        rank.norm.k_weight.data_ptr(),
    )
    arguments.q_divisor, arguments.k_divisor = rank.norm.q_divisor, rank.norm.k_divisor
    if options.k_divisor_of is not None:
        arguments.k_divisor = options.k_divisor_of
    arguments.eps, arguments.tokens, arguments.rank = rank.norm.eps, len(tokens), rank.shard.rank
    if rank.rotation is not None:
        positions = rank.rotation.positions[tokens.start :]
        arguments.positions, arguments.wide_positions = (
            positions.data_ptr(),
            positions.itemsize == 8,
        )
        arguments.cos_sin = rank.rotation.cos_sin_cache.data_ptr()
    if rank.cache is not None:
        _cache_arguments(arguments, rank.cache, tokens)
    arguments.buffers, arguments.buffer_slots = exchange.pointers.ctypes.data, exchange.slots
    arguments.ticket = exchange.tickets[rank.shard.rank :].ctypes.data
    arguments.launch_early = options.launch_early
    return arguments


def _cache_arguments(arguments: Arguments, cache: CacheWrite, tokens: range) -> None:
    slots = cache.slots[tokens.start :]
    arguments.slots, arguments.wide_slots = slots.data_ptr(), slots.itemsize == 8
    arguments.first_slot = cache.first_slot
    paged = cache.k_cache.dim() == 4
    arguments.page_size = cache.k_cache.shape[1] if paged else 1
    for name, x, scale in (
        ("k_cache", cache.k_cache, cache.k_scale),
        ("v_cache", cache.v_cache, cache.v_scale),
    ):
        slot_stride = x.stride(1) if paged else 0
        setattr(arguments, name, _Cache(x.data_ptr(), x.stride(0), slot_stride, 0, scale))


def _spread(arguments: Arguments, ranks: list[cases.Rank]) -> None:
    """Tell virtual ranks how far their tensors are apart."""
    if len(ranks) == 1:
        return

    def apart(name: str) -> int:
        first, second = (_tensor(rank, name) for rank in ranks[:2])
        return (second.data_ptr() - first.data_ptr()) // first.itemsize

    for name in ("q", "k", "v", *(("k_cache", "v_cache") if ranks[0].cache else ())):
        getattr(arguments, name).rank_stride = apart(name)


def _tensor(rank: cases.Rank, name: str) -> torch.Tensor:
    x = getattr(rank.cache if name.endswith("cache") else rank, name)
    assert isinstance(x, torch.Tensor)
    return x
