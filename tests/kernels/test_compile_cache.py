"""A compile that fails, hangs or meets a strange cache folder is a sentence, not the server's end.

The compilers here are shell scripts; what they write is an extension module of Python, which loads
anywhere.
"""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from jit_kernels import choice, library_cache, toolchain
from jit_kernels import compile as compiler
from jit_kernels.choice import Implementation, KernelUnavailable
from jit_kernels.compile import Unit

UNIT = Unit("probe", "text", "103a")
LOADABLE = next(Path(sysconfig.get_config_var("DESTSHARED")).glob("_heapq*.so"))
FIND_OUTPUT = 'while [ "$1" != -o ]; do shift; done; '
WRITES = f'{FIND_OUTPUT}cp {LOADABLE} "$2"'
GARBAGE = f'{FIND_OUTPUT}echo garbage > "$2"'
NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can take another user's part")

MakeNvcc = Callable[..., Path]


def fake_nvcc(home: Path, script: str, release: str = "13.0") -> Path:
    """A compiler that notes the target of each run in `runs` beside it."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && echo "release {release}, V{release}.1" && exit\n'
        f'echo "$*" | grep -o "code=sm_[0-9a-z]*" >> {home}/runs\n{script}\n'
    )
    nvcc.chmod(0o755)
    return nvcc


def runs(nvcc: Path) -> list[str]:
    """The targets that it was asked for."""
    notes = nvcc.parent.parent / "runs"
    return notes.read_text().replace("code=sm_", "").split() if notes.exists() else []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, not made yet."""
    monkeypatch.setenv("JIT_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain, "driver_major", lambda: None)
    return tmp_path / "cache"


@pytest.fixture
def make_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> MakeNvcc:
    """Adds a compiler to those of this machine, which has no others."""
    found: list[Path] = []
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: found)

    def make(script: str, release: str = "13.0") -> Path:
        found.append(fake_nvcc(tmp_path / f"cuda-{len(found)}", script, release))
        return found[-1]

    return make


def leftovers(folder: Path) -> list[str]:
    """What lies in the cache folder beside libraries, locks and records."""
    known = (".so", ".lock", ".failed")
    return [path.name for path in folder.iterdir() if path.suffix not in known]


# --- what the compiler says ----------------------------------------------------------------


def test_compilers_message_reaches_the_caller(folder: Path, make_nvcc: MakeNvcc) -> None:
    make_nvcc(
        'echo noise; echo "x.cu(3): error: no operator fits"; echo "1 error detected"; exit 2'
    )
    with pytest.raises(KernelUnavailable, match="no operator fits") as raised:
        compiler.load(UNIT)
    assert "noise" not in str(raised.value)
    assert not list(folder.glob("*.so"))
    assert leftovers(folder) == []


def test_message_need_not_be_utf8(make_nvcc: MakeNvcc) -> None:
    make_nvcc(r"printf 'caf\351.cu: error: wrong\n'; exit 1")
    with pytest.raises(KernelUnavailable, match=r"caf.\.cu: error: wrong"):
        compiler.load(UNIT)


def test_hanging_compiler_is_stopped_with_all_that_it_started(
    make_nvcc: MakeNvcc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "TIMEOUT_S", 1.2)
    hanging = make_nvcc(f"sleep 100 & echo $! > {tmp_path}/child; wait")
    second = make_nvcc(WRITES)  # the time is for all of them
    start = time.monotonic()
    with pytest.raises(KernelUnavailable, match="was stopped after 1 s") as raised:
        compiler.load(UNIT)
    assert str(second) not in str(raised.value)
    assert time.monotonic() - start < 10
    assert (runs(hanging), runs(second)) == (["103a"], [])
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5  # whoever adopts it may take a moment to bury it
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "what the compiler started still runs"
        time.sleep(0.01)


def test_no_compiler_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.os, "access", lambda *_: False)
    with pytest.raises(KernelUnavailable, match=r"^no nvcc .*`pip install nvidia-cuda-nvcc`$"):
        compiler.load(UNIT)


@pytest.mark.parametrize("place", ["refusal", "prepare"])
def test_unforeseen_error_passes_an_implementation_over(place: str) -> None:
    def unforeseen(_: None) -> str:
        raise UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid")

    good: Implementation[None, str] = Implementation("good", lambda _: None, lambda _: "runs")
    parts = {"refusal": lambda _: None, "prepare": lambda _: "runs", place: unforeseen}
    bad: Implementation[None, str] = Implementation("bad", **parts)
    found = choice.choose("operator", [bad, good], None)
    assert found.name == "good"
    assert "bad: UnicodeDecodeError: 'utf-8' codec" in found.why
    with pytest.raises(KernelUnavailable, match="'bad' cannot be used: UnicodeDecodeError"):
        choice.choose("operator", [bad, good], None, prefer="bad")


def test_unforeseen_error_of_a_load_is_unavailable(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unforeseen(*_: object) -> Path:
        raise LookupError("two\nlines")

    monkeypatch.setattr(compiler, "library", unforeseen)
    with pytest.raises(KernelUnavailable, match=r"^probe .*: LookupError: two lines$"):
        compiler.load(UNIT)


# --- which compiler, for which target ------------------------------------------------------

UNSUPPORTED = "echo \"nvcc fatal   : Unsupported gpu architecture 'compute_103a'\"; exit 1"


def test_unknown_target_falls_back_to_the_base_of_its_family(make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc(f'case "$*" in *_103a*) {UNSUPPORTED};; esac; {WRITES}', "12.8")
    compiler.load(UNIT)
    assert runs(nvcc) == ["103a", "100"]


def test_old_compiler_does_not_hide_a_good_one(make_nvcc: MakeNvcc) -> None:
    old, good = make_nvcc(UNSUPPORTED, "11.5"), make_nvcc(WRITES)
    assert compiler.library(UNIT).name.endswith("_cu13.so")
    assert (runs(old), runs(good)) == (["103a", "100"], ["103a"])


def test_other_failures_too_leave_it_to_the_next(make_nvcc: MakeNvcc) -> None:
    make_nvcc('echo "cuda_fp8.h: No such file"; exit 1', "11.5")
    make_nvcc("exit 3")
    with pytest.raises(KernelUnavailable, match=r"cuda_fp8\.h: No such file; .* with 3: no mess"):
        compiler.library(UNIT)
    make_nvcc(WRITES)
    compiler.library(UNIT)


@pytest.mark.parametrize(
    ("version", "status", "major"), [(12040, 0, 12), (13000, 0, 13), (0, 34, None)]
)
def test_driver_tells_its_major(
    version: int, status: int, major: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(place: Any) -> int:
        place._obj.value = version
        return status  # 34 is what the toolkit's stub says

    driver = SimpleNamespace(cuDriverGetVersion=answer)
    monkeypatch.setattr(toolchain.ctypes, "CDLL", lambda _: driver)
    assert toolchain.driver_major() == major


def test_machine_without_a_driver_has_no_major(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(toolchain.ctypes, "CDLL", absent)
    assert toolchain.driver_major() is None


def test_compiler_newer_than_the_driver_is_passed_over(
    make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "driver_major", lambda: 12)
    new = make_nvcc(WRITES, "13.0")
    with pytest.raises(KernelUnavailable, match=r"is CUDA 13\.0, the driver takes up to CUDA 12$"):
        compiler.library(UNIT)
    make_nvcc(WRITES, "12.4")
    assert compiler.library(UNIT).name.endswith("_cu12.so")
    assert runs(new) == []


def test_library_newer_than_the_driver_is_not_taken(
    make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_nvcc(WRITES, "13.0")
    new = compiler.library(UNIT)
    monkeypatch.setattr(toolchain, "driver_major", lambda: 12)
    with pytest.raises(KernelUnavailable, match="driver takes"):
        compiler.library(UNIT)
    make_nvcc(WRITES, "12.4")
    assert compiler.library(UNIT).name == new.name.replace("_cu13", "_cu12")
    monkeypatch.setattr(toolchain, "driver_major", lambda: 13)
    assert compiler.library(UNIT) == new


def test_compiler_without_a_release_is_passed_over(make_nvcc: MakeNvcc) -> None:
    silent = make_nvcc(WRITES)
    silent.write_text("#!/bin/sh\n")
    alien = make_nvcc(WRITES)
    alien.write_bytes(b"\x7fELF of another machine")
    with pytest.raises(KernelUnavailable, match=r"does not tell its release; .*cannot be started"):
        compiler.library(UNIT)
    make_nvcc(WRITES)
    compiler.library(UNIT)


def test_every_compiler_is_found_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    homes = [fake_nvcc(tmp_path / name, WRITES) for name in ("home", "path")]
    monkeypatch.setenv("CUDA_HOME", str(homes[0].parent.parent))
    monkeypatch.setenv("CUDA_PATH", str(homes[0].parent.parent))
    monkeypatch.setenv("PATH", str(homes[1].parent))
    assert toolchain.find_nvcc()[:2] == homes
    (tmp_path / "link").symlink_to(homes[0].parent)
    monkeypatch.setenv("PATH", str(tmp_path / "link"))
    assert [nvcc for nvcc in toolchain.find_nvcc() if tmp_path in nvcc.parents] == homes[:1]


def test_digest_follows_what_a_library_is_made_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(text: str = "a", arch: str = "90a") -> str:
        return compiler._digest(Unit("probe", text, arch))

    seen = {digest(), digest(text="b"), digest(arch="80")}
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_headers_digest", lambda: b"changed")
        seen.add(digest())
    monkeypatch.setattr(compiler.platform, "machine", lambda: "another")
    assert len(seen | {digest()}) == 5


# --- the folder and its lock ---------------------------------------------------------------


def test_folder_that_cannot_be_made_is_told(
    tmp_path: Path, make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_nvcc(WRITES)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JIT_KERNELS_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(KernelUnavailable, match=r"below cannot hold .*; set JIT_KERNELS_CACHE to"):
        compiler.load(UNIT)


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ENOSPC])
def test_lock_that_fails_is_told(
    number: int, folder: Path, make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    nvcc = make_nvcc(WRITES)
    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(KernelUnavailable, match=f"{os.strerror(number)}.*; set JIT_KERNELS_CACHE"):
        compiler.load(UNIT)
    assert runs(nvcc) == []


@pytest.mark.parametrize("number", library_cache.NO_LOCKS)
def test_file_system_without_locks_compiles(
    number: int, make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    make_nvcc(WRITES)
    monkeypatch.setattr(fcntl, "flock", fail)
    compiler.load(UNIT)


def test_lock_that_is_never_released_is_told(
    folder: Path, make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = make_nvcc("exit 1")
    with pytest.raises(KernelUnavailable):
        compiler.load(UNIT)
    monkeypatch.setattr(compiler, "PATIENCE_S", 0.2)
    (lock,) = folder.glob("*.lock")
    with lock.open() as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(KernelUnavailable, match=r"another process has held .*\.lock for 0 s"):
            compiler.load(UNIT)
    assert len(runs(nvcc)) == 1


class Rank:
    """A process of its own that loads UNIT, and how that went."""

    def __init__(self, user: int | None = None) -> None:
        """Forked, since to import torch takes longer than all tests here."""
        context = multiprocessing.get_context("fork")
        self._answer, answer = context.Pipe(duplex=False)
        self._process = context.Process(target=self._run, args=(answer, user))
        self._process.start()

    @staticmethod
    def _run(answer: Connection, user: int | None) -> None:
        if user is not None:
            os.setgid(user)
            os.setuid(user)
        try:
            compiler.load(UNIT)
            answer.send("loaded")
        except KernelUnavailable as error:
            answer.send(str(error))

    def said(self) -> str:
        """What load said; a process that hangs fails the test."""
        try:
            assert self._answer.poll(30), "the rank hangs"
            return self._answer.recv()
        finally:
            self._process.kill()
            self._process.join()


@pytest.fixture
def open_folder(make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder with the library and its lock, and a compiler, all of root.

    Every user can reach it, unlike those of pytest.
    """
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        nvcc = fake_nvcc(Path(name) / "cuda", f'{FIND_OUTPUT}cp {name}/loadable "$2"')
        shutil.copy(LOADABLE, Path(name) / "loadable")
        monkeypatch.setattr(toolchain, "find_nvcc", lambda: [nvcc])
        monkeypatch.setenv("JIT_KERNELS_CACHE", f"{name}/cache")
        compiler.library(UNIT)
        # The compiler's own note; all else that is root's, others can only read.
        (nvcc.parent.parent / "runs").chmod(0o666)
        yield Path(name) / "cache"


@as_root
def test_folder_that_can_only_be_read_needs_no_lock(open_folder: Path) -> None:
    assert Rank(NOBODY).said() == "loaded"
    for lock in open_folder.glob("*.lock"):
        lock.unlink()
    assert Rank(NOBODY).said() == "loaded"
    assert not list(open_folder.glob("*.lock"))


@as_root
def test_folder_that_cannot_be_written_is_told(open_folder: Path) -> None:
    for path in open_folder.iterdir():
        path.unlink()
    expected = f"{open_folder} cannot hold compiled kernels ([Errno 13] Permission denied"
    assert Rank(NOBODY).said().startswith(expected)


@as_root
def test_lock_of_another_user_is_told(open_folder: Path) -> None:
    next(open_folder.glob("*.so")).unlink()
    os.chown(open_folder, NOBODY, NOBODY)
    said = Rank(NOBODY).said()
    assert ".lock" in said
    assert said.endswith("; set JIT_KERNELS_CACHE to a folder that can be written")
    next(open_folder.glob("*.lock")).unlink()
    assert Rank(NOBODY).said() == "loaded"


# --- several ranks -------------------------------------------------------------------------


def test_ranks_that_start_together_compile_once(folder: Path, make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc(f"sleep 0.3; {WRITES}")
    ranks = [Rank() for _ in range(3)]
    assert [rank.said() for rank in ranks] == ["loaded"] * 3
    assert len(runs(nvcc)) == 1
    assert leftovers(folder) == []


def test_ranks_that_start_together_fail_once(folder: Path, make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc('sleep 1; echo "error: $$"; exit 1')
    said = [rank.said() for rank in [Rank() for _ in range(3)]]
    assert "error: " in said[0]
    assert said == said[:1] * 3
    assert len(runs(nvcc)) == 1
    assert leftovers(folder) == []


def test_ranks_build_a_damaged_library_again_once(folder: Path, make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc(f"sleep 0.3; {WRITES}")
    compiler.library(UNIT).write_bytes(b"")
    ranks = [Rank() for _ in range(3)]
    assert [rank.said() for rank in ranks] == ["loaded"] * 3
    assert len(runs(nvcc)) == 2


def test_rank_that_dies_leaves_no_lock(folder: Path, make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc(f"sleep 0.3; {WRITES}")
    first = Rank()
    while not runs(nvcc):
        time.sleep(0.01)
    first._process.kill()
    assert Rank().said() == "loaded"


def test_failure_holds_for_this_process_and_this_compiler(
    folder: Path, make_nvcc: MakeNvcc
) -> None:
    nvcc = make_nvcc("echo error: first; exit 1")

    def attempt() -> int:
        with pytest.raises(KernelUnavailable, match="error: first"):
            compiler.load(UNIT)
        return len(runs(nvcc))

    assert (attempt(), attempt()) == (1, 1)
    os.utime(nvcc, (0, 0))  # another compiler
    assert (attempt(), attempt()) == (2, 2)
    (record,) = folder.glob("*.failed")
    content = json.loads(record.read_text())
    before = psutil.Process().create_time() - 1
    record.write_text(json.dumps(content | {"time": before}))
    assert (attempt(), attempt()) == (3, 3)
    for nonsense in (b"", b"\xe9", b"[]", b"{}"):
        record.write_bytes(nonsense)
        attempt()
    assert len(runs(nvcc)) == 7
    fake_nvcc(nvcc.parent.parent, WRITES)
    compiler.load(UNIT)
    assert not record.exists()


def test_two_builds_side_by_side_do_not_meet(
    folder: Path, make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where there are no locks, another rank installs the library while this one builds it.
    make_nvcc(f'echo "$*" | grep -o "[^ ]*\\.cu$" >> {folder}.sources; {WRITES}')
    folder.mkdir()
    found, stem = toolchain.compilers(), "stem"
    first = compiler._build(UNIT, folder, stem, found)
    assert compiler._build(UNIT, folder, stem, found) == first
    library_cache.refuse_damaged(first)
    sources = Path(f"{folder}.sources").read_text().split()
    assert len({Path(source).parent for source in sources}) == 2
    assert [path.name for path in folder.iterdir()] == [first.name]


# --- libraries that cannot be loaded, or should not be -------------------------------------


@pytest.mark.parametrize("damage", [b"", b"garbage", LOADABLE.read_bytes()[:5000]])
def test_damaged_library_is_built_again(damage: bytes, folder: Path, make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc(WRITES)
    path = compiler.library(UNIT)  # not loaded: to write into what is loaded ends any process
    path.write_bytes(damage)
    compiler.load(UNIT)
    assert len(runs(nvcc)) == 2
    library_cache.refuse_damaged(path)


def test_library_that_never_loads_is_built_again_once(make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc(GARBAGE)
    with pytest.raises(KernelUnavailable, match=r"^probe cannot be built or loaded: RuntimeError"):
        compiler.load(UNIT)
    assert len(runs(nvcc)) == 2


def test_damaged_library_without_a_compiler_is_told_and_kept(
    make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_nvcc(WRITES)
    path = compiler.library(UNIT)
    path.write_bytes(b"garbage")
    monkeypatch.setattr(toolchain, "find_nvcc", list)
    with pytest.raises(KernelUnavailable, match=r"\.so is damaged\) nor built again: no nvcc in"):
        compiler.load(UNIT)
    assert path.exists()


def test_library_that_another_rank_built_again_is_not_discarded(make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc(WRITES)
    path = compiler.library(UNIT)
    assert compiler.library(UNIT, broken=(path, (0, 0, 0))) == path
    assert len(runs(nvcc)) == 1


def test_library_that_everybody_can_write_is_refused(folder: Path, make_nvcc: MakeNvcc) -> None:
    make_nvcc(WRITES)
    path = compiler.library(UNIT)
    for place, mode in ((path, 0o757), (folder, 0o1777)):
        before = place.stat().st_mode
        place.chmod(mode)
        expected = f"^{place} can be written by every user.*JIT_KERNELS_CACHE to a folder of your"
        with pytest.raises(KernelUnavailable, match=expected):
            compiler.load(UNIT)
        place.chmod(before)
    compiler.load(UNIT)


@as_root
def test_library_of_another_user_is_refused(folder: Path, make_nvcc: MakeNvcc) -> None:
    make_nvcc(WRITES)
    path = compiler.library(UNIT)
    for place in (path, folder):
        os.chown(place, NOBODY, NOBODY)
        with pytest.raises(KernelUnavailable, match=f"^{place} belongs to user {NOBODY}"):
            compiler.load(UNIT)
        os.chown(place, 0, 0)
    compiler.load(UNIT)


def test_what_we_make_is_for_nobody_else_to_write(
    tmp_path: Path, make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_nvcc(f'{WRITES}; chmod 777 "$2"')
    monkeypatch.delenv("JIT_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    before = os.umask(0)
    try:
        default = compiler.library(UNIT)
        monkeypatch.setenv("JIT_KERNELS_CACHE", str(tmp_path / "chosen"))
        chosen = compiler.library(UNIT)
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (default.parent, chosen.parent, chosen)]
    assert modes == [0o700, 0o755, 0o755]
