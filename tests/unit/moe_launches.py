"""Launches of every checkpoint format on every kind of GPU, for the rules of the exchange."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from sglang_minimax.config import Architecture
from sglang_minimax.loading.formats.table import EXAMPLES
from sglang_minimax.moe_exchange import rules
from sglang_minimax.moe_exchange.paths import FORCEABLE
from sglang_minimax.support import Launch


def architecture(config: dict[str, Any] | None, **more: Any) -> Architecture:
    quantised = {"quantization_config": config} if config else {}
    return Architecture.from_config({"head_dim": 128, **quantised, **more})


def example(words: str) -> dict[str, Any] | None:
    """The config that docs/formats.md shows under these words."""
    (found,) = [each.config for each in EXAMPLES if words in each.keys]
    return None if found is None else dict(found)


BLOCKS = example("`fp8`, `weight_block_size`")
CHECKPOINTS = {
    "bf16": architecture(None),
    "fp8": architecture(BLOCKS),
    "fp8-tensor": architecture(example("`fp8`, `activation_scheme: dynamic`")),
    "nvfp4": architecture({"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "nvfp4-w4a16": architecture({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}),
    "awq": architecture(example("`awq`")),
    # 3136 columns are 24.5 groups of 128.
    "fp8-narrow": architecture(BLOCKS, hidden_size=3136),
    "ct-channel": architecture(example("`compressed-tensors`, `float-quantized`, channel")),
}
METHODS = {name: arch.recipe.method for name, arch in CHECKPOINTS.items()}

GPUS = {
    "sm80": {"hardware": "cuda", "capability": 80},
    "sm90": {"hardware": "cuda", "capability": 90},
    "sm100": {"hardware": "cuda", "capability": 100},
    "sm120": {"hardware": "cuda", "capability": 120},
    "rocm": {"hardware": "rocm"},
    "cpu": {"hardware": "cpu"},
}

#: What experts run with --moe-runner-backend auto and no a2a backend, by checkpoint and GPU; None
#: where there are no kernels.
RUNS = {
    "bf16": dict.fromkeys(("sm80", "sm90", "sm100", "sm120", "rocm"), "triton"),
    "fp8": {"sm80": None, **dict.fromkeys(("sm90", "sm100", "sm120", "rocm"), "triton")},
    "nvfp4": {
        "sm80": "marlin",
        "sm90": "marlin",
        "sm100": "flashinfer_trtllm_routed",
        "sm120": "flashinfer_cutlass",
        "rocm": None,
    },
    "awq": {**dict.fromkeys(("sm80", "sm90", "sm100", "sm120"), "marlin"), "rocm": None},
}
RUNS["fp8-tensor"] = RUNS["fp8-narrow"] = RUNS["ct-channel"] = RUNS["fp8"]
RUNS["nvfp4-w4a16"] = RUNS["nvfp4"]

#: Runner -> forms of rows that it takes from a dispatcher.
READS = {
    "torch": {"plain", "fp8", "fp4"},
    "triton": {"plain", "fp8"},
    "deep_gemm": {"plain"},
    "marlin": {"plain"},
    "flashinfer_cutlass": {"plain", "fp4"},
    "flashinfer_trtllm_routed": {"plain", "fp4"},
    "flashinfer_trtllm": {"plain", "fp4"},
}
#: Form of rows -> checkpoints that can have it.
FORMS = {"plain": set(CHECKPOINTS), "fp8": {"fp8"}, "fp4": {"nvfp4"}}


class Case(NamedTuple):
    """One launch of the table."""

    checkpoint: str
    gpu: str
    launch: Launch

    @property
    def arch(self) -> Architecture:
        return CHECKPOINTS[self.checkpoint]


def case(checkpoint: str, gpu: str, **arguments: Any) -> Case:
    launch = Launch(**{**GPUS[gpu], "quantization": METHODS[checkpoint], **arguments})
    return Case(checkpoint, gpu, rules.resolved(launch))


DP8 = {"tp": 8, "dp": 8, "ep": 8}
DP2 = {"tp": 8, "dp": 2, "ep": 8}
EP8 = {"tp": 8, "ep": 8}
SIZES = (
    {"tp": 1},
    {"tp": 8},
    {"tp": 8, "ep": 8},
    {"tp": 4, "ep": 2, "nodes": 2},
    {"tp": 8, "dp": 8, "ep": 8},
    {"tp": 8, "dp": 8, "ep": 1},
    {"tp": 8, "dp": 2, "ep": 8},
    {"tp": 4, "dp": 2, "ep": 2, "pp": 2},
    {"tp": 16, "dp": 4, "ep": 16, "nodes": 2},
)
RUNNERS = ("auto", "triton", "deep_gemm", "marlin", "flashinfer_cutlass", "flashinfer_trtllm")
BACKENDS = ("none", "deepep")
FORCED = (None, *FORCEABLE)

TABLE = [
    case(
        checkpoint,
        gpu,
        **sizes,
        moe_runner_backend=runner,
        moe_a2a_backend=backend,
        moe_exchange=forced,
    )
    for checkpoint, gpu, sizes, (runner, backend, forced) in itertools.product(
        CHECKPOINTS,
        GPUS,
        SIZES,
        [
            *((runner, "none", forced) for runner in RUNNERS for forced in FORCED),
            *(("auto", backend, forced) for backend in BACKENDS[1:] for forced in FORCED[:3]),
        ],
    )
]
