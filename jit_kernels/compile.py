"""Compile CUDA sources on first use and load them through apache-tvm-ffi.

A kernel is a small generated source that includes a header and instantiates it for one shape, which
takes about 12 s. The library lies in a cache folder (library_cache.py) under a name that hashes
what it is made from, and says the CUDA major of the nvcc (toolchain.py) that made it, so that later
processes, and machines without a compiler that were given the folder, only load it. Of ranks that
start together one compiles, and the others load what it made or hear why it could not; where the
file system has no locks, each compiles.

Whatever goes wrong is KernelUnavailable, on which the caller takes another implementation.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jit_kernels import library_cache as cache
from jit_kernels import toolchain
from jit_kernels.choice import KernelUnavailable, one_line
from jit_kernels.toolchain import CompileFailed, Compiler

ROOT = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3")
LIBRARY_FLAGS = ("-shared", "-Xcompiler", "-fPIC")
# Who holds the lock compiles for TIMEOUT_S at most.
PATIENCE_S = toolchain.TIMEOUT_S + 30


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

    A library that cannot be loaded is built again, once. Raises nothing but KernelUnavailable: with
    the compiler's message, or in one sentence where there is no compiler, no tvm-ffi, or no folder
    to write to.
    """
    try:
        import tvm_ffi  # takes seconds where torch is not loaded yet

        path = library(unit)
        seen = cache.identity(path)
        try:
            return _open(tvm_ffi, path)
        except Exception as error:
            problem = one_line(error)
        try:
            path = library(unit, broken=(path, seen))
        except KernelUnavailable as error:
            raise KernelUnavailable(
                f"{path} cannot be loaded ({problem}) nor built again: {error}"
            ) from error
        return _open(tvm_ffi, path)
    except KernelUnavailable:
        raise
    except ImportError as error:
        raise KernelUnavailable(f"apache-tvm-ffi cannot be imported: {error}") from error
    except Exception as error:
        raise KernelUnavailable(
            f"{unit.name} cannot be built or loaded: {one_line(error)}"
        ) from error


def library(unit: Unit, broken: tuple[Path, cache.Identity] | None = None) -> Path:
    """Return the shared library of `unit`, compiled now unless the cache has it.

    broken: a library that could not be loaded, to be built again unless another rank did so.
    Raises KernelUnavailable.
    """
    folder = cache.cache_folder()
    try:
        return _library(unit, folder, broken)
    except OSError as error:
        raise KernelUnavailable(
            f"{folder} cannot hold compiled kernels ({error}); set {cache.VARIABLE} to a folder "
            "that can be written"
        ) from error


def _library(unit: Unit, folder: Path, broken: tuple[Path, cache.Identity] | None) -> Path:
    stem = f"{unit.name}_sm{unit.arch}_{_digest(unit)}"
    driver = toolchain.driver_major()
    # Without the lock, which a folder that can only be read does not give.
    if broken is None and (path := cache.find(folder, stem, driver)):
        return path
    found = toolchain.compilers(driver)
    cache.make_folder(folder)
    cache.refuse_foreign(folder)
    record = folder / f"{stem}.failed"
    with cache.locked(folder / f"{stem}.lock", PATIENCE_S):
        if broken is not None:
            cache.discard(*broken)
        if path := cache.find(folder, stem, driver):  # another rank was first
            return path
        if message := cache.read_failure(record, found):
            raise CompileFailed(message)
        try:
            path = _build(unit, folder, stem, found)
        except CompileFailed as error:
            cache.write_failure(record, str(error), found)
            raise
        record.unlink(missing_ok=True)
        return path


def _build(unit: Unit, folder: Path, stem: str, found: list[Compiler]) -> Path:
    """Compile in a folder of its own, which no other process writes to, and install the library."""
    with tempfile.TemporaryDirectory(
        dir=folder, prefix=".build-", ignore_cleanup_errors=True
    ) as own:
        source, output = Path(own) / f"{unit.name}.cu", Path(own) / f"{unit.name}.so"
        source.write_text(unit.text, encoding="utf-8")

        def command(compiler: Compiler, arch: str) -> list[str]:
            return [*_arguments(compiler, arch), "-o", str(output), str(source)]

        compiler, _ = toolchain.compile_with_any(found, _targets(unit), command, unit.name)
        path = cache.library_path(folder, stem, compiler.release[0])
        cache.install(output, path)
    return path


def resources(unit: Unit, folder: Path) -> Resources:
    """Compile `unit`, which holds one kernel, to nothing but machine code and read ptxas's report.

    folder: where the source and the output go. Needs no GPU and nothing to link against.
    """
    source = folder / f"{unit.name}_{unit.arch}.cu"
    source.write_text(unit.text, encoding="utf-8")
    output = str(source.with_suffix(".cubin"))

    def command(_: Compiler, arch: str) -> list[str]:
        flags = [*FLAGS, _code(arch), f"-I{ROOT}", "-Xptxas", "-v", "-cubin"]
        return [*flags, "-o", output, str(source)]

    found = toolchain.compilers()
    _, report = toolchain.compile_with_any(found, [unit.arch], command, unit.name)
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


def _open(tvm_ffi: Any, path: Path) -> Any:
    cache.refuse_damaged(path)
    return tvm_ffi.load_module(str(path))


def _targets(unit: Unit) -> list[str]:
    return list(dict.fromkeys([unit.arch, toolchain.base_of(unit.arch)]))


def _code(arch: str) -> str:
    return f"-gencode=arch=compute_{arch},code=sm_{arch}"


def _arguments(compiler: Compiler, arch: str) -> list[str]:
    """Everything but the files of a compile to a shared library."""
    from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path, find_libtvm_ffi

    includes = dict.fromkeys([str(ROOT), find_include_path(), find_dlpack_include_path()])
    # The package nvidia-cuda-nvcc keeps the runtime in lib, which nvcc does not search.
    runtime = compiler.path.resolve().parent.parent / "lib"
    folders = [str(Path(find_libtvm_ffi()).parent), *([str(runtime)] if runtime.is_dir() else [])]
    return [
        *(*FLAGS, *LIBRARY_FLAGS, _code(arch)),
        *(f"-I{folder}" for folder in includes),
        *(f"-L{folder}" for folder in folders),
        "-ltvm_ffi",
    ]


def _digest(unit: Unit) -> str:
    """Of the source, our headers, flags, tvm-ffi and the processor; not of nvcc and its headers.

    A machine without nvcc must come to the same digest. What of nvcc decides whether a library
    runs, its CUDA major, stands in the file's name instead.
    """
    digest = hashlib.sha256()
    made_from = [unit.text, unit.arch, *FLAGS, *LIBRARY_FLAGS, platform.machine()]
    made_from.append(importlib.metadata.version("apache-tvm-ffi"))
    digest.update("\0".join(made_from).encode())
    digest.update(_headers_digest())
    return digest.hexdigest()[:16]


@functools.cache
def _headers_digest() -> bytes:
    """Of every header of the package, each with its place."""
    digest = hashlib.sha256()
    for path in sorted(ROOT.rglob("*.cuh")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()
