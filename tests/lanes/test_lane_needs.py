"""What a machine lacks is named, one sentence each, and the status says that nothing was run."""

from __future__ import annotations

import importlib.util
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ci.lane import Exit, needs
from ci.lane.__main__ import app
from ci.lane.files import find
from ci.lane.launch import Node

H200 = "h200-8x-m27-fp8"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A machine that has everything of that lane; a test takes something away."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setenv("MINIMAX_M27_MODEL_PATH", str(folder))
    monkeypatch.setattr(needs, "devices", lambda: ("cuda", ["NVIDIA H200"] * 8))
    monkeypatch.setattr(needs.suites, "missing", lambda suite: None)
    return monkeypatch


def missing(name: str = H200, node: Node | None = None, port: int | None = None) -> list[str]:
    lane = find(name)
    return needs.missing(lane, list(lane.suites), node or Node(), port)


def test_nothing_is_missing_where_everything_is(machine: Any) -> None:
    assert missing() == []


@pytest.mark.parametrize(
    ("kind", "names", "words"),
    [
        (None, [], "needs 8 cuda devices a node; here are none"),
        ("cuda", ["NVIDIA H200"] * 4, "needs 8 cuda devices a node; here are 4 of cuda"),
        ("rocm", ["AMD Instinct MI300X"] * 8, "here are 8 of rocm"),
        ("cuda", ["NVIDIA H100 80GB HBM3"] * 8, "for H200; here is NVIDIA H100 80GB HBM3"),
    ],
)
def test_devices(machine: Any, kind: str | None, names: list[str], words: str) -> None:
    machine.setattr(needs, "devices", lambda: (kind, names))
    (sentence,) = missing()
    assert words in sentence


def test_a_folder_without_a_model(machine: Any, tmp_path: Path) -> None:
    machine.setenv("MINIMAX_M27_MODEL_PATH", str(tmp_path / "nothing"))
    (sentence,) = missing()
    assert "MINIMAX_M27_MODEL_PATH=" in sentence
    assert "has no config.json" in sentence


def test_a_hub_that_does_not_answer(machine: Any) -> None:
    machine.delenv("MINIMAX_M27_MODEL_PATH")
    machine.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    machine.setattr(needs, "_hub_refuses", lambda name: "the hub does not give it (Refused)")
    (sentence,) = missing()
    assert "MiniMaxAI/MiniMax-M2.7 is not in the hub's cache" in sentence
    assert "set MINIMAX_M27_MODEL_PATH to a local folder" in sentence


def test_packages(machine: Any) -> None:
    machine.undo()
    machine.setattr(needs, "devices", lambda: ("rocm", ["AMD Instinct MI300X"] * 8))
    machine.setattr(needs, "_model", lambda model, what: ())
    machine.setattr(importlib.util, "find_spec", lambda name: None)
    said = missing("mi30x-8x-m27-fp8")
    assert any("Python package aiter" in sentence for sentence in said)
    assert any("pip install 'sglang-minimax[accuracy]'" in sentence for sentence in said)


def test_a_port_that_is_taken(machine: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (sentence,) = missing(port=port)
    assert f"port {port} of 127.0.0.1 is taken" in sentence
    assert missing(port=port) == []


def test_nodes(machine: Any) -> None:
    two = "h200-2x8-m27-fp8"
    (alone,) = missing(two)
    assert "give --node-rank and --dist-init-addr" in alone
    (third,) = missing(two, Node(2, "10.0.0.1:5000"))
    assert "there is no node 2" in third
    (where,) = missing(two, Node(1, "here"))
    assert "is not HOST:PORT" in where
    with socket.create_server(("127.0.0.1", 0)) as server:
        (taken,) = missing(two, Node(0, f"127.0.0.1:{server.getsockname()[1]}"))
    assert "cannot be opened here" in taken
    assert missing(two, Node(1, "10.0.0.1:5000")) == []
    machine.setattr(needs.suites, "missing", lambda suite: f"{suite} needs more.")
    assert missing(two, Node(1, "10.0.0.1:5000")) == []
    assert "gsm8k needs more." in missing(two, Node(0, "127.0.0.1:0"))


def test_a_machine_without_devices_is_looked_at() -> None:
    """For real; on a machine with a GPU there is something to find."""
    kind, names = needs.devices()
    assert (kind is None) == (names == [])


def test_the_status_says_that_it_could_not_run(machine: Any, tmp_path: Path) -> None:
    machine.setattr(needs, "devices", lambda: (None, []))
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["run", H200, "--out", str(out)])
    assert done.exit_code == Exit.COULD_NOT_RUN
    assert "could not run: the lane needs 8 cuda devices" in done.stdout
    assert json.loads((out / "result.json").read_text())["status"] == "could not run"
    assert "the lane needs 8 cuda devices" in (out / "junit.xml").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nothing"], "there is no lane 'nothing'"),
        (["run", H200, "--variant", "tp9"], "has no variant 'tp9'; it has tp8, tp8-ep8, dp8-ep8"),
        (["run", H200, "--suite", "mmlu"], "has no suite 'mmlu'"),
        (["compare", "a.json", "b.json"], "a.json cannot be read"),
        (["check", "nothing"], "there is no lane 'nothing'"),
    ],
)
def test_a_mistake_in_a_command_is_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from ci.lane.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(lambda: app(arguments))
    assert stop.value.code == Exit.COULD_NOT_RUN
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
