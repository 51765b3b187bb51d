"""Ranks are forked where that is safe, and only there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# The child of "nothing computed" imports torch, which takes seconds on a busy machine.
PROBE = "from sglang_minimax.platforms.cpu.forking import fork_is_safe; print(fork_is_safe(15.0))"
COMPUTE = "import torch; torch.set_num_threads(2); torch.ones(1 << 20).add_(1); "


@pytest.mark.parametrize(
    ("before", "threads", "safe"),
    [
        pytest.param("", None, "True", id="nothing computed"),
        pytest.param(COMPUTE, None, "False", id="computed on two threads"),
        pytest.param(COMPUTE, "1", "True", id="no rank takes a second thread"),
    ],
)
def test_the_probe(before: str, threads: str | None, safe: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = threads
    done = subprocess.run(
        [sys.executable, "-c", before + PROBE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == safe, done.stderr


ENGINE = """
import sys
import torch
torch.set_num_threads(2)
torch.ones(1 << 20).add_(1)
from sglang import Engine
from sglang_minimax import TINY_M2
if __name__ == "__main__":
    engine = Engine(model_path=str(TINY_M2), log_level="warning")
    reply = engine.generate("What is", {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True})
    print("answered", len(reply["output_ids"]))
    engine.shutdown()
"""


def test_a_program_that_has_computed_still_gets_an_engine(tmp_path: Path) -> None:
    """Forked, its ranks would wait for threads that are not there; so they are spawned."""
    (tmp_path / "program.py").write_text(ENGINE)
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        env={**environment, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert "answered 4" in done.stdout, done.stderr[-2000:]
    assert "the ranks are spawned" in done.stderr
