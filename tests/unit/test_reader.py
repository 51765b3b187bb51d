"""Reading spans of files: the bytes, what they cost, and how it ends when something goes wrong."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import logging
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_minimax.errors import LoadError
from sglang_minimax.loading import reader as reader_module
from sglang_minimax.loading.progress import progress_bar
from sglang_minimax.loading.reader import ALIGN, GAP, Reader, Span, typed

SMALL = 4096  # bytes of the smallest run buffer
ROOM = SMALL - ALIGN
HANG = 20  # seconds; what is tested ends in one or two

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool),
]


def contents(length: int, seed: int = 0) -> bytes:
    """Bytes in which no two stretches are alike."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(0, 256, (length,), dtype=torch.uint8, generator=generator)
    return bytes(made.tolist())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    path.write_bytes(contents(400_000))
    return path


def reader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("weights-")]


def descriptors() -> set[str]:
    """Open descriptors of this process, as what they lead to."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return found


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """No test here leaves a thread, or an open file of its own, behind."""
    yield
    assert not reader_threads()
    assert not [entry for entry in descriptors() if str(tmp_path) in entry]


def read_all(reader: Reader) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for index, data in reader:
        assert data.dtype == torch.uint8
        assert data.dim() == 1
        assert data.is_contiguous()
        assert index not in found, "an index came twice"
        found[index] = bytes(data.tolist())
    return found


def check(spans: list[Span], reader: Reader) -> None:
    """All spans arrive with the bytes of their files."""
    found = read_all(reader)
    assert sorted(found) == list(range(len(spans)))
    for index, span in enumerate(spans):
        whole = span.file.read_bytes()
        assert found[index] == whole[span.offset : span.offset + span.length]


# --- the bytes, and what they cost -----------------------------------------------------------

LENGTHS = (30_000, 5_000, 1)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        for number, length in enumerate(LENGTHS):
            (Path(name) / f"{number}.bin").write_bytes(contents(length, number))
        yield Path(name)


@st.composite
def plans(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """(file, offset, length), overlapping or not, in any order."""
    plan = []
    for _ in range(draw(st.integers(0, 25))):
        number = draw(st.sampled_from(range(len(LENGTHS))))
        offset = draw(st.integers(0, LENGTHS[number]))
        longest = LENGTHS[number] - offset
        length = draw(st.integers(0, min(longest, 600)) | st.integers(0, longest))
        plan.append((number, offset, length))
    return plan


@given(
    plan=plans(),
    threads=st.integers(1, 5),
    buffers=st.none() | st.integers(1, 4),
    run_bytes=st.sampled_from([SMALL, 5000, 9001, 1 << 16]),
)
@settings(max_examples=150, deadline=None)
def test_any_spans_arrive_once_and_whole(
    folder: Path,
    plan: list[tuple[int, int, int]],
    threads: int,
    buffers: int | None,
    run_bytes: int,
) -> None:
    spans = [Span(folder / f"{number}.bin", offset, length) for number, offset, length in plan]
    reader = Reader(spans, threads=threads, buffers=buffers, run_bytes=run_bytes)
    check(spans, reader)
    stats = reader.stats
    assert stats.bytes_wanted == sum(length for _, _, length in plan)
    covered, gaps = coverage(plan)
    assert stats.bytes_requested >= covered
    # No overlap is read twice within a run: without overlaps only small gaps come on top.
    if covered == stats.bytes_wanted:
        assert stats.bytes_requested - covered <= gaps
    else:
        assert stats.bytes_requested <= stats.bytes_wanted + gaps
    if covered == 0:
        assert stats.reads == stats.files == 0
    assert stats.files == len({number for number, _, length in plan if length})
    assert stats.reads <= stats.bytes_requested // (run_bytes - ALIGN) + len(plan)


def coverage(plan: list[tuple[int, int, int]]) -> tuple[int, int]:
    """How many bytes the spans cover, and how many lie in gaps of GAP bytes at most."""
    covered = gaps = 0
    for number, length in enumerate(LENGTHS):
        mask = bytearray(length)
        for which, offset, size in plan:
            if which == number:
                mask[offset : offset + size] = b"\1" * size
        covered += sum(mask)
        between = bytes(mask).strip(b"\0").split(b"\1")
        gaps += sum(len(gap) for gap in between if len(gap) <= GAP)
    return covered, gaps


def test_neighbours_are_read_together(file: Path) -> None:
    spans = [Span(file, 8 + 100 * number, 100) for number in range(1000)]
    reader = Reader(spans[::-1], run_bytes=1 << 16, threads=2)
    check(spans[::-1], reader)
    assert reader.stats.bytes_requested == reader.stats.bytes_wanted == 100_000
    assert reader.stats.reads == 2


@pytest.mark.parametrize(("gap", "reads"), [(0, 1), (GAP, 1), (GAP + 1, 2)])
def test_only_a_small_gap_is_read_along(file: Path, gap: int, reads: int) -> None:
    reader = Reader([Span(file, 0, 10), Span(file, 10 + gap, 10)])
    read_all(reader)
    assert reader.stats.reads == reads
    assert reader.stats.bytes_requested == 20 + (gap if reads == 1 else 0)


def test_overlapping_spans_are_read_once(file: Path) -> None:
    spans = [Span(file, 100, 1000), Span(file, 100, 1000), Span(file, 600, 1000)]
    reader = Reader(spans)
    check(spans, reader)
    assert (reader.stats.bytes_requested, reader.stats.reads) == (1500, 1)


def test_a_long_span_is_read_in_pieces_by_several_threads(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(3)
    names = set()
    real = os.preadv

    def preadv(*arguments: object) -> int:
        names.add(threading.current_thread().name)
        together.wait(HANG)  # breaks unless three read at a time
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", preadv)
    spans = [Span(file, 24, 10), Span(file, 24, 6 * ROOM), Span(file, 48, 10)]  # all inside one
    reader = Reader(spans, threads=3, run_bytes=SMALL)
    check(spans, reader)
    assert len(names) == 3
    assert (reader.stats.reads, reader.stats.bytes_requested) == (6, 6 * ROOM)


def test_all_threads_start_for_a_long_span_behind_a_short_one(file: Path) -> None:
    reader = Reader([Span(file, 0, 9), Span(file, 9000, 9 * ROOM)], threads=4, run_bytes=SMALL)
    with reader:
        next(iterator := iter(reader))
        assert len(reader_threads()) == 4
        del iterator


def test_empty_spans_need_no_file(tmp_path: Path) -> None:
    reader = Reader([Span(tmp_path / "none", 5, 0), Span(tmp_path / "none", 0, 0)])
    assert read_all(reader) == {0: b"", 1: b""}
    assert (reader.stats.reads, reader.stats.files, reader.host_bytes_bound) == (0, 0, 0)


def test_short_reads_are_continued(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
        return real(descriptor, [views[0][:700]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    spans = [Span(file, 3, 3000), Span(file, 50_000, 2000)]
    reader = Reader(spans)
    check(spans, reader)
    assert reader.stats.reads == 5 + 3
    assert reader.stats.bytes_requested == 5000


def test_a_symlink_is_followed(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    spans = [Span(link, 77, 999)]
    check(spans, Reader(spans))


def test_many_files_few_descriptors(tmp_path: Path) -> None:
    spans = []
    for number in range(300):
        path = tmp_path / f"{number:03}"
        path.write_bytes(contents(50, number))
        spans += [Span(path, 1, 9), Span(path, 20, 9)]
    gc.collect()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max_descriptor() + 1 + 10 + 2 + 2, hard))
    try:  # by default 10 buffers; two more belong to the check of each item
        found = read_all(reader := Reader(spans))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(found) == 600
    assert reader.stats.files == 300


def max_descriptor() -> int:
    return max(map(int, os.listdir("/proc/self/fd")))


def test_a_file_is_opened_once_and_closed_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = os.open

    def spy(path: object, flags: int, *rest: object, **more: object) -> int:
        opened.append((path, flags))
        return real(path, flags, *rest, **more)  # type: ignore[call-overload, no-any-return]

    spans = []
    for name in "ab":
        (tmp_path / name).write_bytes(contents(90_000))
        spans += [Span(tmp_path / name, offset, 10) for offset in range(0, 80_000, 8_000)]
    monkeypatch.setattr(os, "open", spy)
    reader = Reader(spans, buffers=1)
    for index, _ in reader:
        is_open = [n for n in "ab" if any(str(tmp_path / n) in d for d in descriptors())]
        assert is_open == (["a"] if index < 9 else ["b"] if 9 < index < 19 else [])
    monkeypatch.undo()
    mine = [(p, flags) for p, flags in opened if p in (tmp_path / "a", tmp_path / "b")]
    assert mine == [(tmp_path / n, os.O_RDONLY | os.O_CLOEXEC) for n in "ab"]


@pytest.mark.parametrize(
    ("offsets", "advice"),
    [(range(0, 80_000, 8_000), "RANDOM"), (range(0, 80_000, 5_000), "SEQUENTIAL")],
)
def test_read_ahead_is_off_where_it_would_fetch_gaps(
    file: Path, monkeypatch: pytest.MonkeyPatch, offsets: range, advice: str
) -> None:
    given = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: given.append(arguments[3]))
    read_all(Reader([Span(file, offset, 2_000) for offset in offsets], run_bytes=1 << 16))
    assert given == [getattr(os, f"POSIX_FADV_{advice}")]


# --- memory ----------------------------------------------------------------------------------


class Allocations:
    """The buffers that are made, and how many bytes of them are alive at most."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[torch.UntypedStorage]] = []
        self.bytes = 0
        self.pinned: list[bool] = []
        self.real = reader_module._allocate

    def __call__(self, count: int, size: int, pinned: bool) -> list[torch.Tensor]:
        self.pinned += [pinned] * count
        buffers = self.real(count, size, pinned)
        self.made += [weakref.ref(buffer) for buffer in buffers]
        self.bytes += sum(buffer.untyped_storage().nbytes() for buffer in buffers)
        return buffers

    def alive(self) -> int:
        return sum(made() is not None for made in self.made)


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> Allocations:
    made = Allocations()
    monkeypatch.setattr(reader_module, "_allocate", made)
    return made


def test_buffers_are_few_and_used_again(file: Path, allocations: Allocations) -> None:
    spans = [Span(file, number * 10_000, 3_000) for number in range(20)]
    spans += [Span(file, 200_000 + number * 20_000, 9_000 + number) for number in range(4)]
    reader = Reader(spans, threads=4, buffers=3, run_bytes=SMALL)
    bound = 3 * (3_000 + ALIGN) + 9_003 + ALIGN
    storages = set()
    for index, data in reader:
        storages.add((index >= 20, data.untyped_storage().data_ptr()))
    assert reader.host_bytes_bound == allocations.bytes == bound
    assert len(allocations.made) == 4
    assert len({pointer for long, pointer in storages if not long}) <= 3
    assert len({pointer for long, pointer in storages if long}) == 1


def test_bound_of_the_default_is_its_buffers(file: Path, tmp_path: Path) -> None:
    spans = [Span(file, number * ROOM, ROOM) for number in range(90)]
    assert Reader(spans, run_bytes=SMALL, threads=8).host_bytes_bound == 10 * SMALL
    assert Reader(spans[:2], run_bytes=SMALL).host_bytes_bound == 2 * SMALL
    # Torch makes page-locked buffers a power of two; run_bytes is one, so that nothing is lost.
    assert Reader(spans, run_bytes=SMALL, pinned=True).host_bytes_bound == 10 * SMALL
    uneven = [Span(file, number * 9_000, 2_100) for number in range(9)]
    assert Reader(uneven, run_bytes=SMALL, pinned=True).host_bytes_bound == 9 * 4096


def test_long_spans_are_never_page_locked(file: Path, allocations: Allocations) -> None:
    spans = [Span(file, 0, 10), Span(file, 50_000, 10), Span(file, 100_000, 9_000)]
    read_all(Reader(spans, run_bytes=SMALL, pinned=True))
    assert allocations.pinned == [True, True, False]


def test_buffers_are_dropped_with_the_iteration(file: Path, allocations: Allocations) -> None:
    spans = [Span(file, number * 10_000, 3_000) for number in range(20)]
    with Reader([*spans, Span(file, 0, 9_000)], buffers=2, run_bytes=SMALL) as reader:
        for _ in reader:
            time.sleep(0.05)  # results that nobody has asked for arrive
            break
        del _
        gc.collect()
    assert allocations.made
    assert allocations.alive() == 0


@pytest.mark.parametrize("buffers", [1, 2, 5])
def test_a_tensor_stays_as_it_is_until_the_next(file: Path, buffers: int) -> None:
    whole = file.read_bytes()
    spans = [Span(file, number * 8_000, 500) for number in range(12)]
    spans += [Span(file, 200_000, 9_000), Span(file, 250_000, 9_000)]
    for index, data in Reader(spans, buffers=buffers, threads=3, run_bytes=SMALL):
        time.sleep(0.02)  # time for a thread to write where it must not
        span = spans[index]
        assert bytes(data.tolist()) == whole[span.offset : span.offset + span.length]


def test_buffers_are_host_memory_whatever_the_default_device(file: Path) -> None:
    spans = [Span(file, 0, 100), Span(file, 0, 0), Span(file, 0, 9_000)]
    with torch.device("meta"):
        for _, data in Reader(spans, run_bytes=SMALL):
            assert data.device.type == "cpu"


def test_memory_that_is_not_there_is_a_load_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    reader = Reader([Span(tmp_path / "a", 0, 1 << 60)])
    with pytest.raises(LoadError, match="no host memory"):
        read_all(reader)


@pytest.mark.skipif(torch.cuda.is_available(), reason="page-locking works where there is a GPU")
def test_without_a_device_ordinary_memory_serves(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spans = [Span(file, number * 10_000, 3_000) for number in range(20)]
    with caplog.at_level(logging.WARNING):
        check(spans, Reader(spans, pinned=True))
    assert len(caplog.records) == 1


# --- alignment -------------------------------------------------------------------------------


@pytest.mark.parametrize("run_bytes", [SMALL, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aligned_bytes_are_viewed_as_any_type(
    file: Path, dtype: torch.dtype, run_bytes: int
) -> None:
    size = dtype.itemsize
    whole = file.read_bytes()
    spans = [Span(file, offset, 6 * size) for offset in (16, 1000, 1000 + 6 * size, 40_008)]
    spans += [Span(file, 80_000 + 48, 12_000)]  # a long one
    for index, data in Reader(spans, run_bytes=run_bytes):
        span = spans[index]
        assert data.data_ptr() % ALIGN == span.offset % ALIGN
        assert data.storage_offset() % ALIGN == span.offset % ALIGN
        shape = (span.length // size // 3, 3)
        found = typed(data, dtype, shape)
        assert (found.dtype, tuple(found.shape)) == (dtype, shape)
        assert found.data_ptr() == data.data_ptr(), "copied"
        assert found.view(torch.uint8).flatten().tolist() == list(
            whole[span.offset : span.offset + span.length]
        )


def test_unaligned_bytes_are_copied(file: Path) -> None:
    whole = file.read_bytes()
    ((_, data),) = Reader([Span(file, 17, 24)])
    found = typed(data, torch.float64, (3,))
    assert found.data_ptr() != data.data_ptr()
    assert found.view(torch.uint8).tolist() == list(whole[17:41])
    assert typed(data[:0], torch.bfloat16, (0, 7)).shape == (0, 7)
    assert typed(data[:2], torch.bfloat16, ()).shape == ()


def test_a_type_that_does_not_fit_is_refused(file: Path) -> None:
    ((_, data),) = Reader([Span(file, 0, 24)])
    with pytest.raises(LoadError, match=r"24 bytes are no torch.float64 tensor of \[4\]"):
        typed(data, torch.float64, (4,))


# --- what goes wrong -------------------------------------------------------------------------


def many(file: Path) -> list[Span]:
    return [Span(file, number * 10_000, 3_000) for number in range(20)]


def test_a_file_that_ends_early_is_named(file: Path) -> None:
    os.truncate(file, 131_000)
    with pytest.raises(LoadError) as raised:
        read_all(Reader(many(file)))
    # Later spans may be noticed first.
    message = str(raised.value)
    assert str(file) in message
    assert "incomplete" in message
    assert message.endswith("copy or download it again.")
    with pytest.raises(LoadError, match="ends before byte 131000, where 2000 more are wanted"):
        read_all(Reader([Span(file, 130_000, 3_000)]))


def test_a_file_that_is_missing_is_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"zzz cannot be read .*No such file"):
        read_all(Reader([*many(file), Span(tmp_path / "zzz", 0, 1)]))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="Is a directory"):
        read_all(Reader([Span(tmp_path, 0, 1)]))


def test_impossible_spans_are_refused(file: Path) -> None:
    for span in (Span(file, -1, 1), Span(file, 1, -1)):
        with pytest.raises(LoadError, match="impossible"):
            Reader([span])


FAILURES = [
    (OSError(errno.EIO, "Input/output error"), r"safetensors cannot be read at byte 70000 \(Input"),
    (SystemExit(3), r"ended unexpectedly: SystemExit\(3\)"),
    (MemoryError(), r"ended unexpectedly: MemoryError\(\)"),
    (KeyboardInterrupt(), r"ended unexpectedly: KeyboardInterrupt\(\)"),
    (ValueError("odd"), r"ended unexpectedly: ValueError\('odd'\)"),
]


@pytest.mark.timeout(HANG)
@pytest.mark.parametrize(("error", "message"), FAILURES, ids=lambda v: type(v).__name__)
def test_an_error_in_a_thread_reaches_the_consumer(
    file: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str
) -> None:
    real = os.preadv

    def preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
        if offset == 70_000:
            raise error
        return real(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(LoadError, match=message) as raised:
        read_all(Reader(many(file), threads=3))
    assert raised.value.__cause__ is error


@pytest.mark.timeout(HANG)
def test_a_thread_that_dies_without_a_trace_is_noticed(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Reader._work

    def work(self: Reader) -> None:
        if threading.current_thread().name == "weights-1":
            self._tasks.get()  # and is gone with the piece
        else:
            real(self)

    monkeypatch.setattr(Reader, "_work", work)
    with pytest.raises(LoadError, match="ended unexpectedly: it left no error"):
        read_all(Reader(many(file), threads=3))


@pytest.mark.timeout(HANG)
def test_a_thread_that_does_not_start_is_a_load_error(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = threading.Thread.start

    def start(self: threading.Thread) -> None:
        if self.name == "weights-2":
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(LoadError, match="ulimit -u"):
        read_all(Reader(many(file), threads=4))


# --- the end ---------------------------------------------------------------------------------


def slow_preadv(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Reads take 20 ms; their offsets."""
    offsets: list[int] = []
    real = os.preadv

    def preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
        offsets.append(offset)
        time.sleep(0.02)
        return real(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return offsets


@pytest.mark.timeout(HANG)
@pytest.mark.parametrize("how", ["break", "generator", "exception", "close", "del"])
def test_a_consumer_that_stops_leaves_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    offsets = slow_preadv(monkeypatch)
    before = descriptors()
    reader = Reader(many(file), threads=4)
    iterator = iter(reader)
    next(iterator)
    assert len(reader_threads()) == 4
    if how == "break":
        for _ in iterator:
            break
        del iterator
    elif how == "generator":
        iterator.close()  # type: ignore[attr-defined]
    elif how == "exception":
        with contextlib.suppress(KeyError), reader:
            for _ in iterator:
                raise KeyError
    elif how == "close":
        reader.close()
    else:
        del iterator
    assert not reader_threads()
    assert descriptors() == before
    assert len(offsets) < 20, "the rest was read all the same"


@pytest.mark.timeout(HANG)
def test_a_long_span_is_given_up_between_pieces(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets = slow_preadv(monkeypatch)
    reader = Reader([Span(file, 0, 10), Span(file, 9_000, 90 * ROOM)], threads=2, run_bytes=SMALL)
    with reader:
        next(iter(reader))
    assert len(offsets) < 20


@pytest.mark.timeout(HANG)
def test_the_collector_may_end_it_in_one_of_its_threads(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    taken = threading.Event()

    def preadv(descriptor: int, views: list[memoryview], offset: int) -> int:
        if offset == 30_000:
            taken.wait(HANG)
            reader.close()
        return real(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    reader = Reader(many(file), threads=3)
    iterator = iter(reader)
    next(iterator)
    threads = reader_threads()
    assert len(threads) == 3
    taken.set()
    for thread in threads:
        thread.join(HANG / 4)
    assert not reader_threads()
    assert not [entry for entry in descriptors() if str(file) in entry]
    del iterator


def test_a_closed_reader_says_so(file: Path) -> None:
    with Reader(many(file)) as reader:
        iterator = iter(reader)
        next(iterator)
    with pytest.raises(LoadError, match="closed early"):
        next(iterator)
    with pytest.raises(RuntimeError, match="once"):
        next(iter(reader))


def test_threads_are_daemons_and_start_with_the_iteration(file: Path) -> None:
    iterator = iter(Reader(many(file)))
    assert not reader_threads()
    next(iterator)
    assert reader_threads()
    assert all(thread.daemon for thread in reader_threads())
    del iterator


FORGOTTEN = """
import os, sys, time
from pathlib import Path
from sglang_minimax.loading.reader import Reader, Span
real = os.preadv
def preadv(descriptor, views, offset):
    if offset:
        time.sleep(600)  # a disk that hangs
    return real(descriptor, views, offset)
os.preadv = preadv
keep = iter(Reader([Span(Path(__file__), 0, 9), Span(Path(__file__), 9000, 1)], threads=2))
next(keep)
sys.modules["kept"] = keep
os.write(1, b"leaving")
"""


def test_a_read_that_hangs_does_not_keep_the_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(FORGOTTEN)
    done = subprocess.run([sys.executable, script], capture_output=True, timeout=120, check=True)
    assert done.stdout == b"leaving"


def test_a_forked_child_reads_with_threads_of_its_own(file: Path) -> None:
    reader = Reader(many(file))
    other = iter(Reader(many(file)))
    next(other)  # threads of the parent are at it
    child = os.fork()
    if child == 0:
        try:
            found = read_all(reader)
            os._exit(0 if len(found) == 20 else 1)
        except BaseException:
            os._exit(2)
    deadline = time.monotonic() + HANG
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    if status[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert status == (child, 0)
    del other


@pytest.mark.timeout(HANG)
@pytest.mark.parametrize("hangs", [False, True], ids=["between", "waiting"])
def test_another_rank_can_stop_it(file: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool) -> None:
    monkeypatch.setattr(reader_module, "POLL_SECONDS", 0.05)
    released = threading.Event()
    if hangs:
        monkeypatch.setattr(os, "preadv", lambda *_: released.wait(HANG) and 0)
    asked: list[float] = []

    def stop() -> str | None:
        asked.append(time.monotonic())
        if len(asked) < 4:
            return None
        released.set()
        return "rank 3 failed."

    def slowly(reader: Reader) -> None:
        for _ in reader:
            time.sleep(0.02)

    with pytest.raises(LoadError, match=r"^rank 3 failed\.$"):
        slowly(Reader(many(file), stop=stop))
    assert min(b - a for a, b in itertools.pairwise(asked)) >= 0.04, "asked too often"


# --- progress --------------------------------------------------------------------------------


class Bar:
    def __init__(self) -> None:
        self.total = 0
        self.closed = False

    def update(self, n: int, /) -> None:
        assert not self.closed
        self.total += n

    def close(self) -> None:
        self.closed = True


def test_progress_sums_up_to_what_is_wanted(file: Path) -> None:
    bar = Bar()
    read_all(reader := Reader(many(file), progress=bar))
    assert bar.total == reader.stats.bytes_wanted
    assert bar.closed
    assert reader.stats.seconds > 0


def test_a_bar_is_closed_after_an_error(tmp_path: Path) -> None:
    bar = Bar()
    with pytest.raises(LoadError):
        read_all(Reader([Span(tmp_path / "none", 0, 1)], progress=bar))
    assert bar.closed


def test_the_bar_is_quiet_in_a_log_and_on_other_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    for enabled in (False, True):
        bar = progress_bar(1_000_000, enabled)
        for _ in range(1000):
            bar.update(1000)
        assert threading.active_count() == before
        bar.close()
        written = capsys.readouterr().err
        assert bool(written) == enabled
    assert written.count("Loading weights") <= 3  # at the start, at the end, and 5 s may pass
    assert "1.00M/1.00M" in written
