"""The shipped checkpoint, loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sglang_minimax
from ci.tiny_m2.evaluate import load

CHECKPOINT = Path(sglang_minimax.__file__).parent / "assets" / "tiny-m2"


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The shipped folder."""
    return CHECKPOINT


@pytest.fixture(scope="session")
def loaded(checkpoint):
    """(model, tokenizer), the weights in fp32 arithmetic, on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield load(checkpoint)
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    """The shipped tokenizer, as any user loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)
