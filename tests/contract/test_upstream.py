"""The register of SGLang symbols against the pinned release."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from sglang_minimax import SUPPORTED_SGLANG, plugin, upstream
from sglang_minimax.upstream import Patch, Registration

ENTRIES = upstream.entries()


def test_the_pinned_release_is_installed() -> None:
    assert plugin.installed_sglang() == SUPPORTED_SGLANG
    assert plugin.version_problem() is None


def test_the_register_is_complete() -> None:
    """Every import and every entry has a recorded signature, and nothing else has."""
    assert sorted(upstream.recorded_signatures()) == upstream.tracked_symbols(), (
        "run `python -m sglang_minimax.upstream` after adding or removing an import of SGLang"
    )


@pytest.fixture(scope="module")
def current() -> dict[str, str]:
    return upstream.current_signatures()


@pytest.mark.parametrize("symbol", upstream.tracked_symbols())
def test_signature(symbol: str, current: dict[str, str]) -> None:
    assert current[symbol] == upstream.recorded_signatures()[symbol], (
        f"{symbol} moved or changed in SGLang {plugin.installed_sglang()}"
    )


def test_a_changed_signature_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers import utils

    monkeypatch.setattr(utils, "PPMissingLayer", lambda other: None)
    symbol = "sglang.srt.layers.utils:PPMissingLayer"
    assert upstream.signature_of(symbol) != upstream.recorded_signatures()[symbol]


def test_a_symbol_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers import utils

    monkeypatch.delattr(utils, "PPMissingLayer")
    found = upstream.current_signatures()["sglang.srt.layers.utils:PPMissingLayer"]
    assert found.startswith("missing: ")
    assert "PPMissingLayer" in found


def test_a_value_has_to_be_there_whatever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU, some names are functions that are None here."""
    from sglang.kernels.ops.speculative import verify_sampling

    assert upstream.moved_symbols() == {}
    name = "tree_speculative_sampling_target_only"
    monkeypatch.setattr(verify_sampling, name, lambda probs: probs)
    assert upstream.moved_symbols() == {}
    monkeypatch.delattr(verify_sampling, name)
    (moved,) = upstream.moved_symbols()
    assert moved == f"sglang.kernels.ops.speculative.verify_sampling:{name}"


def test_an_original_is_found_behind_two_entries() -> None:
    symbol = "sglang.kernels.ops.sampling.renorm:top_k_renorm_prob"
    _, _, replaced = upstream.resolve(symbol)
    assert replaced.__sglang_original__.__sglang_original__ is None
    assert upstream.signature_of(symbol) == upstream.VALUE


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.target)
def test_an_entry_says_what_it_must(entry: Patch | Registration) -> None:
    for field in dataclasses.fields(entry):
        value = getattr(entry, field.name)
        assert value or field.name == "upstream", f"{entry.target} has no {field.name}"


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if isinstance(e, Patch)], ids=lambda entry: entry.target
)
def test_a_patch_applies_and_keeps_the_signature(entry: Patch) -> None:
    owner, name, _ = upstream.resolve(entry.target)
    assert plugin.status()[entry.target] == plugin.APPLIED
    replaced = getattr(owner, name)
    if not callable(replaced):
        assert replaced is True  # a flag
        return
    original = replaced.__sglang_original__
    assert original is not replaced
    if original is None:
        return  # nothing there without a GPU
    assert inspect.signature(replaced) == inspect.signature(original)


def test_only_the_rooms_that_may_import_sglang() -> None:
    """`topology`, `config`, the loader's arithmetic and `jit_kernels` stay free of SGLang.

    Parsers too, but for the classes that SGLang asks for.
    """
    rooms = {"models", "layers", "patches", "platforms", "validation", "cli"}
    for path in upstream.PACKAGE_ROOT.rglob("*.py"):
        room = path.relative_to(upstream.PACKAGE_ROOT).parts[0]
        if room not in rooms and not (room == "parsers" and path.stem.endswith("_detector")):
            assert list(upstream.symbols_in(path)) == [], path
    for path in (upstream.PACKAGE_ROOT.parent / "jit_kernels").rglob("*.py"):
        assert list(upstream.symbols_in(path)) == [], path
