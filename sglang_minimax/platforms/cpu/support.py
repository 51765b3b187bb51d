"""What the CPU platform does not run: one sentence each, with what works instead."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_minimax.config import Architecture
from sglang_minimax.drafts.config import EAGLE3
from sglang_minimax.moe_exchange.rules import FREE
from sglang_minimax.support import Launch

#: SGLang's names of the formats that are dequantised here; `quantised` computes with them.
QUANTIZATIONS = (
    "fp8",
    "modelopt_fp8",
    "modelopt_fp4",
    "compressed-tensors",
    "w8a8_int8",
    "awq",
    "awq_marlin",
    "gptq_marlin",
    "moe_wna16",
    "quark",
    "modelslim",
)


def refusals(arch: Architecture, launch: Launch) -> Iterator[str]:
    """Yield the reasons not to start `launch` on this platform."""
    if launch.moe_a2a_backend not in FREE:
        yield (
            f"--moe-a2a-backend {launch.moe_a2a_backend} needs a GPU; on the CPU platform start "
            "without it, expert parallelism works over gloo."
        )
    if launch.speculative_algorithm not in (None, EAGLE3):
        yield (
            f"--speculative-algorithm {launch.speculative_algorithm} is not supported on the CPU "
            f"platform; use {EAGLE3}, or start without it."
        )
    for option in launch.speculative_options:
        yield f"{option} needs a GPU; start without it on the CPU platform."
    if launch.quantization and arch.recipe.method is None:
        yield (
            f"--quantization {launch.quantization} quantises plain weights with a GPU's kernels; "
            "start without it on the CPU platform."
        )
    elif launch.quantization and launch.quantization not in QUANTIZATIONS:
        yield (
            f"quantization {launch.quantization} is not computed on the CPU platform; use a "
            "checkpoint in a format of docs/cpu-platform.md, or an unquantised one."
        )
