"""Experts that move between ranks, or start elsewhere, compute the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sglang_minimax import TINY_M2
from sglang_minimax.validation.agreement import compare, random_prompt
from sglang_minimax.validation.engine_process import EngineProcess
from sglang_minimax.validation.oracle import TransformersOracle
from tests.engine.test_against_transformers import FP32

Oracles = Callable[..., TransformersOracle]
CONFIG = json.loads((TINY_M2 / "config.json").read_text())
LAYERS, EXPERTS = CONFIG["num_hidden_layers"], CONFIG["num_local_experts"]
REDUNDANT = 2
ARGUMENTS: dict[str, Any] = {
    "model_path": str(TINY_M2),
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "log_level": "info",
    "tp_size": 2,
    "ep_size": 2,
    "ep_num_redundant_experts": REDUNDANT,
}
EPLB: dict[str, Any] = {
    "enable_eplb": True,
    "eplb_algorithm": "deepseek",
    "eplb_rebalance_num_iterations": 12,
    "expert_distribution_recorder_buffer_size": 12,
}


def watch_moves(folder: Path) -> Callable[[], None]:
    """A `before` for EngineProcess: after each move, compare what a rank holds with its map."""

    def install() -> None:
        from sglang.srt.eplb import expert_location_updater as updater
        from sglang.srt.eplb.expert_location import get_global_expert_location_metadata as place

        original = updater.ExpertLocationUpdater.update

        def update(
            self: Any, weights: Any, *args: Any, update_layer_ids: Any, **kwargs: Any
        ) -> Any:
            old = place().physical_to_logical_map_cpu.clone()
            answer = original(self, weights, *args, update_layer_ids=update_layer_ids, **kwargs)
            new = place().physical_to_logical_map_cpu
            rank = kwargs["rank"]
            mine = slice(rank * new.shape[1] // 2, (rank + 1) * new.shape[1] // 2)
            report = {
                "rank": rank,
                "layers": list(update_layer_ids),
                "moved": int((old != new)[:, mine].sum()),
                "wrong": [
                    [layer, slot]
                    for layer in update_layer_ids
                    for slot, expert in enumerate(new[layer, mine].tolist())
                    if not holds(weights[layer], slot, layer, expert)
                ],
            }
            with (folder / f"{rank}.jsonl").open("a") as file:
                file.write(json.dumps(report) + "\n")
            return answer

        updater.ExpertLocationUpdater.update = update

    return install


def holds(weights: list[torch.Tensor], slot: int, layer: int, expert: int) -> bool:
    """Whether a rank's `slot` has the published weights of one expert, bit for bit."""
    w13, w2 = weights
    with safe_open(TINY_M2 / "model.safetensors", "pt") as file:
        parts = [
            file.get_tensor(f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight")
            for name in ("w1", "w3", "w2")
        ]
    gate, up, down = (part.to(w13.dtype) for part in parts)
    return torch.equal(w13[slot], torch.cat([gate, up])) and torch.equal(w2[slot], down)


def prompts(count: int) -> list[list[int]]:
    return [random_prompt(5 + 9 * i, CONFIG["vocab_size"], seed=70 + i) for i in range(count)]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"eplb_rebalance_layers_per_chunk": 1},  # requests run while half of the layers have moved
        {"dp_size": 2, "enable_dp_attention": True},
    ],
    ids=["at-once", "layer-by-layer", "dp2"],
)
def test_rebalancing_changes_no_result(
    oracles: Oracles, tmp_path: Path, shape: dict[str, Any]
) -> None:
    arguments = {**ARGUMENTS, **EPLB, **shape}
    with EngineProcess(before=watch_moves(tmp_path), **arguments) as engine:
        found = compare(engine, oracles("tiny-m2"), prompts(4), 16)
        assert engine.log.count("rebalance end") >= 4, "each rank rebalances twice at least"
    assert found.max_error < FP32
    assert found.tokens_equal
    for rank in range(2):
        reports = [json.loads(line) for line in (tmp_path / f"{rank}.jsonl").open()]
        assert sum(report["moved"] for report in reports) > 0, "no expert has moved"
        assert [report["wrong"] for report in reports if report["wrong"]] == []
        if "eplb_rebalance_layers_per_chunk" in shape:
            assert {tuple(report["layers"]) for report in reports} == {(i,) for i in range(LAYERS)}


def test_weights_arrive_where_the_experts_are_now(oracles: Oracles) -> None:
    """An update after a rebalance writes each expert to the slots that hold it by then."""
    with EngineProcess(**ARGUMENTS, **EPLB) as engine:
        compare(engine, oracles("tiny-m2"), prompts(2), 16)
        assert "rebalance end" in engine.log
        success, message, *_ = engine.call("update_weights_from_disk", model_path=str(TINY_M2))
        assert success, message
        found = compare(engine, oracles("tiny-m2"), prompts(2), 8)
    assert found.max_error < FP32
    assert found.tokens_equal


def test_a_placement_from_the_start(oracles: Oracles) -> None:
    generator = torch.Generator().manual_seed(5)
    placement = [
        torch.cat(
            [
                torch.randperm(EXPERTS, generator=generator),
                torch.randint(EXPERTS, (REDUNDANT,), generator=generator),
            ]
        ).tolist()
        for _ in range(LAYERS)
    ]
    location = json.dumps({"physical_to_logical_map": placement})
    with EngineProcess(**ARGUMENTS, init_expert_location=location) as engine:
        found = compare(engine, oracles("tiny-m2"), prompts(3), 16)
    assert found.max_error < FP32
    assert found.tokens_equal
