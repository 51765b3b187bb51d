"""The workflow files: they parse, they name our lanes, and they ask for no more than they need."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ci.lane.files import find, names

FOLDER = Path(__file__).parents[2] / ".github/workflows"
FILES = sorted(FOLDER.glob("*.yml"))


def workflow(path: Path) -> dict[str, Any]:
    # YAML 1.1 reads the key `on` as true.
    return yaml.load(path.read_text(), Loader=yaml.BaseLoader)


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in workflow(path)["jobs"].values() for step in job["steps"]]


def test_the_files_are_there() -> None:
    assert [path.name for path in FILES] == ["ci.yml", "lanes.yml"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_rights_and_limits(path: Path) -> None:
    found = workflow(path)
    assert found["permissions"] == {"contents": "read"}
    for job in found["jobs"].values():
        assert 0 < int(job["timeout-minutes"]) <= 720
        assert "permissions" not in job
    for step in steps(path):
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+\.\d+\.\d+", step["uses"])
        # An input that is pasted into a shell line would be a command.
        assert "${{" not in step.get("run", "")


def test_every_push_runs_lint_and_the_cpu_lane() -> None:
    path = FOLDER / "ci.yml"
    assert set(workflow(path)["on"]) == {"push", "pull_request"}
    commands = " ".join(step.get("run", "") for step in steps(path))
    for part in ("make lint", "ci.lane check", "ci.lane run cpu-tiny-m2 "):
        assert part in commands
    for name in re.findall(r"ci\.lane run (\S+)", commands):
        assert find(name).hardware.kind == "cpu"


def test_the_manual_jobs_know_every_lane() -> None:
    found = workflow(FOLDER / "lanes.yml")
    assert set(found["on"]) == {"workflow_dispatch"}
    lane, address = found["on"]["workflow_dispatch"]["inputs"].values()
    assert lane["options"] == names()
    assert address["required"] == "false"
    for job in found["jobs"].values():
        label, name = job["runs-on"]
        assert (label, name.startswith("lane-${{ inputs.lane }}")) == ("self-hosted", True)


def test_a_lane_of_two_nodes_has_a_job_for_each() -> None:
    """Which job a lane goes to is told by its name, here and there alike."""
    jobs = workflow(FOLDER / "lanes.yml")["jobs"]
    for lane in map(find, names()):
        assert ("-2x" in lane.name) == (lane.hardware.nodes == 2)
        assert lane.hardware.nodes <= len(jobs["two-nodes"]["strategy"]["matrix"]["node"]) == 2
    assert jobs["two-nodes"]["if"] == "${{ contains(inputs.lane, '-2x') }}"
    assert jobs["lane"]["if"] == "${{ !contains(inputs.lane, '-2x') }}"
    (command,) = [s["run"] for s in jobs["two-nodes"]["steps"] if "ci.lane" in s.get("run", "")]
    assert "--node-rank" in command
    assert "--dist-init-addr" in command


def test_a_runner_brings_its_own_interpreter() -> None:
    """`make install` makes no environment for ROCm or Ascend, and a clean would delete 11 GB."""
    path = FOLDER / "lanes.yml"
    for step in steps(path):
        command = step.get("run", "")
        if "checkout" in step.get("uses", ""):
            assert step["with"]["clean"] == "false"
        if "make install" in command:
            assert command == 'test -n "$LANE_PYTHON" || make install'
        if "ci.lane" in command:
            assert command.startswith('"${LANE_PYTHON:-.venv/bin/python}" -m ci.lane run')


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_results_are_kept_whatever_happens(path: Path) -> None:
    for job in workflow(path)["jobs"].values():
        if any("ci.lane run" in step.get("run", "") for step in job["steps"]):
            _check_kept(job["steps"])


def _check_kept(steps: list[dict[str, Any]]) -> None:
    kept = [step for step in steps if "upload-artifact" in step.get("uses", "")]
    assert len(kept) == 1
    assert kept[0]["if"] == "always()"
    written = re.findall(r"--out \"?(\S+?)\"?$", "\n".join(s.get("run", "") for s in steps), re.M)
    uploaded = kept[0]["with"]["path"].replace("${{ env.OUT }}", "$OUT")
    uploaded = uploaded.replace("${{ matrix.node }}", "$NODE").split()
    assert sorted(written) == sorted(uploaded)
