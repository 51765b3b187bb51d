"""What the benchmarks compare with is SGLang's own model, and it computes as released."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.intree import serve_intree
from sglang_minimax.validation.engine_process import preload
from sglang_minimax.validation.run import run_shape
from sglang_minimax.validation.session import Session
from sglang_minimax.validation.shapes import Shape

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def test_the_in_tree_model_agrees_with_transformers_where_it_should(tmp_path: Path) -> None:
    torch.set_num_threads(1)  # before the engine is forked
    preload()
    session = Session(tmp_path)
    shape = Shape(topology="tp=2,exchange=sglang")
    found = run_shape(shape, session.subject(shape.model), before=serve_intree)
    assert found.max_error is not None, found.shortcomings
    assert found.tolerance is not None
    assert found.max_error < found.tolerance
    assert found.tokens_equal
