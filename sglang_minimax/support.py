"""What is refused at launch, decided from plain values: one sentence each, with what works instead.

Asked while arguments are checked, before a process is started or a byte of the checkpoint is read.
No SGLang, no torch: the caller reads its arguments into a `Launch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import lcm

from sglang_minimax.config import Architecture
from sglang_minimax.topology import (
    AttentionShard,
    attention_tp_refusal,
    is_legal_attention_tp,
    moe_tp_size,
)

# Formats that the strict loader accounts for tensor by tensor.
QUANTIZATIONS = (None, "fp8")
# Draft algorithms that read residuals captured on one pipeline stage.
CAPTURING_ALGORITHMS = ("EAGLE3", "DFLASH", "DSPARK")


@dataclass(frozen=True, slots=True)
class Launch:
    """The arguments that bear on what is supported.

    tp, dp, ep, pp: --tp-size, --attn-dp-size, --ep-size, --pp-size. attention_cp: --attn-cp-size.
    moe_dp: --moe-dp-size. ep_redundant: --ep-num-redundant-experts.
    """

    tp: int = 1
    dp: int = 1
    ep: int = 1
    pp: int = 1
    attention_cp: int = 1
    moe_dp: int = 1
    enable_two_batch_overlap: bool = False
    enable_single_batch_overlap: bool = False
    ep_redundant: int = 0
    speculative_algorithm: str | None = None
    quantization: str | None = None
    moe_a2a_backend: str = "none"


Check = Callable[[Architecture, Launch], Iterator[str]]


def refusals(arch: Architecture, launch: Launch) -> list[str]:
    """Every reason not to start, in the order of the checks below; empty when there is none."""
    return [sentence for check in CHECKS for sentence in check(arch, launch)]


def _sizes(arch: Architecture, launch: Launch) -> Iterator[str]:
    for option, size in (
        ("--tp-size", launch.tp),
        ("--attn-dp-size", launch.dp),
        ("--ep-size", launch.ep),
        ("--pp-size", launch.pp),
    ):
        if size < 1:
            yield f"{option} {size} leaves no rank; use {option} 1 or more."


def _attention(arch: Architecture, launch: Launch) -> Iterator[str]:
    if min(launch.tp, launch.dp) < 1:
        return
    size = _attention_tp(launch)
    if size is None:
        yield (
            f"--tp-size {launch.tp} cannot be divided into {_attention_parts(launch)} data- or "
            f"context-parallel attention groups; use an --attn-dp-size that divides {launch.tp}."
        )
        return
    refusal = attention_tp_refusal(arch.num_heads, arch.num_kv_heads, size)
    if refusal:
        yield f"--tp-size {launch.tp}: {refusal}{_data_parallel_remedy(arch, launch)}"
    elif cut := _cut_head_blocks(arch, size):
        yield cut


def _attention_parts(launch: Launch) -> int:
    return launch.dp * launch.attention_cp


def _attention_tp(launch: Launch) -> int | None:
    """The attention-TP size, None where the ranks cannot be divided."""
    size, rest = divmod(launch.tp, _attention_parts(launch))
    return None if rest or not size else size


def _attention_fits(arch: Architecture, launch: Launch) -> bool:
    size = _attention_tp(launch)
    if size is None or not is_legal_attention_tp(arch.num_heads, arch.num_kv_heads, size):
        return False
    return _cut_head_blocks(arch, size) is None


def _data_parallel_remedy(arch: Architecture, launch: Launch) -> str:
    """The smallest --attn-dp-size that makes the attention fit these ranks, if there is one."""
    for dp in range(2, launch.tp + 1):
        if _attention_fits(arch, replace(launch, dp=dp)):
            return f" With --attn-dp-size {dp} the same ranks fit."
    return ""


def _cut_head_blocks(arch: Architecture, size: int) -> str | None:
    """Why a rank's heads are not whole FP8 blocks; None where they are, or there are none."""
    if arch.weight_block is None:
        return None
    shard = AttentionShard(size, 0, arch.head_dim, arch.num_heads, arch.num_kv_heads)
    rows, columns = arch.weight_block
    for what, width, block in (
        ("q_proj", shard.q_width, rows),
        ("k_proj and v_proj", shard.kv_width, rows),
        ("o_proj", shard.q_width, columns if size > 1 else 1),
    ):
        if width % block:
            return (
                f"attention-TP size {size} leaves {width} rows of {what} a rank, which cuts a "
                f"{block}-row FP8 block; use fewer ranks or a BF16 checkpoint."
            )
    return None


def _experts(arch: Architecture, launch: Launch) -> Iterator[str]:
    if min(launch.tp, launch.ep) < 1:
        return
    if launch.tp % launch.ep:
        yield (
            f"--ep-size {launch.ep} does not divide --tp-size {launch.tp}; "
            f"use --ep-size {_largest_divisor(launch.tp, launch.ep)}."
        )
        return
    physical = arch.num_experts + launch.ep_redundant
    if physical % launch.ep:
        yield (
            f"--ep-size {launch.ep} does not divide {physical} experts; use --ep-size "
            f"{_largest_divisor(physical, launch.ep)}, or add {-physical % launch.ep} to "
            "--ep-num-redundant-experts."
        )
        return
    yield from _expert_width(arch, launch)


def _expert_width(arch: Architecture, launch: Launch) -> Iterator[str]:
    if _expert_fits(arch, launch):
        return
    size, width = moe_tp_size(launch.tp // launch.moe_dp, launch.ep), arch.expert_width
    rows, rest = divmod(width, size)
    remedy = _expert_remedy(arch, launch)
    if rest:
        yield f"expert width {width} is not divisible over {size} ranks; {remedy}."
    else:
        yield (
            f"expert width {width} over MoE-TP {size} leaves {rows} rows a rank, which cuts a "
            f"{_expert_block(arch)}-row FP8 block; {remedy}."
        )


def _expert_block(arch: Architecture) -> int:
    """Rows of an expert that must stay together: whole blocks of w1 and w3, and of w2's columns."""
    return lcm(*arch.weight_block) if arch.weight_block else 1


def _expert_fits(arch: Architecture, launch: Launch) -> bool:
    if launch.tp % launch.ep or (arch.num_experts + launch.ep_redundant) % launch.ep:
        return False
    rows, rest = divmod(arch.expert_width, moe_tp_size(launch.tp // launch.moe_dp, launch.ep))
    return not rest and rows % _expert_block(arch) == 0


def _expert_remedy(arch: Architecture, launch: Launch) -> str:
    """The largest --ep-size on these ranks, or the nearest smaller --tp-size, that fits."""
    wider = [replace(launch, ep=ep) for ep in range(launch.tp, launch.ep, -1)]
    smaller = [replace(launch, tp=tp) for tp in range(launch.tp - 1, 0, -1)]
    options = [f"--ep-size {each.ep}" for each in wider if _expert_fits(arch, each)][:1]
    options += [
        f"--tp-size {each.tp}"
        for each in smaller
        if _expert_fits(arch, each) and _attention_fits(arch, each)
    ][:1]
    return "use " + (" or ".join(options) or "a BF16 checkpoint")


def _largest_divisor(total: int, at_most: int) -> int:
    return next(n for n in range(min(total, at_most), 0, -1) if total % n == 0)


def _pipeline(arch: Architecture, launch: Launch) -> Iterator[str]:
    if launch.pp > arch.num_layers:
        yield (
            f"--pp-size {launch.pp} exceeds the {arch.num_layers} layers; "
            f"use --pp-size {arch.num_layers} or less."
        )
    algorithm = (launch.speculative_algorithm or "").upper()
    if launch.pp > 1 and algorithm in CAPTURING_ALGORITHMS:
        yield (
            f"{algorithm} reads the outputs of layers that --pp-size {launch.pp} puts on several "
            "stages; use --pp-size 1."
        )


def _overlap(arch: Architecture, launch: Launch) -> Iterator[str]:
    if launch.enable_two_batch_overlap:
        yield (
            "two-batch overlap is not supported for MiniMax-M2 yet; "
            "start without --enable-two-batch-overlap."
        )
    if launch.enable_single_batch_overlap:
        yield (
            "single-batch overlap is not supported for MiniMax-M2 yet; "
            "start without --enable-single-batch-overlap."
        )


def _format(arch: Architecture, launch: Launch) -> Iterator[str]:
    if launch.quantization not in QUANTIZATIONS:
        yield (
            f"quantization {launch.quantization} is not supported for MiniMax-M2 yet; use the "
            "published FP8 checkpoint or a BF16 one, or set SGLANG_MINIMAX=0 to serve this one "
            "with SGLang's own model."
        )


CHECKS: tuple[Check, ...] = (_sizes, _attention, _experts, _pipeline, _overlap, _format)
