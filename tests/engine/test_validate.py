"""The list of shapes, run by the harness behind `sglang-minimax validate`: one test a shape."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sglang_minimax.validation.session import Session
from sglang_minimax.validation.shapes import Refused, Shape, catalogue

CATALOGUE = catalogue()


@pytest.fixture(scope="session")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Models and oracles of the list, made once for all shapes."""
    return Session(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("shape", CATALOGUE.shapes, ids=lambda shape: shape.name)
def test_a_shape_is_the_same_model(session: Session, shape: Shape) -> None:
    result = session.run(shape)
    if result.status == "not run":
        pytest.skip(result.reason)
    assert not result.shortcomings, "\n".join(result.shortcomings)
    assert result.status == "ok", result.reason
    assert result.near_ties == 0  # the list's own prompts have none
    # Prompt positions, and at least 16 decode steps for each of eight requests.
    assert result.distributions > 36 + 8 * 16


@pytest.mark.parametrize("place", CATALOGUE.refused, ids=lambda place: place.label)
def test_a_refusal_is_one_sentence(session: Session, place: Refused) -> None:
    result = session.run(place)
    assert result.status == "refused", result.shortcomings
    assert place.says in result.reason
    assert result.expected


def validate(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sglang_minimax.cli.main", "validate", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_a_shape_and_a_config_that_nobody_thought_of() -> None:
    config = {
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "head_dim": 24,
        "intermediate_size": 40,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "vocab_size": 333,
    }
    found = validate("--topology", "tp=5", "--random-config", json.dumps(config), "--json")
    (result,) = json.loads(found.stdout)
    assert found.returncode == 0, found.stderr
    assert result["topology"] == "tp=5"
    assert result["ok"]
    assert result["tokens_equal"]
    assert 0 < result["max_error"] < result["tolerance"]


def test_a_shape_that_does_not_divide_starts_nothing() -> None:
    began = time.monotonic()
    found = validate("--topology", "tp=5")
    assert found.returncode == 1
    assert "5 does not divide 16 query heads" in found.stdout
    assert time.monotonic() - began < 15  # SGLang alone takes longer to import


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--topology", "tp=2,cp=2"), "'cp=2' is not understood"),
        (("--random-config", "{"), "--random-config is not JSON"),
        (("--random-config", "{}"), "GiB are free"),
        (("--random-config", '{"head_dim": 0}'), "head_dim"),
        (("--checkpoint", "/nowhere"), "/nowhere"),
        (("--checkpoint", ".", "--random-config", "{}"), "give one of them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_users_mistake_is_one_sentence(arguments: tuple[str, ...], words: str) -> None:
    found = validate(*arguments)
    assert found.returncode == 1
    assert words in found.stderr
    assert "Traceback" not in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_an_interrupt_leaves_no_process_behind() -> None:
    command = [sys.executable, "-m", "sglang_minimax.cli.main", "validate", "--topology", "tp=4"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A shell that runs this in the background lets its children ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    family: list[psutil.Process] = []
    deadline = time.monotonic() + 90
    while not any("scheduler_TP3" in _name(each) for each in family):
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline, "no rank was started"
        time.sleep(0.2)
        family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def test_an_engine_that_does_not_answer_is_a_shortcoming(tmp_path: Path) -> None:
    result = Session(tmp_path, timeout=0.05).run(Shape(topology="tp=1"))
    assert result.status == "failed"
    assert "no answer within" in result.shortcomings[0]
