"""What a machine lacks is named, one sentence each, and the status says that nothing was run."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from ci.lane import Exit, needs, suites
from ci.lane import run as runs
from ci.lane.__main__ import app
from ci.lane.files import find
from ci.lane.launch import Node
from ci.lane.machine import Device, Devices, devices

H200, H200_TWO = "h200-8x-m27-fp8", "h200-2x8-m27-fp8"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A machine that has everything of that lane; a test takes something away."""
    folder = tmp_path / "model"
    folder.mkdir()
    checkpoint(folder)
    questions = tmp_path / "gsm8k"
    questions.mkdir()
    for name in ("test", "train"):
        rows = [{"question": f"{name} {i}?", "answer": "#### 2"} for i in range(30)]
        (questions / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("MINIMAX_M27_MODEL_PATH", str(folder))
    monkeypatch.setenv("GSM8K_PATH", str(questions))
    monkeypatch.setattr(needs.suites, "missing", lambda suite: None)
    return monkeypatch


def checkpoint(folder: Path) -> None:
    """A whole one, in two files."""
    (folder / "config.json").write_text("{}")
    for number in (1, 2):
        save_file({"w": torch.ones(2)}, folder / f"{number}.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cuda(name: str = "NVIDIA H200", count: int = 8, version: int = 90, gb: float = 150) -> Devices:
    return Devices("cuda", (Device(name, int(gb * 1e9), version),) * count, "570.1 CUDA 12.8")


def rocm(name: str, gfx: str, gb: float) -> Devices:
    return Devices("rocm", (Device(name, int(gb * 1e9), None, gfx),) * 8)


def missing(
    name: str = H200,
    node: Node | None = None,
    port: int | None = None,
    devices: Devices | None = None,
) -> list[str]:
    lane = find(name)
    return needs.missing(lane, list(lane.suites), node or Node(), port, devices or cuda())


def test_nothing_is_missing_where_everything_is(machine: Any) -> None:
    assert missing() == []


@pytest.mark.parametrize(
    ("here", "words"),
    [
        (Devices(), "needs 8 cuda devices a node; here are none"),
        (cuda(count=4), "needs 8 cuda devices a node; here are 4 of cuda"),
        (rocm("AMD Instinct MI300X", "gfx942", 200), "here are 8 of rocm"),
        (cuda("NVIDIA H100 80GB HBM3"), "for H200; here is NVIDIA H100 80GB HBM3"),
        (cuda("NVIDIA GH200 480GB"), "for H200; here is NVIDIA GH200 480GB"),
        (cuda("NVIDIA H200", version=100), "compute capability 9.0; NVIDIA H200 has 10.0"),
        (cuda("NVIDIA H200 MIG 1g.18gb", gb=18), "counts on 141 GB a device; NVIDIA H200 MIG"),
        (cuda("NVIDIA H200 NVL"), None),
    ],
)
def test_devices(machine: Any, here: Devices, words: str | None) -> None:
    assert_said(missing(devices=here), words)


@pytest.mark.parametrize(
    ("lane", "here", "words"),
    [
        ("mi30x-8x-m27-fp8", rocm("AMD Instinct MI300X", "gfx942", 206), None),
        ("mi30x-8x-m27-fp8", rocm("AMD Instinct MI325X", "gfx942", 275), None),
        ("mi30x-8x-m27-fp8", rocm("AMD Instinct MI308X", "gfx942", 206), None),
        ("mi30x-8x-m27-fp8", rocm("AMD Instinct MI355X", "gfx950", 309), "or MI325X; here is AMD"),
        ("mi30x-8x-m27-fp8", rocm("AMD Instinct MI300X", "gfx950", 206), "is for gfx942"),
        ("mi35x-8x-m27-fp8", rocm("AMD Instinct MI350X", "gfx950", 309), None),
        ("b200-4x-m27-nvfp4", cuda("NVIDIA GB200", 4, 100, 190), "for B200; here is NVIDIA GB200"),
        ("b200-4x-m27-nvfp4", cuda("NVIDIA B200", 4, 100, 190), None),
    ],
)
def test_devices_of_other_lanes(machine: Any, lane: str, here: Devices, words: str | None) -> None:
    machine.setattr(needs, "_model", lambda model, what: ())
    machine.setattr(needs, "_packages", lambda lane, chosen: ())
    assert_said(missing(lane, devices=here), words)


def assert_said(found: list[str], words: str | None) -> None:
    if words is None:
        assert found == []
    else:
        (sentence,) = found
        assert words in sentence


def test_a_folder_without_a_model(machine: Any, tmp_path: Path) -> None:
    machine.setenv("MINIMAX_M27_MODEL_PATH", str(tmp_path / "nothing"))
    (sentence,) = missing()
    assert "MINIMAX_M27_MODEL_PATH=" in sentence
    assert "it has no config.json" in sentence


def test_a_folder_that_is_copied_in_part(machine: Any, tmp_path: Path) -> None:
    (tmp_path / "model/2.safetensors").unlink()
    (sentence,) = missing()
    assert "2.safetensors is missing" in sentence


@pytest.fixture
def hub_cache(machine: Any, tmp_path: Path) -> Path:
    """The hub's cache with the model in it, and a hub that nobody can reach."""
    machine.delenv("MINIMAX_M27_MODEL_PATH")
    cache = tmp_path / "cache"
    snapshot = cache / "models--MiniMaxAI--MiniMax-M2.7/snapshots/abc"
    snapshot.mkdir(parents=True)
    checkpoint(snapshot)
    refs = cache / "models--MiniMaxAI--MiniMax-M2.7/refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    real = huggingface_hub.try_to_load_from_cache
    machine.setattr(
        huggingface_hub, "try_to_load_from_cache", functools.partial(real, cache_dir=cache)
    )

    def refuse(self: Any, name: str, **_: Any) -> None:
        raise ConnectionError(name)

    machine.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    return snapshot


def test_a_hub_that_does_not_answer(hub_cache: Path, machine: Any) -> None:
    assert missing() == []
    (hub_cache / "config.json").unlink()
    (sentence,) = missing()
    assert "MiniMaxAI/MiniMax-M2.7 is not in the hub's cache" in sentence
    assert "the hub does not give it (ConnectionError)" in sentence
    assert "set MINIMAX_M27_MODEL_PATH to a local folder" in sentence


def test_a_cache_with_a_part_of_the_model(hub_cache: Path, machine: Any) -> None:
    """SGLang's own `check` fetches config.json alone."""
    (hub_cache / "2.safetensors").unlink()
    (sentence,) = missing()
    assert "is not whole in the hub's cache" in sentence
    assert "2.safetensors is missing" in sentence
    machine.setattr(huggingface_hub.HfApi, "repo_info", lambda self, name, **_: None)
    assert missing() == []


def test_questions(hub_cache: Path, machine: Any, tmp_path: Path) -> None:
    """Without them GSM8K would only fail after the model is loaded."""
    (tmp_path / "gsm8k/train.jsonl").unlink()
    (sentence,) = missing()
    assert "the suite gsm8k cannot ask: 8 shots come from" in sentence
    machine.delenv("GSM8K_PATH")
    machine.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (sentence,) = missing()
    assert "openai/gsm8k are not in the cache of `datasets`, and the hub does not" in sentence
    assert "set GSM8K_PATH to a folder with test.jsonl and train.jsonl" in sentence
    assert missing(H200_TWO, Node(1, "10.0.0.1:5000")) == []
    prepared = tmp_path / "datasets/openai___gsm8k/main/0.0.0/abc"
    prepared.mkdir(parents=True)
    (prepared / "gsm8k-test.arrow").touch()
    assert missing() == []


def test_the_questions_that_a_lane_asks_here(machine: Any, tmp_path: Path) -> None:
    assert suites.settings_here(find(H200), "gsm8k")["data"] == str(tmp_path / "gsm8k")
    assert suites.settings_here(find("cpu-tiny-m2"), "gsm8k")["data"] == "arithmetic"
    machine.delenv("GSM8K_PATH")
    assert suites.settings_here(find(H200), "gsm8k")["data"] == "openai/gsm8k"


def test_packages(machine: Any) -> None:
    """The lane's own and a suite's, on a machine that has all but these."""
    machine.undo()
    machine.setattr(needs, "_model", lambda model, what: ())
    machine.setattr(needs, "_data", lambda lane, suite: ())
    real = importlib.util.find_spec
    gone = ("aiter", "lm_eval")
    machine.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in gone else real(name, *a)
    )
    said = missing("mi30x-8x-m27-fp8", devices=rocm("AMD Instinct MI300X", "gfx942", 206))
    assert len(said) == 2
    assert "Python package aiter" in said[0]
    assert "pip install 'sglang-minimax[accuracy]'" in said[1]
    machine.setattr(importlib.metadata, "distributions", lambda **_: iter(()))
    assert any("sglang-minimax is not installed" in sentence for sentence in missing())


def test_a_port_that_is_taken(machine: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (sentence,) = missing(port=port)
    assert f"port {port} of 127.0.0.1 is taken" in sentence
    assert missing(port=port) == []


def test_nodes(machine: Any) -> None:
    two = H200_TWO
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


def test_this_machine_is_looked_at() -> None:
    """For real; on a machine with a GPU there is something to find."""
    found = devices()
    assert (found.kind is None) == (found.devices == ())
    assert found.as_dict()["devices"]


def test_the_status_says_that_it_could_not_run(machine: Any, tmp_path: Path) -> None:
    machine.setattr(runs, "devices", Devices)
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["run", H200, "--out", str(out)])
    assert done.exit_code == Exit.COULD_NOT_RUN
    assert "could not run: the lane needs 8 cuda devices" in done.stdout
    assert json.loads((out / "result.json").read_text())["status"] == "could not run"
    assert "the lane needs 8 cuda devices" in (out / "junit.xml").read_text()
    again = CliRunner().invoke(app, ["run", H200, "--out", str(out)])
    assert again.exit_code == Exit.COULD_NOT_RUN
    assert "could not run: the lane needs 8 cuda devices" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nothing"], "there is no lane 'nothing'"),
        (["run", H200, "--variant", "tp9"], "has no variant 'tp9'; it has tp8, tp8-ep8, dp8-ep8"),
        (["run", H200, "--suite", "mmlu"], "has no suite 'mmlu'"),
        (["run", H200, "--out", "/dev/null/out"], "the folder /dev/null/out cannot be made"),
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
