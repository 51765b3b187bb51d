"""Weight updates of a running engine: what fits is taken, what does not is answered."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_minimax import TINY_M2
from sglang_minimax.validation.agreement import random_prompt
from sglang_minimax.validation.engine_process import EngineProcess

HEAD = "lm_head.weight"


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def engine(request: pytest.FixtureRequest) -> Iterator[EngineProcess]:
    with EngineProcess(
        model_path=str(TINY_M2), dtype="float32", skip_tokenizer_init=True, tp_size=request.param
    ) as process:
        yield process


def update(engine: EngineProcess, tensors: list[tuple[str, torch.Tensor]]) -> tuple[bool, str]:
    wait_until_idle(engine)
    engine.call("begin_weight_update")
    try:
        return engine.call("update_weights_from_tensor", named_tensors=tensors)
    finally:
        engine.call("end_weight_update")


def wait_until_idle(engine: EngineProcess) -> None:
    """Return when the cache could be flushed, which SGLang refuses while a request winds down."""
    deadline = time.monotonic() + 10
    while not engine.call("flush_cache").success:
        assert time.monotonic() < deadline, "the engine does not come to rest"
        time.sleep(0.05)


def update_from_disk(engine: EngineProcess, checkpoint: Path) -> tuple[bool, str]:
    wait_until_idle(engine)
    success, message, *_ = engine.call("update_weights_from_disk", model_path=str(checkpoint))
    return success, message


def answer(engine: EngineProcess) -> list[int]:
    wait_until_idle(engine)
    return engine.generate(
        input_ids=random_prompt(12, 896), sampling_params={"temperature": 0, "max_new_tokens": 8}
    )["output_ids"]


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        (HEAD, (895, 128), "lm_head.weight"),
        ("model.layers.0.unknown.weight", (4,), "model.layers.0.unknown.weight"),
    ],
    ids=["short", "unknown"],
)
def test_what_does_not_fit_is_answered_and_changes_nothing(
    engine: EngineProcess, name: str, shape: tuple[int, ...], words: str
) -> None:
    before = answer(engine)
    good = ("model.norm.weight", torch.zeros(128))
    success, message = update(engine, [good, (name, torch.ones(shape))])
    assert not success
    assert words in message
    assert answer(engine) == before


def test_what_fits_takes_effect_and_can_be_undone(engine: EngineProcess) -> None:
    before = answer(engine)
    head = load_file(TINY_M2 / "model.safetensors")[HEAD]
    assert update(engine, [(HEAD, head.roll(7, 0))])[0]
    changed = answer(engine)
    assert changed[0] == (before[0] + 7) % 896
    assert update(engine, [(HEAD, head)])[0]
    assert answer(engine) == before


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """tiny-m2 with another head, and without the norm of a layer."""
    shutil.copytree(TINY_M2, tmp_path, dirs_exist_ok=True)
    tensors = load_file(TINY_M2 / "model.safetensors")
    tensors[HEAD] = tensors[HEAD].roll(7, 0).contiguous()
    del tensors["model.layers.2.input_layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_a_broken_checkpoint_from_disk_is_answered_and_undone(
    engine: EngineProcess, broken: Path
) -> None:
    before = answer(engine)
    success, message = update_from_disk(engine, broken)
    assert not success
    assert "model.layers.2.input_layernorm.weight" in message
    assert answer(engine) == before
    assert update_from_disk(engine, TINY_M2)[0]
    assert answer(engine) == before
