"""Load formats that are not ours keep SGLang's loaders, and serve the same model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sglang_minimax import TINY_M2
from sglang_minimax.validation.agreement import random_prompt
from sglang_minimax.validation.engine_process import EngineProcess

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

RANKS = 2
PLANNED = "GB read for"  # what our reader says of itself in the log


def start(path: Path, load_format: str) -> EngineProcess:
    return EngineProcess(
        model_path=str(path),
        load_format=load_format,
        tp_size=RANKS,
        dtype="float32",
        skip_tokenizer_init=True,
        log_level="info",
    )


def tokens(engine: EngineProcess) -> list[int]:
    request: dict[str, Any] = {
        "input_ids": random_prompt(12, 256),
        "sampling_params": {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
    }
    return engine.generate(**request)["output_ids"]


def test_a_sharded_state_is_written_and_read_by_sglang(tmp_path: Path) -> None:
    for file in TINY_M2.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    with start(TINY_M2, "safetensors") as engine:
        expected = tokens(engine)
        assert PLANNED in engine.log
        engine.call("save_sharded_model", path=str(tmp_path), pattern=None, max_size=None)
    assert len(list(tmp_path.glob("model-rank-*.safetensors"))) == RANKS
    with start(tmp_path, "sharded_state") as engine:
        assert tokens(engine) == expected
        assert PLANNED not in engine.log


def test_dummy_weights_are_made_by_sglang() -> None:
    with start(TINY_M2, "dummy") as engine:
        assert len(tokens(engine)) == 12
        assert PLANNED not in engine.log
