"""`run`: the CPU lane for real, and every way to end with a server that only pretends.

The pretended one is a package `sglang` that comes first on the path of the processes that are
started, so that the runner itself is the real one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree as ET

import psutil
import pytest

from ci.lane import Exit, LaneError, suites
from ci.lane import run as runs
from ci.lane import variant as variants
from ci.lane.files import find, load
from ci.lane.launch import Node
from ci.lane.machine import facts
from ci.lane.outcome import Outcome, SuiteOutcome, VariantOutcome, read
from sglang_minimax.children import Child
from tests.conftest import remaining

ROOT = Path(__file__).parents[2]
LANE = """name: fake
about: a server that pretends
hardware: {kind: cpu, device: any, per_node: 1, memory_gb: 1}
model: {name: tiny-m2, bundled: true}
start_minutes: 1
load: {requests: 1, context: 8}
variants:
  one: {about: one}
suites:
  tools:
    limit_minutes: LIMIT
    settings: {limit: 2, parallel: 2, retries: 0}
    figures:
      correct: {threshold: 0.5, note: n, source: s}
"""


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """A lane file for a behaviour of the pretended server; nothing may be left of it."""
    package = tmp_path / "path" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").symlink_to(Path(__file__).parent / "fake_server.py")
    # The pretended launcher is built on the fake server of another folder of tests.
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}{os.pathsep}{ROOT}")
    before = set(psutil.Process().children(recursive=True))

    def make(behaviour: str, *, limit: float = 1.0, nodes: int = 1) -> Path:
        monkeypatch.setenv("FAKE_SERVER", behaviour)
        text = LANE.replace("LIMIT", str(limit)).replace(
            "per_node: 1", f"per_node: 1, nodes: {nodes}"
        )
        path = tmp_path / "fake.yaml"
        path.write_text(text)
        return path

    yield make
    left = [each for each in psutil.Process().children(recursive=True) if each not in before]
    assert remaining(left) == []
    assert sleepers() == []


def sleepers() -> list[int]:
    """What the pretended server started and did not end."""
    mine = "import time; time.sleep(600)"
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        words, variables = process.info["cmdline"] or [], process.info["environ"] or {}
        if mine in words and variables.get("FAKE_SERVER") == os.environ.get("FAKE_SERVER"):
            found.append(process.pid)
    return found


def run(
    path: Path, give_up: Callable[[], bool] = lambda: False, node: Node | None = None
) -> Outcome:
    out = path.parent / "out"
    outcome = runs.run(runs.Asked(load(path), out, node=node or Node()), give_up)
    assert read(out / "result.json") == outcome
    return outcome


def test_a_server_that_dies_while_it_loads(
    pretended: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run(pretended("die"))
    assert outcome.status == Exit.FAIL
    (variant,) = outcome.variants
    assert "ended with status 3 before it was ready" in (variant.error or "")
    assert "It said: sglang-minimax: model-00001.safetensors is incomplete" in (variant.error or "")
    said = capsys.readouterr().err
    assert "Load weight begin" in said
    assert "server.log" in said


def test_a_suite_that_hangs_is_stopped(pretended: Any) -> None:
    begin = time.monotonic()
    outcome = run(pretended("hang", limit=0.05))
    assert time.monotonic() - begin < 40
    (suite,) = outcome.variants[0].suites
    assert suite.error == "it did not end within 0.05 min and was stopped."
    assert outcome.status == Exit.FAIL


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_child_and_its_own_children_end_with_its_time(interrupted: bool) -> None:
    """Even one that nothing else would end; `-S` is quick to start."""
    sleep = "import time; time.sleep(600)"
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {sleep!r}])"
    child = Child([sys.executable, "-S", "-c", f"{start}; {sleep}"], {}, None)
    seen: list[psutil.Process] = []

    def give_up() -> bool:
        seen[:] = [*seen, *(each for each in child.family() if each not in seen)]
        return interrupted and len(seen) == 2

    assert child.run(600 if interrupted else 1.5, give_up) is None
    assert len(seen) == 2
    assert remaining(seen) == []


def test_a_suite_that_fails_says_why(pretended: Any) -> None:
    outcome = run(pretended("refuse"))
    (suite,) = outcome.variants[0].suites
    assert suite.error is not None
    assert "ended with status 1: " in suite.error
    assert "Traceback" not in suite.error
    assert outcome.status == Exit.FAIL


def test_a_server_that_ends_in_a_suite(pretended: Any) -> None:
    outcome = run(pretended("vanish"))
    (variant,) = outcome.variants
    assert "the server ended during the suite tools" in (variant.error or "")
    assert outcome.status == Exit.FAIL


def test_a_threshold_that_is_missed_fails(pretended: Any) -> None:
    """The pretended server answers every question with a one, and calls nothing."""
    outcome = run(pretended("serve"))
    (suite,) = outcome.variants[0].suites
    assert suite.error is None, suite.error
    assert [(each.name, each.verdict) for each in suite.figures] == [("correct", "missed")]
    assert outcome.status == Exit.FAIL


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_ends_everything(pretended: Any, number: int) -> None:
    path = pretended("hang")
    out = path.parent / "out"
    command = [sys.executable, "-m", "ci.lane", "run", str(path), "--out", str(out)]
    # A test run in the background has SIGINT ignored, which children inherit.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "suite tools" in line:
            break
    time.sleep(2)  # the suite has begun to ask
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3, family
    process.send_signal(number)
    assert process.wait(30) == 130
    process.stderr.close()
    assert remaining(family) == []
    found = read(out / "result.json")
    assert json.loads((out / "result.json").read_text())["status"] == "interrupted"
    assert found.variants[0].interrupted
    assert found.variants[0].suites[0].error == "it was interrupted."


def test_a_folder_with_a_run_is_not_gone_on_with_by_itself(pretended: Any) -> None:
    """Its answers may be those of another build."""
    path = pretended("die")
    run(path)
    with pytest.raises(LaneError, match="holds a run already; give another --out, or --resume"):
        run(path)
    again = runs.Asked(load(path), path.parent / "out", resume=True)
    assert runs.run(again, lambda: False).status == Exit.FAIL
    assert (path.parent / "out/one/server-1.log").read_text().count("Load weight begin") == 1


def test_a_crash_of_the_runner_is_no_pass(pretended: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a server was there nothing had gone wrong, by the records."""
    monkeypatch.setattr(variants.Runner, "run", lambda self, names: {}["nothing"])
    path = pretended("serve")
    with pytest.raises(KeyError):
        run(path)
    out = path.parent / "out"
    found = json.loads((out / "result.json").read_text())
    assert (found["status"], found["variants"][0]["error"]) == ("fail", "KeyError: 'nothing'")
    (error,) = ET.parse(out / "junit.xml").getroot().iter("error")
    assert error.get("message") == "KeyError: 'nothing'"


class _Kept:
    """Stands in for a variant's runner: every suite comes to a result, and is noted."""

    asked: ClassVar[list[tuple[str, list[str]]]] = []
    fails: ClassVar[str] = ""

    def __init__(self, launched: variants.Launched, outcome: VariantOutcome) -> None:
        self.outcome = outcome

    def run(self, names: list[str]) -> None:
        self.asked.append((self.outcome.name, names))
        for name in names:
            error = "it ended." if f"{self.outcome.name} {name}" == self.fails else None
            self.outcome.suites.append(SuiteOutcome(name, error=error))


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs two variants of two suites, or some; in one folder."""
    text = LANE.replace("LIMIT", "1.0").replace(
        "  one: {about: one}", "  one: {about: one}\n  two: {about: two}"
    )
    path = tmp_path / "fake.yaml"
    path.write_text(f"{text}  serving: {{limit_minutes: 1.0}}\n")
    monkeypatch.setattr(runs, "Runner", _Kept)
    monkeypatch.setattr(_Kept, "asked", [])

    def start(*, fails: str = "", **more: Any) -> Outcome:
        _Kept.asked.clear()
        monkeypatch.setattr(_Kept, "fails", fails)
        asked = runs.Asked(load(path), tmp_path / "out", **more)
        return runs.run(asked, lambda: False)

    return start


def test_what_came_to_a_result_is_kept(two: Any, tmp_path: Path) -> None:
    first = two(fails="two serving")
    assert first.status == Exit.FAIL
    second = two(resume=True)
    assert _Kept.asked == [("two", ["serving"])]
    assert second.status == Exit.PASS
    assert [each.name for each in second.variants] == ["one", "two"]
    assert second.variants[0] == first.variants[0]
    assert [each.name for each in second.variants[1].suites] == ["tools", "serving"]
    assert read(tmp_path / "out/result.json") == second


def test_what_was_not_asked_is_not_lost(two: Any) -> None:
    two(variants=["one"])
    assert [each.name for each in two(resume=True, variants=["two"]).variants] == ["one", "two"]


def test_another_build_does_not_go_on(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result is of one commit and of one set of versions."""
    two(variants=["one"])
    monkeypatch.setattr(runs, "facts", lambda found: {**facts(found), "commit": "another"})
    with pytest.raises(LaneError, match=r"commit was .*, and is another now; give another --out"):
        two(resume=True)


def test_a_run_that_was_killed_is_no_pass(two: Any, tmp_path: Path) -> None:
    """What it has written so far says so, and can be gone on with."""
    path = tmp_path / "out/result.json"
    replace(two(), ended=False).write(path)
    assert json.loads(path.read_text())["status"] == "not ended"
    with pytest.raises(LaneError, match="holds a run already"):
        two()
    assert two(resume=True).status == Exit.PASS


def test_a_suite_has_the_environment_of_its_variant() -> None:
    lane = find("cpu-tiny-m2")
    changed = lane.variants["tp2"].model_copy(update={"environment": {"OMP_NUM_THREADS": "3"}})
    lane = lane.model_copy(update={"variants": {"tp2": changed}})
    assert suites._environment(lane, "tp2")["OMP_NUM_THREADS"] == "3"


def test_a_signal_while_the_server_starts(pretended: Any) -> None:
    outcome = run(pretended("serve"), give_up=lambda: True)
    (variant,) = outcome.variants
    assert (variant.interrupted, variant.error) == (True, "it was interrupted.")
    assert variant.suites == []


def test_another_node_serves_until_node_0_is_done(
    pretended: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "LOOK", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as node0:
        address = f"127.0.0.1:{node0.getsockname()[1]}"
        ends = threading.Timer(3, node0.close)
        ends.start()
        begin = time.monotonic()
        outcome = run(pretended("serve", nodes=2), node=Node(1, address))
    assert time.monotonic() - begin > 3
    assert outcome.status == Exit.PASS
    (variant,) = outcome.variants
    assert variant.suites == []
    assert variant.command[-6:] == [
        "--nnodes",
        "2",
        "--node-rank",
        "1",
        "--dist-init-addr",
        address,
    ]


def test_another_node_does_not_pass_without_its_server(
    pretended: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node 0 still answers: the run has lost a node."""
    monkeypatch.setattr(variants, "LOOK", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as node0:
        address = f"127.0.0.1:{node0.getsockname()[1]}"
        outcome = run(pretended("leave", nodes=2), node=Node(1, address))
    assert outcome.status == Exit.FAIL
    assert "ended, and node 0 still served" in (outcome.variants[0].error or "")


# --- for real ---


@pytest.mark.server
def test_the_cpu_lane(tmp_path: Path) -> None:
    """As a user runs it; observed 45 s, most of it SGLang's import."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ci.lane", "run", "cpu-tiny-m2", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == Exit.PASS, f"{done.stdout}\n{done.stderr}"
    assert "cpu-tiny-m2: pass" in done.stdout
    found = json.loads((out / "result.json").read_text())
    assert found["status"] == "pass"
    (variant,) = found["variants"]
    verdicts = {
        (suite["name"], figure["name"]): figure["verdict"]
        for suite in variant["suites"]
        for figure in suite["figures"]
    }
    assert verdicts.pop(("serving", "output_throughput")) == "reported"
    assert set(verdicts.values()) == {"held"}
    assert {suite for suite, _ in verdicts} == {"gsm8k", "tools"}
    assert found["model"] == "sglang_minimax/assets/tiny-m2"
    assert str(ROOT) not in json.dumps(found["variants"])
    assert '"gsm8k.jsonl"' in json.dumps(found["variants"])
    gsm8k = variant["suites"][0]["result"]
    assert gsm8k["scores"]["flexible-extract"]["asked"] == 32
    assert gsm8k["server"]["tp_size"] == 2
    assert "ready" in variant["stages"]
    root = ET.parse(out / "junit.xml").getroot()
    assert [suite.get("name") for suite in root] == ["cpu-tiny-m2.tp2"]
    assert not [*root.iter("failure"), *root.iter("error")]
    assert "Load weight end" in (out / "tp2/server.log").read_text()


@pytest.mark.server
def test_tool_calls_with_a_draft(tmp_path: Path) -> None:
    """Whole and streamed, several tokens a step; observed 40 s, most of it SGLang's import."""
    asked = runs.Asked(find("cpu-tiny-m2-eagle3"), tmp_path / "out", suites=["tools"])
    outcome = runs.run(asked, lambda: False)
    (variant,) = outcome.variants
    assert variant.error is None
    assert outcome.status == Exit.PASS
    assert "accept len" in (tmp_path / "out/tp2/server.log").read_text()
