"""What SGLang asks of the model besides its forward, looked at from inside its ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_minimax import TINY_M2
from sglang_minimax.validation.agreement import random_prompt
from sglang_minimax.validation.engine_process import EngineProcess
from sglang_minimax.validation.oracle import TransformersOracle

LAYERS = 4
ARGUMENTS: dict[str, Any] = {
    "model_path": str(TINY_M2),
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "log_level": "info",
}


def in_each_rank(act: Callable[[Any], None]) -> Callable[[], None]:
    """A `before` for EngineProcess: call `act(model_runner)` in each rank once it is set up."""

    def install() -> None:
        from sglang.srt.managers.scheduler import Scheduler

        original = Scheduler.init_model_worker

        def init_model_worker(self: Any) -> None:
            original(self)
            act(self.tp_worker.model_runner)

        Scheduler.init_model_worker = init_model_worker

    return install


def reports(folder: Path, describe: Callable[[Any], Any], **arguments: Any) -> list[Any]:
    """Run `describe(model_runner)` in each rank of an engine; the answers in rank order."""

    def act(runner: Any) -> None:
        import torch.distributed

        rank = torch.distributed.get_rank()
        (folder / f"{rank}.json").write_text(json.dumps(describe(runner)))

    with EngineProcess(before=in_each_rank(act), **ARGUMENTS, **arguments):
        return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def _stage(runner: Any) -> dict[str, Any]:
    model = runner.model
    return {
        "layers": [model.start_layer, model.end_layer],
        "kv_layers": runner.token_to_kv_pool.layer_num,
        "parameters": sorted(
            {name.split(".layers.")[0].removesuffix(".weight") for name, _ in _owned(model)}
        ),
        "layer_ids": sorted(
            {int(n.split(".layers.")[1].split(".")[0]) for n, _ in _owned(model) if ".layers." in n}
        ),
    }


def _owned(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return list(model.named_parameters())


def test_a_pipeline_stage_holds_its_share_alone(tmp_path: Path) -> None:
    first, last = reports(tmp_path, _stage, pp_size=2)
    assert first == {
        "layers": [0, 2],
        "kv_layers": 2,
        "parameters": ["model", "model.embed_tokens"],
        "layer_ids": [0, 1],
    }
    assert last == {
        "layers": [2, 4],
        "kv_layers": 2,
        "parameters": ["lm_head", "model", "model.norm"],
        "layer_ids": [2, 3],
    }


def _experts_and_head(runner: Any) -> dict[str, Any]:
    model = runner.model
    location = type(model).get_model_config_for_expert_location(model.config)
    embed, head = model.get_embed_and_head()
    model.set_embed_and_head(head.data.clone(), embed.data.clone())
    swapped = model.get_embed_and_head()
    refused = []
    for wrong in ([LAYERS], [-2], [1, 1]):
        try:
            model.set_eagle3_layers_to_capture(wrong)
        except ValueError as error:
            refused.append(str(error))
    return {
        "experts": {k: [list(t.shape) for t in v] for k, v in _weights(model).items()},
        "location": [location.num_layers, location.num_logical_experts, location.num_groups],
        "head": [list(embed.shape), list(head.shape)],
        "swapped": torch.equal(swapped[0], head) and torch.equal(swapped[1], embed),
        "refused": refused,
        "packed": sorted(model.packed_modules_mapping),
        "tf32": torch.get_float32_matmul_precision(),
        "router": str(model.model.layers[0].block_sparse_moe.gate.weight.dtype),
    }


def _weights(model: Any) -> dict[int, list[torch.Tensor]]:
    return model.routed_experts_weights_of_layer


def test_experts_embedding_and_head(tmp_path: Path) -> None:
    first, second = reports(tmp_path, _experts_and_head, tp_size=2)
    assert first == second
    # w13 [experts, 2 * width, hidden] and w2 [experts, hidden, width], width 384 over two ranks.
    assert first["experts"] == {str(i): [[8, 384, 128], [8, 128, 192]] for i in range(LAYERS)}
    assert first["location"] == [LAYERS, 8, None]
    assert first["head"] == [[448, 128], [448, 128]]  # 896 vocabulary rows over two ranks
    assert first["swapped"]
    assert len(first["refused"]) == 3
    assert "at most 3" in first["refused"][0]
    assert first["packed"] == ["experts", "gate_up_proj", "qkv_proj"]
    assert first["router"] == "torch.float32"
    assert first["tf32"] == "highest"


@pytest.mark.parametrize("setter", ["set_eagle3_layers_to_capture", "set_dflash_layers_to_capture"])
@pytest.mark.parametrize("shape", [{}, {"tp_size": 2}], ids=["tp1", "tp2"])
def test_captured_residuals_are_the_layers_outputs(
    oracles: Callable[..., TransformersOracle], setter: str, shape: dict[str, int]
) -> None:
    """Every layer's output, the last one included, as transformers computes it."""

    def capture_all(runner: Any) -> None:
        getattr(runner.model, setter)(list(range(LAYERS)))

    prompt = random_prompt(20, 896, seed=11)
    arguments = {**ARGUMENTS, **shape, "enable_return_hidden_states": True}
    with EngineProcess(before=in_each_rank(capture_all), **arguments) as engine:
        reply = engine.generate(
            input_ids=prompt,
            sampling_params={"temperature": 0, "max_new_tokens": 1},
            return_hidden_states=True,
        )
    found = torch.tensor(reply["meta_info"]["hidden_states"][0])  # [tokens, LAYERS * hidden]
    expected = torch.cat(oracles("tiny-m2").layer_outputs(prompt), dim=-1)
    assert found.shape == expected.shape
    # Residuals grow to a few tens; the same relative error as for log-probabilities.
    assert (found - expected).abs().max() < 1e-4
