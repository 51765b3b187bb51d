"""Post-import hooks: once, in time, and without bringing an import forward."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sglang_minimax.imports import when_imported


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An importable package `hooked` with modules `a` (which imports `b`) and `b`."""
    folder = tmp_path / "hooked"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "a.py").write_text("from hooked.b import value\n")
    (folder / "b.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "hooked"
    for name in [name for name in sys.modules if name.split(".")[0] == "hooked"]:
        del sys.modules[name]


def test_waits_for_the_import_and_acts_before_others_can_copy(package: str) -> None:
    def set_two(module: ModuleType) -> None:
        module.value = 2  # type: ignore[attr-defined]

    when_imported("hooked.b", set_two)
    assert "hooked.b" not in sys.modules
    assert importlib.import_module("hooked.a").value == 2


def test_acts_at_once_on_a_module_that_is_there(package: str) -> None:
    importlib.import_module("hooked.b")
    seen: list[str] = []
    when_imported("hooked.b", lambda module: seen.append(module.__name__))
    assert seen == ["hooked.b"]


def test_acts_once_and_in_order(package: str) -> None:
    seen: list[int] = []
    when_imported("hooked.b", lambda _: seen.append(1))
    when_imported("hooked.b", lambda _: seen.append(2))
    importlib.import_module("hooked.a")
    importlib.reload(sys.modules["hooked.b"])
    assert seen == [1, 2]


def test_a_look_up_does_not_use_the_watch_up(package: str) -> None:
    seen: list[int] = []
    when_imported("hooked.b", lambda _: seen.append(1))
    assert importlib.util.find_spec("hooked.b") is not None
    assert seen == []
    importlib.import_module("hooked.b")
    assert seen == [1]


def test_the_module_looks_as_if_nothing_had_happened(package: str) -> None:
    when_imported("hooked.b", lambda _: None)
    hooked = importlib.import_module("hooked.b")
    plain = importlib.import_module("hooked.a")
    assert type(hooked.__loader__) is type(plain.__loader__)
    assert type(hooked.__spec__.loader) is type(plain.__spec__.loader)


def test_a_module_in_the_middle_of_its_import(package: str, tmp_path: Path) -> None:
    """The watch begins while the module runs: the hook must still come."""
    (tmp_path / "hooked" / "c.py").write_text(
        "import sys\nsys.modules['hooked'].begin()\nvalue = 1\n"
    )
    seen: list[int] = []
    parent = importlib.import_module("hooked")
    parent.begin = lambda: when_imported("hooked.c", lambda module: seen.append(module.value))
    importlib.import_module("hooked.c")
    importlib.import_module("hooked.a")  # any import after it
    assert seen == [1]


def test_a_module_that_does_not_exist_fails_as_ever(package: str) -> None:
    when_imported("hooked.nowhere", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"hooked\.nowhere"):
        importlib.import_module("hooked.nowhere")
