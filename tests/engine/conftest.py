"""Engines, checkpoints and oracles that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_minimax import TINY_M2
from sglang_minimax.validation.engine_process import EngineProcess
from sglang_minimax.validation.oracle import TransformersOracle
from sglang_minimax.validation.random_checkpoint import write_random_checkpoint

#: Both forms of the same architecture: head counts that no power of two divides, replicas at
#: TP6, an expert width that is not a multiple of the FP8 block.
HUB_FORM: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "intermediate_size": 96,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "vocab_size": 256,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-2,  # large enough to be seen beside activations of order one
    "rope_theta": 10000,
    "rotary_dim": 16,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "use_routing_bias": True,
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
_HUB_ONLY = (
    *("rope_theta", "rotary_dim", "use_qk_norm", "qk_norm_type", "use_routing_bias"),
    "scoring_func",
)
NATIVE_FORM: dict[str, Any] = {
    **{key: value for key, value in HUB_FORM.items() if key not in _HUB_ONLY},
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000,
        "partial_rotary_factor": 0.5,
    },
}

StartEngine = Callable[..., EngineProcess]


@pytest.fixture(scope="session")
def random_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same random weights under a config of each form."""
    folders = {}
    for name, config in (("hub", HUB_FORM), ("native", NATIVE_FORM)):
        folders[name] = tmp_path_factory.mktemp(name)
        write_random_checkpoint(folders[name], config)
    return folders


@pytest.fixture(scope="session")
def checkpoints(random_checkpoints: dict[str, Path]) -> dict[str, Path]:
    """Every checkpoint by name: tiny-m2, and random weights with either form of config."""
    return {"tiny-m2": TINY_M2, **random_checkpoints}


@pytest.fixture(scope="session")
def oracles(checkpoints: dict[str, Path]) -> Callable[..., TransformersOracle]:
    """transformers' model of a checkpoint by name, built once."""
    built: dict[tuple[str, torch.dtype], TransformersOracle] = {}

    def oracle(name: str, dtype: torch.dtype = torch.float32) -> TransformersOracle:
        if (name, dtype) not in built:
            built[name, dtype] = TransformersOracle(checkpoints[name], dtype)
        return built[name, dtype]

    return oracle


@pytest.fixture(scope="module")
def start(checkpoints: dict[str, Path]) -> Iterator[StartEngine]:
    """Start an engine on a checkpoint by name, once per module for the same arguments."""
    running: dict[str, EngineProcess] = {}
    with ExitStack() as stack:

        def start_engine(name: str = "tiny-m2", **arguments: Any) -> EngineProcess:
            key = f"{name} {sorted(arguments.items())}"
            if key not in running:
                defaults = {"dtype": "float32", "skip_tokenizer_init": True, "log_level": "info"}
                running[key] = stack.enter_context(
                    EngineProcess(model_path=str(checkpoints[name]), **{**defaults, **arguments})
                )
            return running[key]

        yield start_engine
