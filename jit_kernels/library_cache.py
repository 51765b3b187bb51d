"""The folder of compiled libraries: which to trust, who builds, and what failed.

`JIT_KERNELS_CACHE` sets the folder; by default it is jit_kernels in the user's cache folder. Beside
`STEM_cu13.so`, built by an nvcc of CUDA 13, lie `STEM.lock`, which is held by who builds it, and
`STEM.failed`, which tells those who waited for it that it failed.

Every problem is an OSError or KernelUnavailable; nothing here waits for ever.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from jit_kernels.choice import KernelUnavailable
from jit_kernels.toolchain import Compiler

VARIABLE = "JIT_KERNELS_CACHE"
POLL_S = 0.05
# What flock says on a file system that has no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
SEAL_BYTES = hashlib.sha256().digest_size

# Which file lay at a path: it differs once another process has built it again.
Identity = tuple[int, int, int]


def cache_folder() -> Path:
    """Where compiled libraries lie."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "jit_kernels"


def make_folder(folder: Path) -> None:
    """Create the folder: the default one for this user alone, a chosen one for all to read."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o755 if os.environ.get(VARIABLE) else 0o700)


def library_path(folder: Path, stem: str, major: int) -> Path:
    """Where the library lies that an nvcc of CUDA `major` builds.

    In the name and not in the digest, so that a machine without nvcc finds what it was given.
    """
    return folder / f"{stem}_cu{major}.so"


def find(folder: Path, stem: str, driver: int | None) -> Path | None:
    """The library of the newest CUDA major that the driver takes, or None.

    driver: as in `toolchain.compilers`. Raises KernelUnavailable where others could have written
    the library: to load it is to run it.
    """
    found = []
    for path in folder.glob(f"{glob.escape(stem)}_cu*.so"):
        major = re.fullmatch(r".*_cu(\d+)\.so", path.name)
        if major and (driver is None or int(major[1]) <= driver):
            found.append((int(major[1]), path))
    if not found:
        return None
    path = max(found)[1]
    try:
        refuse_foreign(path, path.parent, path.resolve().parent)
    except FileNotFoundError:  # another rank has just found it broken
        return None
    return path


def refuse_foreign(*paths: Path) -> None:
    """Raise KernelUnavailable where somebody but this user and root can write one of `paths`."""
    for path in paths:
        status = path.stat()
        if status.st_uid not in (os.getuid(), 0):
            problem = f"belongs to user {status.st_uid}, neither root nor this user"
        elif status.st_mode & stat.S_IWOTH:
            problem = "can be written by every user"
        else:
            continue
        raise KernelUnavailable(
            f"{path} {problem}, so compiled kernels are not loaded from there; change that, or set "
            f"{VARIABLE} to a folder of your own"
        )


def identity(path: Path) -> Identity:
    """Of the file that lies at `path` now; zeros where none does."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0, 0
    return status.st_ino, status.st_mtime_ns, status.st_size


def discard(path: Path, seen: Identity) -> None:
    """Remove the library if it is still the one that was `seen` to be broken."""
    if identity(path) == seen:
        path.unlink(missing_ok=True)


def install(built: Path, path: Path) -> None:
    """Put a library in its place, for all to read and for nobody else to write.

    Its hash goes behind it, which the loader ignores: what a full disk or a power cut has left of a
    library can end the process that loads it.
    """
    with built.open("ab") as file:
        file.write(hashlib.sha256(built.read_bytes()).digest())
    built.chmod(built.stat().st_mode & 0o755)
    os.replace(built, path)


def refuse_damaged(path: Path) -> None:
    """Raise KernelUnavailable where the library is not as it was installed."""
    content = path.read_bytes()
    body, seal = content[:-SEAL_BYTES], content[-SEAL_BYTES:]
    if hashlib.sha256(body).digest() != seal:
        raise KernelUnavailable(f"{path} is damaged")


@contextlib.contextmanager
def locked(path: Path, patience: float) -> Iterator[None]:
    """Hold the lock file `path`; KernelUnavailable where that takes over `patience` seconds.

    On a file system without locks nothing is held: ranks then build the same library side by side,
    each in a folder of its own.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + patience
        while not _lock(handle):
            if time.monotonic() > deadline:
                raise KernelUnavailable(f"another process has held {path} for {patience:.0f} s")
            time.sleep(POLL_S)
        yield
    finally:
        # Explicitly: a process forked meanwhile holds a copy of the handle.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _lock(handle: int) -> bool:
    """Whether the lock is held now, or there are no locks here."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def write_failure(record: Path, message: str, compilers: Sequence[Compiler]) -> None:
    """Tell those who wait for the lock. Not being able to costs them a compile of their own."""
    content = {"message": message, "compilers": _described(compilers), "time": time.time()}
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(dir=record.parent, prefix=".failed-")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(content, file)
            os.replace(name, record)
        except OSError:
            os.unlink(name)


def read_failure(record: Path, compilers: Sequence[Compiler]) -> str:
    """The message of a compile by the same `compilers` that failed in the life of this process.

    "" where there is none. An older record is passed over, so that a restart tries again.
    """
    try:
        content = json.loads(record.read_text())
        if content["time"] < psutil.Process().create_time():
            return ""
        return str(content["message"]) if content["compilers"] == _described(compilers) else ""
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return ""


def _described(compilers: Sequence[Compiler]) -> list[list[object]]:
    return [[str(each.path), list(each.release), each.modified] for each in compilers]
