"""Quantised rows on their way to the experts, in engines: equal to plain ones bit for bit.

A kernel for quantised experts rounds its input anyway. Where rows are rounded before they travel,
by the same rule, and routed before they are rounded, nothing else may change. Requests are sent one
after the other, so that two engines compute the same batches.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from sglang_minimax.moe_exchange.rules import VARIABLE
from sglang_minimax.validation.agreement import random_prompt, table
from sglang_minimax.validation.engine_process import EngineProcess
from tests.formats import fp8, nvfp4
from tests.formats.base import VOCABULARY, Fixture, write
from tests.formats.rounded import RoundedOracle

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

#: As in test_formats: fp32 against fp32 in the median of the steps; a value at the border of two
#: numbers of FP8 or FP4 may be rounded to the other one, and then some steps are off by more.
EXACT, WORST = 1e-4, 0.3
STEPS = 6

FP8_ROWS: dict[str, dict[str, int]] = {
    "tp4-dp4-ep4": {"tp_size": 4, "attn_dp_size": 4, "ep_size": 4},
    "tp4-dp2": {"tp_size": 4, "attn_dp_size": 2},
}
FP4_ROWS = {"tp_size": 4, "attn_dp_size": 2, "ep_size": 4}


def answers(
    fixture: Fixture, folder: Path, path: str | None, sizes: dict[str, int]
) -> list[tuple[list[int], list[int], torch.Tensor]]:
    """(prompt, tokens, log-probabilities) of a request to each attention-DP group.

    path: forced; None for the plan's own choice.
    """
    found = []
    with EngineProcess(
        before=partial(_force, path),
        model_path=str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        log_level="info",
        **sizes,
        **fixture.arguments,
    ) as engine:
        for group in range(sizes["attn_dp_size"]):
            prompt = random_prompt(17 + 5 * group, VOCABULARY, seed=group)
            reply = engine.generate(
                input_ids=prompt,
                sampling_params={
                    "temperature": 0,
                    "max_new_tokens": STEPS,
                    "ignore_eos": True,
                },
                return_logprob=True,
                top_logprobs_num=VOCABULARY,
                routed_dp_rank=group,
            )
            rows = table(reply["meta_info"]["output_top_logprobs"], VOCABULARY)
            found.append((prompt, reply["output_ids"], rows))
        assert f"MoE exchange: {path or 'gather-fp8'} " in engine.log
    return found


def _force(path: str | None) -> None:
    os.environ.pop(VARIABLE, None)
    if path is not None:
        os.environ[VARIABLE] = path


def assert_equal(found: list, expected: list) -> None:
    for (_, tokens, rows), (_, wanted_tokens, wanted_rows) in zip(found, expected, strict=True):
        assert tokens == wanted_tokens
        assert torch.equal(rows, wanted_rows)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Fixture], Path]:
    """The folder of a fixture's checkpoint, written once."""
    folders: dict[str, Path] = {}

    def folder(fixture: Fixture) -> Path:
        if fixture.name not in folders:
            folders[fixture.name] = write(fixture, tmp_path_factory.mktemp("rows") / fixture.name)
        return folders[fixture.name]

    return folder


@pytest.mark.parametrize("shape", FP8_ROWS)
def test_fp8_rows_change_nothing(
    shape: str, written: Callable[[Fixture], Path], tmp_path: Path
) -> None:
    fixture, sizes = fp8.blocks(128), FP8_ROWS[shape]
    folder = written(fixture)
    plain = answers(fixture, folder, "gather", sizes)
    assert_equal(answers(fixture, folder, None, sizes), plain)
    oracle = RoundedOracle(fixture, tmp_path)
    errors = torch.cat(
        [(rows - oracle.along(prompt, tokens)).abs().amax(-1) for prompt, tokens, rows in plain]
    )
    assert errors.max() < WORST
    assert errors.median() < EXACT


def test_fp8_rows_change_nothing_from_rank_to_rank(written: Callable[[Fixture], Path]) -> None:
    fixture, sizes = fp8.blocks(128), FP8_ROWS["tp4-dp4-ep4"]
    folder = written(fixture)
    plain = answers(fixture, folder, "all-to-all", sizes)
    assert_equal(answers(fixture, folder, "all-to-all-fp8", sizes), plain)


def test_fp4_rows_change_nothing(written: Callable[[Fixture], Path], tmp_path: Path) -> None:
    fixture = nvfp4.FIXTURES["nvfp4"]()
    folder = written(fixture)
    plain = answers(fixture, folder, "gather", FP4_ROWS)
    assert_equal(answers(fixture, folder, "gather-fp4", FP4_ROWS), plain)
    oracle = RoundedOracle(fixture, tmp_path)
    errors = torch.cat(
        [(rows - oracle.along(prompt, tokens)).abs().amax(-1) for prompt, tokens, rows in plain]
    )
    assert errors.max() < WORST
    assert errors.median() < EXACT
