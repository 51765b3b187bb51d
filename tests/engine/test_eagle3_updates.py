"""Weight updates of a model with a draft: the model has the new weights, the draft its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_minimax import TINY_M2, TINY_M2_EAGLE3
from sglang_minimax.validation.engine_process import EngineProcess
from sglang_minimax.validation.oracle import TransformersOracle
from tests.engine.test_weight_updates import other_weights, write_checkpoint
from tests.engine.updating import PROMPTS, Updated, prepare

SAMPLING = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


def prepared() -> None:
    from sglang.srt.entrypoints.engine import Engine

    prepare()
    Engine.draft_checksums = _draft_checksums


def _draft_checksums(engine: Any) -> Any:
    from sglang.srt.managers.io_struct import CheckWeightsReqInput

    request = CheckWeightsReqInput(action="checksum", selector="draft")
    success, message, ranks, _ = engine.loop.run_until_complete(
        engine.tokenizer_manager.check_weights(request)
    )
    assert success, message
    return [rank["checksums"] for rank in ranks]


@pytest.fixture(scope="module")
def updated() -> Iterator[Updated]:
    with EngineProcess(
        before=prepared,
        model_path=str(TINY_M2),
        speculative_algorithm="EAGLE3",
        speculative_draft_model_path=str(TINY_M2_EAGLE3),
        dtype="float32",
        skip_tokenizer_init=True,
    ) as engine:
        yield Updated(engine, {})


@pytest.mark.parametrize("way", ["disk", "tensors"])
def test_an_update_leaves_the_draft_alone(updated: Updated, way: str, tmp_path: Path) -> None:
    weights = other_weights()
    other = write_checkpoint(tmp_path, weights)
    before = updated.engine.call("draft_checksums")

    def update(path: Path, tensors: dict[str, Any] | None) -> None:
        if way == "disk":
            answer = updated.disk(path)
        else:
            with updated.session():
                answer = updated.tensors(list((tensors or {}).items()))
        assert answer[0], answer[1]

    update(other, weights)
    oracle = TransformersOracle(other)
    for prompt in PROMPTS:
        tokens = updated.engine.generate(input_ids=prompt, sampling_params=SAMPLING)["output_ids"]
        after = oracle.log_probabilities(prompt + tokens)[len(prompt) - 1 : -1]
        assert tokens == after.argmax(-1).tolist()
    # The embedding is the model's own tensor, which the draft reads too.
    changed = {
        name
        for mine, theirs in zip(before, updated.engine.call("draft_checksums"), strict=True)
        for name in mine
        if mine[name] != theirs[name]
    }
    assert all("embed_tokens" in name for name in changed), changed
    assert updated.disk(TINY_M2)[0]
    assert updated.engine.call("draft_checksums") == before
