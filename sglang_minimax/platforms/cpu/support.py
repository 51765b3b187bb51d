"""What the CPU platform does not run yet: one sentence each, with what works instead."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_minimax.support import Launch


def refusals(launch: Launch) -> Iterator[str]:
    """Yield the reasons not to start `launch` on this platform."""
    if launch.dp > 1:
        yield (
            f"--attn-dp-size {launch.dp} is not supported on the CPU platform yet; "
            f"use --tp-size {launch.tp} without it."
        )
    if launch.ep > 1:
        yield (
            f"--ep-size {launch.ep} is not supported on the CPU platform yet; "
            "use tensor or pipeline parallelism."
        )
    if launch.speculative_algorithm:
        yield (
            f"--speculative-algorithm {launch.speculative_algorithm} is not supported on the CPU "
            "platform yet; start without it."
        )
    if launch.quantization:
        yield (
            f"{launch.quantization} checkpoints need a GPU's kernels for now; "
            "use a BF16 or FP32 checkpoint on the CPU platform."
        )
