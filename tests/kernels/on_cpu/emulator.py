"""Compile CUDA sources with the emulator of this folder, load them, and run machines.

Nothing here knows a kernel. Objects are kept in a temporary folder under a hash of everything that
goes into them, so a second run compiles nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from functools import cache
from pathlib import Path
from types import TracebackType

HERE = Path(__file__).parent
JIT_KERNELS = HERE.parents[2] / "jit_kernels"
RUNTIME = ("machine", "warp", "memory", "api")

READ_ONLY, READ_WRITE, WORDS = 0, 1, 2
KEPT_SECONDS = 3 * 24 * 3600

COMMON = ("-std=c++20", "-fPIC", "-fvisibility=hidden")
# Kernels: every load and store calls memory.cpp; no fused multiply-add, which a CPU may lack.
INSTRUMENTED = (
    *("-O1", "-g1", "-ffp-contract=off", "-DJIT_KERNELS_ON_CPU"),
    *("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"),
    "-fsanitize=alignment,signed-integer-overflow",
)


class KernelError(AssertionError):
    """The emulated machine stopped: what CUDA leaves undefined, or nobody can go on."""


@cache
def missing() -> str:
    """Why kernels cannot be compiled here; empty where they can."""
    if compiler() is None:
        return "no g++"
    return "" if cuda_headers() else "no CUDA headers (cuda_fp8.h)"


@cache
def compiler() -> str | None:
    """The C++ compiler: GCC, for its hooks and their names."""
    return shutil.which("g++")


@cache
def cuda_headers() -> Path | None:
    """A folder with cuda_bf16.h, cuda_fp16.h and cuda_fp8.h, from a toolkit or a package."""
    nvcc = shutil.which("nvcc")
    toolkits = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [Path(toolkit) / "include" for toolkit in toolkits if toolkit]
    if nvcc is not None:
        folders.append(Path(nvcc).resolve().parents[1] / "include")
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    folders += [package / "include" for package in sorted(packages.glob("c*"))]
    return next((folder for folder in folders if (folder / "cuda_fp8.h").exists()), None)


@cache
def store() -> Path:
    """Where compiled objects are kept, for this user alone."""
    folder = Path(tempfile.gettempdir()) / f"jit-kernels-on-cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} belongs to somebody else"
    for path in folder.iterdir():  # what old sources left
        if path.is_file() and time.time() - path.stat().st_mtime > KEPT_SECONDS:
            path.unlink(missing_ok=True)
    return folder


def _made(
    name: str, inputs: bytes, command: list[str], *, where: str = "", source: str | None = None
) -> Path:
    """The file that `command` makes, unless it was made from the same inputs before.

    where: one more argument, a folder whose files are among the inputs. source: its stdin.
    """
    key = hashlib.sha256(inputs + repr(command).encode()).hexdigest()[:24]
    target = store() / f"{key}-{name}"
    if target.exists():
        target.touch()
        return target
    with tempfile.TemporaryDirectory(dir=store()) as scratch:
        made = Path(scratch) / name
        result = subprocess.run(
            [*command, *([where] if where else []), "-o", str(made)],
            input=source,
            capture_output=True,
            text=True,
            cwd=scratch,
        )
        if result.returncode:
            raise RuntimeError(f"{name} does not compile:\n{result.stderr[:4000]}")
        made.replace(target)
    return target


@cache
def _headers() -> bytes:
    return b"".join(path.read_bytes() for path in sorted(HERE.glob("*.h")))


def _object(name: str) -> Path:
    source = HERE / f"{name}.cpp"
    command = [str(compiler()), *COMMON, "-O2", "-c", str(source)]
    return _made(f"{name}.o", _headers() + source.read_bytes(), command)


def kernel_sources(root: Path) -> list[Path]:
    """The kernel sources under a jit_kernels folder."""
    return sorted(root.rglob("*.cuh"))


def build(name: str, source: str, root: Path = JIT_KERNELS) -> ctypes.CDLL:
    """Compile C++ `source`, which may include this folder's headers and files under `root`.

    root: jit_kernels, or a changed copy of it.
    """
    source = f'#line 1 "{name}.cpp"\n{source}'
    inputs = b"".join(path.read_bytes() for path in kernel_sources(root))
    command = [str(compiler()), *COMMON, *INSTRUMENTED, f"-I{HERE}"]
    command += ["-isystem", str(cuda_headers()), "-x", "c++", "-c", "-"]
    key = _headers() + inputs + source.encode()
    kernel = _made(f"{name}.o", key, command, where=f"-I{root}", source=source)
    objects = [kernel, *(_object(part) for part in RUNTIME)]
    link = [str(compiler()), "-shared", "-Wl,-z,defs", *map(str, objects)]
    library = ctypes.CDLL(str(_made(f"{name}.so", b"", link)))
    library.machine_new.restype = ctypes.c_void_p
    library.machine_run.restype = ctypes.c_char_p
    return library


class Machine:
    """One run: ranks, their buffers and what is launched on them. Use it in a `with` statement."""

    def __init__(self, library: ctypes.CDLL, ranks: int, seed: int) -> None:
        self.library, self.ranks, self.seed = library, ranks, seed
        self.handle = ctypes.c_void_p()
        self.furthest_ahead = 0  # most launches that one rank had ended and another had not
        self._kept: list[object] = []

    def __enter__(self) -> Machine:
        self.handle = ctypes.c_void_p(
            self.library.machine_new(self.ranks, ctypes.c_uint64(self.seed))
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.library.machine_delete(self.handle)

    def add(self, name: str, address: int, bytes: int, owner: int = -1, kind: int = 0) -> None:
        """Tell the machine of memory that kernels may touch. owner: the only rank that may."""
        if bytes:
            self.library.machine_add_buffer(
                self.handle,
                ctypes.c_void_p(address),
                ctypes.c_uint64(bytes),
                name.encode(),
                owner,
                kind,
            )

    def keep(self, *objects: object) -> None:
        """Hold what kernels point to until the machine is gone."""
        self._kept += objects

    def run(self) -> None:
        """Run all launches to their end; raises KernelError, saying who did what where."""
        error = self.library.machine_run(self.handle).decode()
        self.furthest_ahead = self.library.machine_furthest_ahead(self.handle)
        if error:
            raise KernelError(f"{self._with_line(error)} (seed {self.seed})")

    def _with_line(self, error: str) -> str:
        """Replace the program counter in an error by its line, where addr2line is at hand."""
        found = re.search(r"\[pc (0x[0-9a-f]+)\]", error)
        tool = shutil.which("addr2line")
        if not found or not tool:
            return error
        base = _load_address(self.library)
        offset = hex(int(found[1], 16) - base - 1)
        lines = subprocess.run(
            [tool, "-ie", self.library._name, offset], capture_output=True, text=True
        ).stdout.split("\n")
        places = [line.rsplit("/", 1)[-1] for line in lines if ".cuh" in line or ".cpp" in line]
        return error.replace(found[0], f"[{' < '.join(places)}]" if places else found[0])


def _load_address(library: ctypes.CDLL) -> int:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(library._name):
            return int(line.split("-")[0], 16)
    return 0
