"""One suite in a process of its own, so that a crash or a hang of it is only its own.

`python -m ci.lane.suites REQUEST OUT`: the request is JSON, `{"suite", "settings", "ours"}`; the
answer `{"result"}` or `{"error"}`, one sentence.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ci.lane.machine import ROOT
from ci.lane.outcome import SuiteOutcome, judged
from ci.lane.plain import lines_of
from ci.lane.schema import Lane, Suite, settings_of
from ci.lane.watch import LAST_LINES, sentence_of
from sglang_minimax.children import Child
from sglang_minimax.errors import MinimaxError

#: Environment variable with a local folder that stands in for a data set of the hub.
DATA = "GSM8K_PATH"
#: What a suite imports beyond what the package needs, and the extra that has it.
PACKAGES = {"gsm8k": ("lm_eval", "accuracy")}


class Found(Protocol):
    """A suite's result, as `sglang_minimax.accuracy` has it."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values, with `scores` (share and interval) and `figures`."""


def missing(suite: str) -> str | None:
    """Why a suite cannot run here, in one sentence; None where it can."""
    package, extra = PACKAGES.get(suite, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        return (
            f"the suite {suite} needs the Python package {package}, which is not installed; run "
            f"`pip install 'sglang-minimax[{extra}]'`."
        )
    return None


def settings_here(lane: Lane, name: str) -> dict[str, Any]:
    """A suite's settings, its data set of the hub replaced by the folder that DATA names."""
    settings = dict(lane.suites[name].settings)  # type: ignore[index]
    local = os.environ.get(DATA)
    if local and "/" in str(settings.get("data", "")):
        settings["data"] = local
    return settings


def run(
    lane: Lane, variant: str, name: str, url: str, folder: Path, give_up: Callable[[], bool]
) -> SuiteOutcome:
    """Run a suite of a lane against the server of a variant at `url`, and judge its figures.

    folder: for its logs. It is ended, with all that it started, after its limit, or when
    `give_up` says so.
    """
    suite: Suite = lane.suites[name]  # type: ignore[index]
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "txt" if name == "serving" else "jsonl"
    ours = {"url": url, "log": str(folder / f"{name}.{suffix}"), "progress": True}
    request = {
        "suite": name,
        "settings": settings_here(lane, name),
        "ours": ours,
    }
    with tempfile.TemporaryDirectory(prefix="lane-") as here:
        asked, out = Path(here) / "request.json", Path(here) / "answer.json"
        asked.write_text(json.dumps(request))
        said = folder / f"{name}.log"
        with said.open("wb") as log:
            command = [sys.executable, "-m", "ci.lane.suites", str(asked), str(out)]
            child = Child(command, _environment(lane, variant), log)
            limit = 60 * suite.limit_minutes
            status = child.run(limit, give_up)
        answer = json.loads(out.read_text()) if out.is_file() else {}
    if status is None:
        if give_up():
            return SuiteOutcome(name, error="it was interrupted.")
        return SuiteOutcome(
            name, error=f"it did not end within {suite.limit_minutes:g} min and was stopped."
        )
    if "result" in answer:
        return judged(name, suite, answer["result"])
    text = said.read_text(errors="replace")
    why = answer.get("error") or sentence_of(text) or " / ".join([*lines_of(text)][-LAST_LINES:])
    return SuiteOutcome(name, error=f"it ended with status {status}: {why}")


def _environment(lane: Lane, variant: str) -> dict[str, str]:
    """The variant's, and a path on which a suite finds this package from wherever it is started."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**lane.environment_of(variant), "PYTHONPATH": path}


# --- in the process ---


def main(request: Path, out: Path) -> int:
    """Run the suite that the request names, and write its answer."""
    asked = json.loads(request.read_text())
    try:
        answer: dict[str, Any] = {"result": _run(asked).as_dict()}
    except MinimaxError as error:
        answer = {"error": str(error)}
    out.write_text(json.dumps(answer))
    return int("error" in answer)


def _run(asked: Mapping[str, Any]) -> Found:
    name = asked["suite"]
    ours = {**asked["ours"], "log": Path(asked["ours"]["log"])}
    from sglang_minimax import accuracy

    settings: Any = settings_of(name, asked["settings"], **ours)
    suites: Mapping[str, Callable[[Any], Found]] = {
        "gsm8k": accuracy.run_gsm8k,
        "tools": accuracy.run_tools,
        "serving": accuracy.run_bench_serving,
    }
    return suites[name](settings)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
