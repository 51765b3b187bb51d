"""Compile CUDA sources on first use and load them through apache-tvm-ffi.

A kernel is a small generated source that includes a header and instantiates it for one shape. The
library lies in a cache folder under a name that hashes everything it was made from, so that later
processes, and machines without a compiler that were given the folder, only load it. Ranks that
start together take a file lock: one compiles, the others load.

`JIT_KERNELS_CACHE` sets the folder; by default it is jit_kernels in the user's cache folder.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jit_kernels.choice import KernelUnavailable

ROOT = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3")
LIBRARY_FLAGS = ("-shared", "-Xcompiler", "-fPIC")
# A kernel of this package takes seconds; a compiler that hangs must not hang the server with it.
TIMEOUT_S = 600
# Lines of a failed compile that say what is wrong.
MEANINGFUL = re.compile(r"error|fatal|not found|unsupported|no such file|undefined", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Unit:
    """What is compiled: a generated source, for one architecture.

    name: a short one, for people who look into the cache folder. text: the source; its includes
    are relative to this package. arch: as nvcc writes it, without "sm_" ("80", "90a").
    """

    name: str
    text: str
    arch: str


@dataclass(frozen=True, slots=True)
class Resources:
    """What ptxas reports of one kernel."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def architecture(capability: tuple[int, int]) -> str:
    """The architecture to compile for: with its own features from Hopper on.

    >>> architecture((8, 0)), architecture((9, 0)), architecture((10, 0))
    ('80', '90a', '100a')
    """
    major, minor = capability
    return f"{major}{minor}" + ("a" if major >= 9 else "")


def load(unit: Unit) -> Any:
    """Return the tvm-ffi module of `unit`, compiled now unless the cache has it.

    Raises KernelUnavailable with the compiler's message, or in one sentence where there is no
    compiler, no tvm-ffi, or no folder to write to.
    """
    try:
        path = library(unit)
        import tvm_ffi  # takes seconds where torch is not loaded yet

        return tvm_ffi.load_module(str(path))
    except ImportError as error:
        raise KernelUnavailable(f"apache-tvm-ffi cannot be imported: {error}") from error
    except (OSError, RuntimeError) as error:
        if isinstance(error, KernelUnavailable):
            raise
        raise KernelUnavailable(f"{unit.name} cannot be built or loaded: {error}") from error


def library(unit: Unit) -> Path:
    """Return the shared library of `unit`, compiled now unless the cache has it."""
    folder = cache_folder()
    path = folder / f"{unit.name}_sm{unit.arch}_{_digest(unit)}.so"
    if path.exists():
        return path
    nvcc = find_nvcc()
    from tvm_ffi.utils import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(path.with_suffix(".lock"))):
        if not path.exists():  # else another rank compiled it while this one waited
            source, partial = path.with_suffix(".cu"), path.with_suffix(".partial")
            source.write_text(unit.text)
            _run([str(nvcc), *_arguments(unit, nvcc), "-o", str(partial), str(source)], unit.name)
            os.replace(partial, path)
    return path


def resources(unit: Unit, folder: Path) -> Resources:
    """Compile `unit`, which holds one kernel, to nothing but machine code and read ptxas's report.

    folder: where the source and the output go. Needs no GPU and nothing to link against.
    """
    nvcc = find_nvcc()
    source = folder / f"{unit.name}_{unit.arch}.cu"
    source.write_text(unit.text)
    command = [str(nvcc), *FLAGS, *_target(unit), f"-I{ROOT}", "-Xptxas", "-v", "-cubin"]
    report = _run([*command, "-o", str(source.with_suffix(".cubin")), str(source)], unit.name)
    return parse_resources(report)


def parse_resources(report: str) -> Resources:
    """Read `ptxas -v`; ValueError where it does not tell of exactly one kernel."""
    registers = re.findall(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    shared = re.findall(r"(\d+) bytes smem", report)
    if len(registers) != 1 or len(spills) != 1:
        raise ValueError(f"ptxas tells of {len(registers)} kernels, not one:\n{report}")
    return Resources(
        registers=int(registers[0]),
        spill_bytes=sum(map(int, spills[0])),
        shared_bytes=int(shared[0]) if shared else 0,
    )


def cache_folder() -> Path:
    """Where compiled libraries lie."""
    if chosen := os.environ.get("JIT_KERNELS_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "jit_kernels"


def find_nvcc() -> Path:
    """The CUDA compiler: of CUDA_HOME, PATH, /usr/local/cuda or the package nvidia-cuda-nvcc."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        candidates.extend(sorted(Path(place).glob("cu*/bin/nvcc"), reverse=True))
    for nvcc in candidates:
        if os.access(nvcc, os.X_OK):
            return nvcc
    raise KernelUnavailable(
        "no nvcc in CUDA_HOME, PATH or /usr/local/cuda; install the CUDA toolkit, or "
        "`pip install nvidia-cuda-nvcc`"
    )


def _target(unit: Unit) -> list[str]:
    return [f"-gencode=arch=compute_{unit.arch},code=sm_{unit.arch}"]


def _arguments(unit: Unit, nvcc: Path) -> list[str]:
    """Everything but the files of a compile to a shared library."""
    from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path, find_libtvm_ffi

    includes = dict.fromkeys([str(ROOT), find_include_path(), find_dlpack_include_path()])
    # The package nvidia-cuda-nvcc keeps the runtime in lib, which nvcc does not search.
    runtime = nvcc.resolve().parent.parent / "lib"
    folders = [str(Path(find_libtvm_ffi()).parent), *([str(runtime)] if runtime.is_dir() else [])]
    return [
        *(*FLAGS, *LIBRARY_FLAGS, *_target(unit)),
        *(f"-I{folder}" for folder in includes),
        *(f"-L{folder}" for folder in folders),
        "-ltvm_ffi",
    ]


def _run(command: list[str], name: str) -> str:
    """Run the compiler; return what it said, or raise KernelUnavailable with what matters of it."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise KernelUnavailable(f"compiling {name} took over {TIMEOUT_S} s") from error
    if done.returncode == 0:
        return done.stdout
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    telling = [line for line in lines if MEANINGFUL.search(line)] or lines[-3:]
    raise KernelUnavailable(
        f"{name} does not compile ({command[0]} exited with {done.returncode}): "
        + " | ".join(telling[:5])
    )


def _digest(unit: Unit) -> str:
    """Of everything that the library is made from, except the compiler that happens to make it."""
    digest = hashlib.sha256()
    ffi = importlib.metadata.version("apache-tvm-ffi")
    digest.update("\0".join([unit.text, unit.arch, *FLAGS, *LIBRARY_FLAGS, ffi]).encode())
    digest.update(_headers_digest())
    return digest.hexdigest()[:16]


@functools.cache
def _headers_digest() -> bytes:
    """Of every header of the package, each with its place."""
    digest = hashlib.sha256()
    for path in sorted(ROOT.rglob("*.cuh")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()
