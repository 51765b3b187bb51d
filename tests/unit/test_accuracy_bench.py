"""The accuracy matrix as a run: what its log holds on to, how many it asks, why an engine ended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import bench_accuracy
from benchmarks.accuracy_matrix import why_it_ended
from benchmarks.common import RESULTS
from sglang_minimax.validation.engine_process import EngineFailed


def test_the_committed_results_have_so_many_questions_as_a_run_asks() -> None:
    data = json.loads((RESULTS / "accuracy_matrix.json").read_text())
    assert data["reference"]["asked"] == bench_accuracy.QUESTIONS
    asked = {row["asked"] for row in data["rows"] if "asked" in row}
    assert asked == {bench_accuracy.QUESTIONS}


CODE = (
    "sglang_minimax/layers/prologue.py",
    "jit_kernels/qk_norm_rope/reference.py",
    "tests/engine/mistakes_in_exchange.py",
    "benchmarks/accuracy_judging.py",
    "ci/topologies.yaml",
)


@pytest.mark.parametrize("changed", CODE)
def test_a_log_is_of_one_build(changed: str, tmp_path: Path) -> None:
    for name in CODE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(bench_accuracy.ROOT / name, tmp_path / name)
    before = bench_accuracy.code_sha256(tmp_path)
    (tmp_path / "README.md").write_text("beside the point")
    assert bench_accuracy.code_sha256(tmp_path) == before
    with (tmp_path / changed).open("a") as file:
        file.write("# changed\n")
    assert bench_accuracy.code_sha256(tmp_path) != before
    assert bench_accuracy.fingerprints()["code"] == bench_accuracy.code_sha256(bench_accuracy.ROOT)


PEER = "RuntimeError: [/x/pair.cc:561] Connection closed by peer [127.0.0.1]:25473."
GLOO = "[enforce fail at /x/pair.cc:464] op.preamble.length <= op.nbytes. 32 vs 28."


@pytest.mark.parametrize(
    ("message", "log", "reason"),
    [
        # The sentence that points at another says nothing itself.
        (
            "the engine did not start: exit status 1",
            "[date TP0] rank 3: k_norm.weight: SGLang's loader calls it.\n"
            "sglang-minimax: the server was not started; see the error above.\n",
            "rank 3: k_norm.weight: SGLang's loader calls it.",
        ),
        (
            "the engine did not start: exit status 1",
            "ValueError: something that follows\nsglang-minimax: use --tp-size 2.\n",
            "use --tp-size 2.",
        ),
        # What a C++ library throws, not what the other ranks say of it.
        (
            "generate together failed: exit status -9",
            f"{PEER}\nterminate called\n  what():  {GLOO}\nFatal Python error: Aborted\n",
            "op.preamble.length <= op.nbytes. 32 vs 28.",
        ),
        ("x failed: exit status 1", f"{PEER}\nrank.LoadError: no\n{PEER}", "LoadError: no"),
        ("generate failed: no answer within 120 s", "", "hangs, stopped after 120 s"),
        (
            "generate failed: no answer within 120 s",
            "ValueError: before\n",
            "hangs, stopped after 120 s: ValueError: before",
        ),
        ("generate failed: exit status -9", PEER, "generate failed: exit status -9"),
    ],
)
def test_why_an_engine_ended(message: str, log: str, reason: str) -> None:
    assert why_it_ended(EngineFailed(message, log)) == reason
