"""What the kernel tells of a process (time, faults, bytes, memory) and of its files (cache)."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Meter:
    """Figures of this process from `start` on, all threads together."""

    def start(self) -> None:
        """From here. The peak of memory is reset, where the kernel allows it."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.peak_reset = True
        except OSError:
            self.peak_reset = False
        self._status, self._io = _table("status"), _table("io")
        self._usage = resource.getrusage(resource.RUSAGE_SELF)
        self._began = time.perf_counter()

    def stop(self) -> dict[str, Any]:
        """Seconds, faults, bytes and memory since `start`.

        rchar: bytes of read calls, whatever they hit; what mmap brings is not among them.
        storage_bytes: fetched from the disk for this process, by read calls or by faults, with
        read-ahead. peak_bytes: growth of resident memory at its highest, mapped file pages
        included. anonymous_bytes: growth that is not file pages, at the end.
        """
        seconds = time.perf_counter() - self._began
        before, usage = self._usage, resource.getrusage(resource.RUSAGE_SELF)
        status, io = _table("status"), _table("io")
        return {
            "seconds": seconds,
            "cpu_seconds": usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime,
            "system_seconds": usage.ru_stime - before.ru_stime,
            "minor_faults": usage.ru_minflt - before.ru_minflt,
            "major_faults": usage.ru_majflt - before.ru_majflt,
            "read_calls": io["syscr"] - self._io["syscr"],
            "rchar": io["rchar"] - self._io["rchar"],
            "storage_bytes": io["read_bytes"] - self._io["read_bytes"],
            "peak_bytes": 1024 * (status["VmHWM"] - self._status["VmRSS"]),
            "anonymous_bytes": 1024 * (status["RssAnon"] - self._status["RssAnon"]),
        }


def _table(name: str) -> dict[str, int]:
    """The numbers of /proc/self/`name`."""
    lines = (line.split() for line in Path(f"/proc/self/{name}").read_text().splitlines())
    return {w[0].rstrip(":"): int(w[1]) for w in lines if len(w) > 1 and w[1].isdecimal()}


def drop_from_cache(files: Iterable[Path]) -> None:
    """Make the kernel forget the pages of files; only written-back pages can be dropped."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def warm_cache(files: Iterable[Path]) -> None:
    """Bring all pages of files into the kernel's cache."""
    buffer = bytearray(1 << 22)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def cached_bytes(files: Iterable[Path]) -> int:
    """How much of the files is in the kernel's cache (mincore)."""
    return sum(map(_cached_bytes, files))


def _cached_bytes(file: Path) -> int:
    size = file.stat().st_size
    with file.open("rb") as stream:
        address = LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, stream.fileno(), 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    if LIBC.mincore(address, size, pages):
        raise OSError(ctypes.get_errno(), "mincore")
    LIBC.munmap(address, size)
    return sum(page & 1 for page in bytes(pages)) * mmap.PAGESIZE


def filesystem(path: Path) -> str:
    """Type of the filesystem that holds `path`, such as ext4."""
    best, found = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind = line.split()[:3]
        if path.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, found = mount, kind
    return found


def read_ahead_kib(path: Path) -> int | None:
    """How far the kernel reads ahead on the disk of `path`: what one page fault may fetch."""
    device = os.stat(path).st_dev
    disk = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    for queue in (disk / "queue", disk.parent / "queue"):  # a partition has its disk's
        if queue.is_dir():
            return int((queue / "read_ahead_kb").read_text())
    return None
