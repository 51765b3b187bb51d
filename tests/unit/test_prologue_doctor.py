"""What doctor says of the prologue on a machine with GPUs, whose links it does not ask for."""

from __future__ import annotations

import pytest
import torch

from jit_kernels.qk_norm_rope import op
from sglang_minimax.cli import doctor


def test_the_size_of_a_group_is_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.choice, "accelerator", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    rows = [row for row in doctor._kernels() if row["operator"] == "qk_norm_rope"]
    assert [(row["ranks"], row["implementation"]) for row in rows] == [
        (size, name) for size in ("attention-TP 1", "attention-TP 8") for name in op.names()
    ]
    usable = {(row["ranks"], row["implementation"]): row["usable"] for row in rows}
    assert usable["attention-TP 1", "cuda"] == "yes"
    assert usable["attention-TP 8", "cuda"] == "yes, if linked by NVLink"
    assert usable["attention-TP 8", "triton"] == "yes"
