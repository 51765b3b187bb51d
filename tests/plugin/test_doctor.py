"""`sglang-minimax doctor`: what it shows, and that it fails when something is wrong."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jit_kernels.qk_norm_rope import op as prologue
from jit_kernels.router import op as router
from sglang_minimax import plugin, upstream
from sglang_minimax.cli.main import app
from sglang_minimax.patches.upstream import MODEL_PATCHES


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.stdout


def report() -> tuple[int, dict[str, Any]]:
    status, text = run("--json")
    return status, json.loads(text[text.index("{") :])


def test_a_healthy_installation() -> None:
    status, found = report()
    assert (status, found["ok"], found["problems"]) == (0, True, [])
    assert found["versions"]["sglang"] == "0.5.23"
    assert found["model_class"] == "sglang_minimax.models.minimax_m2.MiniMaxM2ForCausalLM"
    assert {row["target"] for row in found["patches"]} == {e.target for e in upstream.entries()}
    usable = {(row["operator"], row["implementation"]): row["usable"] for row in found["kernels"]}
    # Fastest first, and on a machine without an accelerator a reason for each kernel.
    assert list(usable) == [
        *(("qk_norm_rope", name) for name in prologue.names()),
        *(("router", each.name) for each in router.IMPLEMENTATIONS),
    ]
    for (_, name), answer in usable.items():
        assert (answer == "yes") == (name == "reference"), answer
    assert found["moved_symbols"] == []


def test_the_tables_say_the_same() -> None:
    status, text = run()
    assert status == 0
    assert "MinimaxCpuPlatform" in text
    assert "ok MiniMax-M2 will be served by sglang-minimax" in text


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_MINIMAX", "0")
    status, found = report()
    assert status == 1
    assert "SGLANG_MINIMAX=0" in found["problems"][0]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.metadata.version

    def version(name: str) -> str:
        if name == "safetensors":
            raise importlib.metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    status, found = report()
    assert status == 1
    assert any("not installed: safetensors" in problem for problem in found["problems"])


def test_another_platform_is_no_problem(other_platform: Path) -> None:
    """As on a GPU machine: SGLang runs something else, and nothing of ours is wrong."""
    done = subprocess.run(
        [sys.executable, "-m", "sglang_minimax.cli.main", "doctor", "--json"],
        env={**os.environ, "SGLANG_PLATFORM": "other", "PYTHONPATH": str(other_platform)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["platform"]["active"] == "Other"
    assert (done.returncode, found["problems"]) == (0, [])


def test_another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "installed_sglang", lambda: "0.6.0")
    status, found = report()
    assert status == 1
    assert "found 0.6.0; run `pip install sglang==0.5.23`" in found["problems"][0]


def test_a_hook_that_did_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    target = MODEL_PATCHES[0].target
    monkeypatch.setitem(plugin._status, target, "AttributeError: gone")
    status, found = report()
    assert status == 1
    assert any(target in problem and "gone" in problem for problem in found["problems"])


def test_a_symbol_that_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = upstream.recorded_signatures()
    symbol = "sglang.srt.layers.utils:PPMissingLayer"
    monkeypatch.setattr(
        upstream, "recorded_signatures", lambda: {**recorded, symbol: "(another, signature)"}
    )
    status, found = report()
    assert status == 1
    assert [row["symbol"] for row in found["moved_symbols"]] == [symbol]
    assert any(symbol in problem for problem in found["problems"])


def test_a_user_error_is_one_line_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_minimax.cli import serve
    from sglang_minimax.errors import MinimaxError

    def fail(*_: object) -> int:
        raise MinimaxError("the port is taken; choose another.")

    monkeypatch.setattr(serve, "serve", fail)
    result = CliRunner().invoke(app, ["serve"])
    assert result.exit_code == 1
    assert result.stderr == "sglang-minimax: the port is taken; choose another.\n"
