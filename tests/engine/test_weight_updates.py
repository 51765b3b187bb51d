"""Weight updates of a running engine: what fits is taken, what does not is answered."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

from sglang_minimax.cli.local_server import TINY_M2
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
    engine.call("begin_weight_update")
    try:
        return engine.call("update_weights_from_tensor", named_tensors=tensors)
    finally:
        engine.call("end_weight_update")


def answer(engine: EngineProcess) -> list[int]:
    engine.call("flush_cache")
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
