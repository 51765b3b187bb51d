"""Which sizes divide the model evenly, and the nearest ones that do for those that do not.

One sentence an obstacle, in SGLang's option names. What a sentence proposes removes its obstacle
with everything else as asked; a proposed --tp-size leaves none for attention, experts or nodes
that was not there for the nodes before. Where no change of one size helps, the nearest --tp-size
that does together with others is named. No torch, no SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from math import lcm

from sglang_minimax.config import Architecture
from sglang_minimax.loading.formats.base import COLUMNS, ROWS
from sglang_minimax.shards import (
    AttentionShard,
    attention_tp_obstacle,
    divisors,
    is_legal_attention_tp,
    pipeline_refusal,
)

# Size -> SGLang's option for it.
OPTIONS = {
    "tp": "--tp-size",
    "dp": "--attn-dp-size",
    "ep": "--ep-size",
    "pp": "--pp-size",
    "nodes": "--nnodes",
    "attention_cp": "--attn-cp-size",
    "moe_dp": "--moe-dp-size",
}
REDUNDANT = "--ep-num-redundant-experts"
# Larger sizes are not proposed, and not searched for.
MOST_RANKS = 1024


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes as they were asked for; nothing is checked.

    tp: ranks of a pipeline stage. dp: attention data parallel. attention_cp: attention context
    parallel. moe_dp: MoE data parallel. ep_redundant: copies of experts beyond the model's own.
    """

    tp: int = 1
    dp: int = 1
    ep: int = 1
    pp: int = 1
    nodes: int = 1
    attention_cp: int = 1
    moe_dp: int = 1
    ep_redundant: int = 0


# Says why `sizes` cannot be, one sentence an obstacle. Without an architecture only the sizes
# themselves are judged.
Check = Callable[[Architecture | None, Sizes], Iterator[str]]


def refusals(arch: Architecture | None, sizes: Sizes) -> list[str]:
    """Every obstacle, in the order of the checks; empty where the model can be divided so."""
    # A size without ranks would only make the other sentences nonsense.
    absent = list(_absent(arch, sizes))
    return absent or [said for check in CHECKS for said in check(arch, sizes)]


# --- the nearest sizes ---


def nearest_sizes(
    sizes: Sizes, name: str, fits: Callable[[Sizes], bool], limit: int = MOST_RANKS, step: int = 1
) -> tuple[int, ...]:
    """The largest value below and the smallest above the asked one that fit, up to `limit`.

    step: every value that fits is known to be a multiple of it.
    """
    asked, limit = getattr(sizes, name), min(limit, MOST_RANKS)
    below, _ = divmod(min(asked - 1, limit), step)
    above, _ = divmod(asked, step)
    found = []
    for candidates in (range(below * step, 0, -step), range((above + 1) * step, limit + 1, step)):
        fitting = (n for n in candidates if fits(replace(sizes, **{name: n})))
        found += list(islice(fitting, 1))
    return tuple(found)


def _ranks_fit(arch: Architecture | None, sizes: Sizes, asked: Sizes) -> bool:
    """Whether the ranks of `sizes` divide the model, and the nodes no worse than as asked."""
    nodes = _nodes_fit(sizes) or not _nodes_fit(asked)
    return nodes and _attention_fits(arch, sizes) and _experts_fit(arch, sizes)


def _nearest_tp(arch: Architecture | None, asked: Sizes) -> tuple[int, ...]:
    attention, experts = asked.dp * asked.attention_cp, asked.ep * asked.moe_dp
    heads = MOST_RANKS if arch is None else arch.num_heads * attention
    step = lcm(attention, experts)
    return nearest_sizes(asked, "tp", lambda each: _ranks_fit(arch, each, asked), heads, step)


def _nearest_together(arch: Architecture | None, asked: Sizes) -> list[str]:
    """The nearest --tp-size that fits with some --attn-dp-size and --ep-size, all three named."""
    most = min(2 * asked.tp, MOST_RANKS)
    for tp in sorted(range(1, most + 1), key=lambda n: abs(n - asked.tp)):
        parts, at_tp = divisors(tp), replace(asked, tp=tp)
        dp = [n for n in parts if _attention_fits(arch, replace(at_tp, dp=n))]
        ep = [n for n in parts if _experts_fit(arch, replace(at_tp, ep=n))]
        if dp and ep and (_nodes_fit(at_tp) or not _nodes_fit(asked)):
            near_dp = min(dp, key=lambda n: abs(n - asked.dp))
            near_ep = min(ep, key=lambda n: abs(n - asked.ep))
            return [f"--tp-size {tp} with --attn-dp-size {near_dp} and --ep-size {near_ep}"]
    return []


def _remedy(
    arch: Architecture | None, asked: Sizes, name: str, values: tuple[int, ...], *more: str
) -> str:
    """The alternatives: values of option `name`, the nearest --tp-size, what the caller adds."""
    tp = _nearest_tp(arch, asked)
    options = [
        f"{OPTIONS[option]} {' or '.join(map(str, found))}"
        for option, found in ((name, values), ("tp", tp))
        if found
    ]
    options = [*options, *more] or _nearest_together(arch, asked)
    cuts_blocks = arch is not None and arch.recipe.method is not None
    return "use " + (
        ", or ".join(options) or ("a BF16 checkpoint" if cuts_blocks else "fewer ranks")
    )


# --- no ranks ---


def _absent(arch: Architecture | None, sizes: Sizes) -> Iterator[str]:
    for name, option in OPTIONS.items():
        if getattr(sizes, name) < 1:
            yield f"{option} {getattr(sizes, name)} leaves no rank; use {option} 1 or more."
    if sizes.ep_redundant < 0:
        yield f"{REDUNDANT} {sizes.ep_redundant} is negative; use {REDUNDANT} 0 or more."


# --- attention ---


def _attention_tp(sizes: Sizes) -> int | None:
    """The attention-TP size, None where the ranks cannot be divided."""
    size, rest = divmod(sizes.tp, sizes.dp * sizes.attention_cp)
    return None if rest or not size else size


def _attention_fits(arch: Architecture | None, sizes: Sizes) -> bool:
    size = _attention_tp(sizes)
    if size is None or arch is None:
        return size is not None
    if not is_legal_attention_tp(arch.num_heads, arch.num_kv_heads, size):
        return False
    return _cut_head_blocks(arch, size) is None


def _attention(arch: Architecture | None, sizes: Sizes) -> Iterator[str]:
    size = _attention_tp(sizes)
    if size is None:
        context = f" x --attn-cp-size {sizes.attention_cp}" if sizes.attention_cp > 1 else ""
        yield (
            f"--attn-dp-size {sizes.dp}{context} does not divide --tp-size {sizes.tp}; "
            f"{_attention_remedy(arch, sizes)}."
        )
    elif arch is None:
        return
    elif obstacle := attention_tp_obstacle(arch.num_heads, arch.num_kv_heads, size):
        yield f"--tp-size {sizes.tp}: {obstacle}; {_attention_remedy(arch, sizes)}."
    elif cut := _cut_head_blocks(arch, size):
        yield f"{cut}; {_attention_remedy(arch, sizes)}."


def _attention_remedy(arch: Architecture | None, sizes: Sizes) -> str:
    fits = nearest_sizes(sizes, "dp", lambda each: _attention_fits(arch, each), sizes.tp)
    return _remedy(arch, sizes, "dp", fits)


def _cut_head_blocks(arch: Architecture, size: int) -> str | None:
    """Why a rank's heads are not whole blocks of the format; None where they are."""
    shard = AttentionShard.of(arch, size, 0)
    for module, width, along in (
        ("q_proj", shard.q_width, ROWS),
        ("k_proj", shard.kv_width, ROWS),
        ("v_proj", shard.kv_width, ROWS),
        ("o_proj", shard.q_width, COLUMNS),
    ):
        form = arch.recipe.format_of(f"model.layers.0.self_attn.{module}")
        # q, k and v lie under one another on a single rank too.
        alone = size == 1 and along == COLUMNS
        if width % form.unit(along) and not alone:
            return (
                f"attention-TP size {size} leaves {width} {along} of {module} a rank, "
                f"which cuts a block of {form.unit(along)} ({form.title})"
            )
    return None


# --- experts ---


def _moe_tp(sizes: Sizes) -> int | None:
    """Ranks that share an expert's width, None where the ranks cannot be divided."""
    size, rest = divmod(sizes.tp, sizes.ep * sizes.moe_dp)
    return None if rest or not size else size


def _experts_fit(arch: Architecture | None, sizes: Sizes) -> bool:
    size = _moe_tp(sizes)
    if size is None or arch is None:
        return size is not None
    if (arch.num_experts + sizes.ep_redundant) % sizes.ep:
        return False
    # Whole blocks of a quantised expert are dealt to any number of ranks.
    return arch.expert_unit > 1 or arch.expert_width % size == 0


def _experts(arch: Architecture | None, sizes: Sizes) -> Iterator[str]:
    size = _moe_tp(sizes)
    if size is None:
        parts = f" x --moe-dp-size {sizes.moe_dp}" if sizes.moe_dp > 1 else ""
        yield (
            f"--ep-size {sizes.ep}{parts} does not divide --tp-size {sizes.tp}; "
            f"{_expert_remedy(arch, sizes)}."
        )
    elif arch is None:
        return
    elif (physical := arch.num_experts + sizes.ep_redundant) % sizes.ep:
        yield (
            f"--ep-size {sizes.ep} does not divide {physical} experts; "
            f"{_expert_remedy(arch, sizes, *_more_copies(arch, sizes))}."
        )
    elif not _experts_fit(arch, sizes):
        remedy = _expert_remedy(arch, sizes, *_whole_experts(arch, sizes))
        yield f"expert width {arch.expert_width} is not divisible over {size} ranks; {remedy}."


def _nearest_ep(arch: Architecture | None, sizes: Sizes) -> tuple[int, ...]:
    return nearest_sizes(sizes, "ep", lambda each: _experts_fit(arch, each), sizes.tp)


def _expert_remedy(arch: Architecture | None, sizes: Sizes, *more: str) -> str:
    return _remedy(arch, sizes, "ep", _nearest_ep(arch, sizes), *more)


def _more_copies(arch: Architecture, sizes: Sizes) -> list[str]:
    """The way out by redundant experts: the fewest that make every rank's share the same."""
    missing = -(arch.num_experts + sizes.ep_redundant) % sizes.ep
    copies = sizes.ep_redundant + missing
    fits = _experts_fit(arch, replace(sizes, ep_redundant=copies))
    return [f"{REDUNDANT} {copies}"] if fits else []


def _whole_experts(arch: Architecture, sizes: Sizes) -> list[str]:
    """The way out that cuts no expert, where it is not the nearest one."""
    whole, _ = divmod(sizes.tp, sizes.moe_dp)
    if whole in _nearest_ep(arch, sizes) or not _experts_fit(arch, replace(sizes, ep=whole)):
        return []
    return [f"{OPTIONS['ep']} {whole} for whole experts"]


# --- stages and nodes ---


def _pipeline(arch: Architecture | None, sizes: Sizes) -> Iterator[str]:
    if arch is not None and (refusal := pipeline_refusal(arch.num_layers, sizes.pp)):
        yield refusal


def _nodes_fit(sizes: Sizes) -> bool:
    """Whole stages on each node, or whole nodes for each stage.

    SGLang demands only that the nodes divide the ranks, and then starts too few of them where
    neither is the case (entrypoints/engine.py: _calculate_rank_ranges).
    """
    if sizes.pp % sizes.nodes == 0:
        return True
    nodes_a_stage, rest = divmod(sizes.nodes, sizes.pp)
    return rest == 0 and sizes.tp % nodes_a_stage == 0


def _nodes(arch: Architecture | None, sizes: Sizes) -> Iterator[str]:
    if _nodes_fit(sizes):
        return
    near = nearest_sizes(sizes, "nodes", _nodes_fit, sizes.tp * sizes.pp)
    stages = f"{sizes.pp} stages of {sizes.tp} ranks" if sizes.pp > 1 else f"{sizes.tp} ranks"
    whole = " in whole stages or whole nodes a stage" if sizes.pp > 1 else ""
    yield (
        f"--nnodes {sizes.nodes} cannot share {stages} evenly{whole}; "
        f"use --nnodes {' or '.join(map(str, near))}."
    )


CHECKS: tuple[Check, ...] = (_attention, _experts, _pipeline, _nodes)
