"""Exact byte spans of files, read with pread by a few threads ahead of one consumer.

For a rank that owns part of each file. A mapping (mmap, safetensors' get_slice) would fault in
many times what it touches through read-ahead, and turn a disk error into SIGBUS; pread fetches what
it is asked for and returns an error that can be told. No SGLang.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

import torch

from sglang_minimax.errors import LoadError
from sglang_minimax.loading.files import AGAIN
from sglang_minimax.loading.progress import Progress

logger = logging.getLogger(__name__)

#: Bytes between two spans that are read along: one more call costs more than a page does.
GAP = 4096
#: Modulo this a byte has the offset in its buffer that it has in its file, for views as any type
#: and for vectorised copies. Torch aligns its storages as much.
ALIGN = 64
#: Share of the bytes from a file's first wanted one to its last, from which on it is read ahead.
DENSE = 15 / 16
POLL_SECONDS = 1.0
JOIN_SECONDS = 10.0
UNREADABLE = "{} cannot be read at byte {} ({}); check its permissions and its disk."
CLOSED = "the reader of weights was closed early; start again."
ENDED = "a reader thread ended unexpectedly: {}; start again, and report it if that does not help."


class Span(NamedTuple):
    """`length` bytes of `file` from byte `offset` on."""

    file: Path
    offset: int
    length: int


@dataclass(slots=True)
class Stats:
    """What a reader has done; complete once its iteration has ended.

    bytes_wanted: sum of the spans. bytes_requested: asked from the system, with small gaps, and
    once where spans overlap in a run. reads: calls of preadv. files: opened. seconds: wall time.
    """

    bytes_wanted: int = 0
    bytes_requested: int = 0
    reads: int = 0
    files: int = 0
    seconds: float = 0.0


def typed(data: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """The bytes of `data` (uint8, one dimension, contiguous) as a tensor of `dtype` and `shape`.

    A view, or a copy of bytes that the file has at an offset which is no multiple of the item size.
    Raises LoadError where the number of bytes is another.
    """
    if data.numel() != math.prod(shape) * dtype.itemsize:
        raise LoadError(f"{data.numel()} bytes are no {dtype} tensor of {list(shape)}; {AGAIN}")
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(tuple(shape))


@dataclass(slots=True, eq=False)
class Run:
    """Bytes of one file that go into one buffer, for the spans with the indices `members`."""

    file: Path
    offset: int
    length: int
    members: list[int]
    missing: int = 0  # pieces that the threads have yet to read
    buffer: torch.Tensor | None = None  # until the consumer is done

    def within(self, buffer: torch.Tensor, offset: int, length: int) -> torch.Tensor:
        """Its part of `buffer` for bytes of the file."""
        return buffer.narrow(0, self.offset % ALIGN + offset - self.offset, length)


class _Piece(NamedTuple):
    """What a thread reads at a time: from `offset` of a file as much as fits into `target`."""

    run: Run
    descriptor: int
    offset: int
    target: torch.Tensor


def plan(spans: Sequence[Span], room: int) -> list[Run]:
    """Runs that hold each span which is not empty, by file and offset.

    Neighbours share a run while that has at most `room` bytes; a longer span has its own, with
    those inside it. Raises LoadError for a span with negative numbers.
    """
    for span in spans:
        if span.offset < 0 or span.length < 0:
            raise LoadError(f"{span} is impossible, so its file is damaged; {AGAIN}")
    runs: list[Run] = []
    # Of spans that start together the longest comes first, so that the others are inside it.
    order = [index for index, span in enumerate(spans) if span.length]
    order.sort(key=lambda i: (spans[i].file, spans[i].offset, -spans[i].length))
    for index in order:
        span, run = spans[index], runs[-1] if runs else None
        if run and run.file == span.file and span.offset <= run.offset + run.length + GAP:
            length = max(run.length, span.offset + span.length - run.offset)
            if length <= max(room, run.length):
                run.length = length
                run.members.append(index)
                continue
        runs.append(Run(span.file, span.offset, span.length, [index]))
    return runs


class Reader:
    """Iterate, once, over (index into `spans`, its bytes), in the order of files and offsets.

    The bytes are a contiguous uint8 tensor [length] in host memory, of a shared buffer: valid only
    until the next one is taken; a copy to a device with non_blocking=True must have ended by then.
    Storage offset and address are the span's offset in its file, modulo 64 bytes; see `typed`.
    Empty spans come first and read nothing.

    threads: how many read. run_bytes: size of a buffer, at least 4096; neighbours (at most 4 KiB
    apart) are read together while they fit; a span above run_bytes - 64 has a buffer of its own,
    filled by several threads. buffers: threads + 2 unless given. pinned: page-locked buffers where
    there is a device, except for long spans, as torch does not give that memory back. progress:
    told the bytes, closed at the end. stop: asked about once a second by the consumer; a sentence
    from it is raised as LoadError.

    `host_bytes_bound`, the bytes of host memory, is
        min(buffers, runs) * (longest run + 64) + (longest span above run_bytes - 64) + 64,
    over runs of at most run_bytes - 64; the last two terms only with such a span. Page-locked
    buffers count as the next power of two, which torch makes them: run_bytes should be one.
    Files open at a time: at most buffers + 2.

    Raises LoadError for a file that cannot be read or ends too early, for whatever else ends a
    thread, and where memory or threads are not to be had. Threads start and end with the iteration.
    One that is broken off ends when it is collected, which a traceback delays: use `with Reader`.
    """

    # The consumer's thread opens, hands out and counts, the others only read: so there are queues
    # and no locks, which an interrupt, a fork or the collector could leave taken.
    def __init__(
        self,
        spans: Sequence[Span],
        *,
        threads: int = 8,
        run_bytes: int = 16 << 20,
        buffers: int | None = None,
        pinned: bool = False,
        progress: Progress | None = None,
        stop: Callable[[], str | None] | None = None,
    ) -> None:
        buffers = threads + 2 if buffers is None else buffers
        if threads < 1 or buffers < 1 or run_bytes < 4096:
            raise ValueError(f"{threads=} or {buffers=} below 1, or {run_bytes=} below 4096")
        self._spans, self._count, self._pinned = spans, threads, pinned
        self._progress, self._stop = progress, stop
        self._room = run_bytes - ALIGN
        self._runs = plan(spans, self._room)
        self._next = 0  # of the runs: those before it have, or had, a buffer
        lengths = [run.length for run in self._runs]
        short = [length for length in lengths if length <= self._room]
        # By whether a run is long: size of a buffer, how many there are, the free ones of them.
        self._size = {False: max(short, default=0) + ALIGN, True: max(lengths, default=0) + ALIGN}
        self._most = {False: min(buffers, len(short)), True: int(len(short) < len(lengths))}
        self._free: dict[bool, list[torch.Tensor]] = {False: [], True: []}
        self._left = Counter(run.file for run in self._runs)  # runs of each file to be read
        self._open: dict[Path, int] = {}
        self._threads: list[threading.Thread] = []
        self._tasks: SimpleQueue[_Piece | None] = SimpleQueue()
        self._results: SimpleQueue[tuple[_Piece, int] | BaseException] = SimpleQueue()
        self._closed, self._asked = False, 0.0  # when `stop` was asked, or the iteration began
        self.stats = Stats(sum(span.length for span in spans))

    @property
    def host_bytes_bound(self) -> int:
        """Bytes of host memory that the buffers take, at most."""
        size = self._size[False]
        if self._pinned:
            size = 1 << (size - 1).bit_length()
        return self._most[False] * size + self._most[True] * self._size[True]

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        for members, buffer, first in self.batches():
            for index in members:
                span = self._spans[index]
                start = span.offset - first if span.length else 0
                yield index, buffer.narrow(0, start, span.length)
                if self._closed:
                    raise LoadError(CLOSED)

    def batches(self) -> Iterator[tuple[Sequence[int], torch.Tensor, int]]:
        """(indices into `spans`, a buffer, the offset in the file of its first byte), instead."""
        if self._asked or self._closed:
            raise RuntimeError("a reader is iterated over once; make another one")
        started = self._asked = time.monotonic()
        try:
            if empty := [index for index, span in enumerate(self._spans) if not span.length]:
                yield empty, torch.empty(0, dtype=torch.uint8, device="cpu"), 0
            self._start()
            for run in self._runs:
                buffer = self._filled(run)
                yield run.members, buffer, run.offset - run.offset % ALIGN
                if self._closed:
                    raise LoadError(CLOSED)
                if self._progress:
                    self._progress.update(sum(self._spans[i].length for i in run.members))
                run.buffer = None
                self._free[run.length > self._room].append(buffer)
                self._hand_out()
        finally:
            self.close()
            self.stats.seconds = time.monotonic() - started

    def close(self) -> None:
        """End the threads, after the read that each is in; close files and bar, drop buffers."""
        self._closed = True
        for _ in range(self._count):
            self._tasks.put(None)
        deadline = time.monotonic() + JOIN_SECONDS
        me = threading.current_thread()  # one of them, where the collector calls this there
        others = [thread for thread in self._threads if thread is not me]
        for thread in others:
            thread.join(max(0.0, deadline - time.monotonic()))
        if stuck := sum(thread.is_alive() for thread in others):
            # Their files stay open: a number that another file gets would be read from.
            logger.warning("%d threads are still in a read of weights; is the disk there?", stuck)
        else:
            while self._open:
                os.close(self._open.popitem()[1])
            self._tasks, self._results = SimpleQueue(), SimpleQueue()  # they refer to buffers
        self._free = {False: [], True: []}
        for run in self._runs:
            run.buffer = None
        if self._progress:
            self._progress.close()

    def _start(self) -> None:
        # Buffers here, not in a thread: page-locking uses the caller's current device.
        for long, free in self._free.items():
            free += _allocate(self._most[long], self._size[long], self._pinned and not long)
        self._hand_out()
        pieces = sum(-(-run.length // self._room) for run in self._runs)
        for number in range(min(self._count, pieces)):
            # A daemon, so that a read that hangs cannot keep the interpreter from its exit.
            thread = threading.Thread(target=self._work, name=f"weights-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise LoadError("no thread to read weights starts; raise ulimit -u.") from error
            self._threads.append(thread)

    def _hand_out(self) -> None:
        """Give the next runs the free buffers, and their pieces to the threads."""
        while self._next < len(self._runs):
            run = self._runs[self._next]
            long = run.length > self._room
            if not self._free[long]:
                return  # not to a later run: the consumer would wait for this one for ever
            descriptor = self._descriptor(run.file)
            buffer = run.buffer = self._free[long].pop()
            self._next += 1
            end = run.offset + run.length
            starts = range(run.offset, end, self._room)
            run.missing = len(starts)
            for start in starts:
                target = run.within(buffer, start, min(self._room, end - start))
                self._tasks.put(_Piece(run, descriptor, start, target))

    def _descriptor(self, file: Path) -> int:
        """Of a file, open from its first run to its last. Raises LoadError."""
        if file not in self._open:
            try:
                self._open[file] = descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise LoadError(UNREADABLE.format(file, 0, error.strerror)) from error
            self.stats.files += 1
            runs = self._runs[self._next : self._next + self._left[file]]
            extent = runs[-1].offset + runs[-1].length - runs[0].offset
            # A file read nearly whole gains from a doubled read-ahead window; otherwise there is
            # none, for behind a run is a gap. WILLNEED would add nothing to the read that follows.
            dense = sum(run.length for run in runs) >= DENSE * extent
            with suppress(OSError, AttributeError):  # advice, which not every system takes
                advice = os.POSIX_FADV_SEQUENTIAL if dense else os.POSIX_FADV_RANDOM
                os.posix_fadvise(descriptor, 0, 0, advice)
        return self._open[file]

    def _filled(self, run: Run) -> torch.Tensor:
        """The buffer of a run, once it is read. Raises LoadError."""
        while True:
            now = time.monotonic()
            if self._stop and now - self._asked >= POLL_SECONDS:
                self._asked = now
                if sentence := self._stop():
                    raise LoadError(sentence)
            if not run.missing:
                assert run.buffer is not None  # until it is taken back
                return run.buffer
            try:
                result = self._results.get(timeout=POLL_SECONDS)
            except Empty:
                if all(thread.is_alive() for thread in self._threads):
                    continue
                raise LoadError(ENDED.format("it left no error")) from None
            if isinstance(result, LoadError):
                raise result
            if isinstance(result, BaseException):
                raise LoadError(ENDED.format(repr(result))) from result
            piece, reads = result
            self.stats.reads += reads
            self.stats.bytes_requested += piece.target.numel()
            piece.run.missing -= 1
            if not piece.run.missing:
                self._left[piece.run.file] -= 1
                if not self._left[piece.run.file]:
                    os.close(self._open.pop(piece.run.file))

    def _work(self) -> None:
        """Read pieces until there is None, or an error."""
        tasks, results = self._tasks, self._results
        try:
            while (piece := tasks.get()) and not self._closed:
                results.put((piece, self._read(piece)))
        except BaseException as error:  # also SystemExit: the consumer must not wait for ever
            results.put(error)

    def _read(self, piece: _Piece) -> int:
        """Fill the target of a piece; return how many reads it took. Raises LoadError."""
        file, view = piece.run.file, memoryview(piece.target.numpy())  # type: ignore[arg-type]
        done = reads = 0
        while done < len(view) and not self._closed:
            at = piece.offset + done
            try:
                count = os.preadv(piece.descriptor, [view[done:]], at)
            except OSError as error:
                raise LoadError(UNREADABLE.format(file, at, error.strerror or error)) from error
            if not count:
                what = f"it ends before byte {at}, where {len(view) - done} more are wanted"
                raise LoadError(f"{file} is incomplete: {what}; {AGAIN}")
            reads += 1
            done += count
        return reads


def _allocate(count: int, size: int, pinned: bool) -> list[torch.Tensor]:
    """`count` buffers of `size` bytes, whatever the default device is. Raises LoadError."""
    buffers: list[torch.Tensor] = []
    while len(buffers) < count:
        try:
            buffers += [torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)]
        except RuntimeError as error:
            if not pinned:
                what = f"no host memory for {count} buffers of {size} bytes; free some"
                raise LoadError(f"{what}, or run fewer ranks on this machine.") from error
            logger.warning("weights are read through memory that is not page-locked: %s", error)
            pinned = False
    return buffers
