"""Find the CUDA compilers of this machine, and run one without ever waiting for it for ever.

Several may lie around, and the first is not always the one that can: a distribution's nvcc of
years ago on PATH, or one newer than the driver. So all are listed, in order, and the caller takes
the first that compiles.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jit_kernels.choice import KernelUnavailable

# A kernel of this package takes 12 s on a slow core; all attempts at one share this time. A
# compiler that hangs must not hang the server with it.
TIMEOUT_S = 120
VERSION_TIMEOUT_S = 10
# Lines of a failed compile that say what is wrong.
MEANINGFUL = re.compile(r"error|fatal|not found|unsupported|no such file|undefined", re.IGNORECASE)
MAX_LINES, MAX_LINE = 5, 300
UNKNOWN_TARGET = re.compile(
    r"unsupported gpu architecture|not defined for option 'gpu-name'", re.IGNORECASE
)


class CompileFailed(KernelUnavailable):
    """No compiler of this machine compiles the source; the message says what they said."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """One nvcc. release: of CUDA, such as (12, 8). modified: of its file, in nanoseconds."""

    path: Path
    release: tuple[int, int]
    modified: int


def find_nvcc() -> list[Path]:
    """Every nvcc of CUDA_HOME, PATH, /usr/local/cuda and the package nvidia-cuda-nvcc, in order."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        candidates.extend(sorted(Path(place).glob("cu*/bin/nvcc"), reverse=True))
    found: dict[Path, Path] = {}
    for nvcc in candidates:
        if os.access(nvcc, os.X_OK):
            found.setdefault(nvcc.resolve(), nvcc)
    return list(found.values())


def compilers(driver: int | None = None) -> list[Compiler]:
    """Every nvcc that tells its release and is not too new for the driver, in order.

    driver: the CUDA major that the driver takes, None for any. A library has the CUDA runtime of
    its nvcc inside, which does not start on a driver of an older major. Raises KernelUnavailable
    where no nvcc is left.
    """
    usable, problems = [], []
    for nvcc in find_nvcc():
        try:
            compiler = Compiler(nvcc, _release(nvcc), nvcc.stat().st_mtime_ns)
        except (CompileFailed, OSError) as error:
            problems.append(f"{nvcc}: {error}")
            continue
        if driver is not None and compiler.release[0] > driver:
            release = ".".join(map(str, compiler.release))
            problems.append(f"{nvcc} is CUDA {release}, the driver takes up to CUDA {driver}")
            continue
        usable.append(compiler)
    if usable:
        return usable
    if problems:
        raise KernelUnavailable("no nvcc can be used: " + "; ".join(problems))
    raise KernelUnavailable(
        "no nvcc in CUDA_HOME, PATH or /usr/local/cuda; install the CUDA toolkit, or "
        "`pip install nvidia-cuda-nvcc`"
    )


def base_of(architecture: str) -> str:
    """The first architecture of a family, whose code all of the family run.

    For a compiler that does not know `architecture`. No source here uses what only that one has.

    >>> base_of("103a"), base_of("90a"), base_of("121a"), base_of("89")
    ('100', '90', '120', '80')
    """
    return architecture.rstrip("af")[:-1] + "0"


def driver_major() -> int | None:
    """The CUDA major that the driver takes, None where there is no driver. Starts no device."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        problem = cuda.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    # The toolkit's stub of this library says that it is one.
    return None if problem else version.value // 1000


def compile_with_any(
    found: Sequence[Compiler],
    architectures: Sequence[str],
    command: Callable[[Compiler, str], list[str]],
    name: str,
) -> tuple[Compiler, str]:
    """Compile with the first compiler that can; return it and what it said.

    architectures: in order of preference; another is tried only where a compiler does not know the
    one before. command: what follows the compiler's path. Raises CompileFailed with what matters
    of the messages of all compilers.
    """
    deadline = time.monotonic() + TIMEOUT_S
    problems: list[str] = []
    for compiler in found:
        for architecture in architectures:
            left = deadline - time.monotonic()
            if left <= 0:
                continue
            try:
                return compiler, run([str(compiler.path), *command(compiler, architecture)], left)
            except CompileFailed as error:
                problems.append(f"{compiler.path} {error}")
                if not UNKNOWN_TARGET.search(str(error)):
                    break
    raise CompileFailed(f"{name} does not compile: " + "; ".join(problems))


def run(command: list[str], timeout: float) -> str:
    """Run a compiler and return what it said; CompileFailed with what matters of it."""
    try:
        # A session of its own, so that what nvcc has started ends with it. In English, since its
        # messages are read.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            start_new_session=True,
        )
    except OSError as error:
        raise CompileFailed(f"cannot be started ({error})") from error
    with process:
        try:
            said, _ = process.communicate(timeout=timeout)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise CompileFailed(f"was stopped after {timeout:.0f} s") from error
            raise
    if process.returncode == 0:
        return said
    lines = [line.strip()[:MAX_LINE] for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if MEANINGFUL.search(line)] or lines[-3:]
    raise CompileFailed(
        f"exited with {process.returncode}: " + " | ".join(telling[:MAX_LINES] or ["no message"])
    )


def _release(nvcc: Path) -> tuple[int, int]:
    said = run([str(nvcc), "--version"], VERSION_TIMEOUT_S)
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None:
        raise CompileFailed("does not tell its release")
    return int(found[1]), int(found[2])
