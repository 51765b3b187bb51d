"""What the CPU platform does not run yet: one sentence each, with what works instead."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_minimax.support import Launch


def refusals(launch: Launch) -> Iterator[str]:
    """Yield the reasons not to start `launch` on this platform."""
    if launch.moe_a2a_backend != "none":
        yield (
            f"--moe-a2a-backend {launch.moe_a2a_backend} needs a GPU; on the CPU platform start "
            "without it, expert parallelism works over gloo."
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
