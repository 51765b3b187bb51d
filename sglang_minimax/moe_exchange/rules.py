"""Which paths to the experts a launch can take, which it does take, and why not the others.

A path that cannot be taken has obstacles: a clause that says why, and changes with which it, or one
near it, can be taken. The default is the path of the fewest bytes among those that have none; a
path that was asked for and has one is refused in a sentence made of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from sglang_minimax import legality
from sglang_minimax.moe_exchange import rules_runner
from sglang_minimax.moe_exchange.paths import (
    CUSTOMIZED,
    FORCEABLE,
    SGLANG,
    Movement,
    Path,
    Rows,
)
from sglang_minimax.moe_exchange.payload import FP4_BLOCK, FP8_GROUP
from sglang_minimax.moe_exchange.rules_runner import CPU

if TYPE_CHECKING:
    from sglang_minimax.config import Architecture
    from sglang_minimax.support import Launch

#: Environment variable that names the path to take, one of FORCEABLE.
VARIABLE = "SGLANG_MINIMAX_MOE"
#: SGLang's, with which NVFP4 experts quantise each row by a scale of its own.
BY_TOKEN = "SGLANG_FLASHINFER_NVFP4_PER_TOKEN_ACTIVATION"

#: Values of --moe-a2a-backend with which SGLang leaves the exchange to us: its default, and what we
#: put in its place.
FREE = ("none", CUSTOMIZED)
#: Those with which SGLang sets --ep-size to --tp-size (overrides._A2A_EP_SPANNING_BACKENDS).
SPANNING = (
    *("deepep", "deepep_v2", "mooncake", "nixl", "mori", "pplx", "flashinfer"),
    *("megamoe", "flashinfer_megamoe", "ascend_fuseep"),
)
# Draft algorithm that with attention DP refuses exchanges that it does not know
# (speculative_hook._handle_dspark).
_NEEDS_STANDARD = "DSPARK"
# Ways out that one sentence names.
_REMEDIES = 2

_GATHER = Path(Movement.GATHER)
# Forms of rows, the fewest bytes first.
_BY_BYTES = (Rows.FP4, Rows.FP8, Rows.PLAIN)


class Change(NamedTuple):
    """What to do, and the launch that it makes."""

    text: str
    launch: Launch


class Obstacle(NamedTuple):
    """Why a path cannot be taken, as a clause, and what might help."""

    why: str
    changes: tuple[Change, ...] = ()


def forced(launch: Launch) -> str | None:
    """The path that the environment asks for, by name, None where it names none."""
    return (launch.moe_exchange or "").strip() or None


def resolved(launch: Launch) -> Launch:
    """A launch with the sizes that SGLang takes for its backend."""
    return replace(launch, ep=launch.tp) if launch.moe_a2a_backend in SPANNING else launch


def choose(arch: Architecture, launch: Launch) -> tuple[Path, str]:
    """The path of a launch that `refusals` has nothing against, and why it is that one."""
    name = forced(launch)
    if name is not None:
        return FORCEABLE[name], f"{VARIABLE} asks for it"
    if launch.moe_a2a_backend not in FREE:
        backend = Path(Movement.BACKEND, backend=launch.moe_a2a_backend)
        return backend, f"--moe-a2a-backend {launch.moe_a2a_backend} asks for it"
    if launch.tp == 1:
        return SGLANG, "one rank has all rows and all experts"
    if launch.dp == 1:
        return SGLANG, "every rank has all rows without attention DP"
    if (against := _first(arch, launch, _GATHER)) is not None:
        return SGLANG, against.why
    for rows in _BY_BYTES[:-1]:
        path = Path(Movement.GATHER, rows)
        if _first(arch, launch, path) is None:
            return path, "the fewest bytes with attention DP that the experts' kernels can read"
    reason = next(obstacles(arch, launch, Path(Movement.GATHER, Rows.FP8))).why
    return _GATHER, f"attention DP, and no quantised rows: {reason}"


def refusals(arch: Architecture, launch: Launch) -> Iterator[str]:
    """Why there is no plan for a launch: its runner, or the path that it asks for.

    launch: of sizes that divide the architecture.
    """
    yield from rules_runner.refusals(arch, launch)
    name = forced(launch)
    if name is None:
        return
    if name not in FORCEABLE:
        yield (
            f"{VARIABLE}={name} names no path to the experts; use one of "
            f"{', '.join(FORCEABLE)}, or unset it."
        )
        return
    found = _first(arch, launch, FORCEABLE[name])
    if found is not None:
        fitting = [change.text for change in found.changes if _is_legal(arch, change.launch)]
        remedies = [*fitting, f"unset {VARIABLE}"][:_REMEDIES]
        yield f"{VARIABLE}={name} cannot be: {found.why}; {', or '.join(remedies)}."


def _is_legal(arch: Architecture, launch: Launch) -> bool:
    """Whether a launch that asks for a path can take it."""
    name = forced(launch)
    return (
        name in FORCEABLE
        and not legality.refusals(arch, launch)
        and not any(rules_runner.refusals(arch, launch))
        and _first(arch, launch, FORCEABLE[name]) is None
    )


def _first(arch: Architecture, launch: Launch, path: Path) -> Obstacle | None:
    return next(obstacles(arch, launch, path), None)


def obstacles(arch: Architecture, launch: Launch, path: Path) -> Iterator[Obstacle]:
    """What is against a path that can be asked for, what concerns every form of rows first."""
    if launch.moe_a2a_backend not in FREE:
        without = replace(launch, moe_a2a_backend="none")
        option = f"--moe-a2a-backend {launch.moe_a2a_backend}"
        change = Change(f"start without {option}", without)
        yield Obstacle(f"{option} moves the rows itself", (change,))
    if path.is_ours:
        yield from _place(launch)
        yield from _features(launch)
        if path.movement is Movement.ALL_TO_ALL:
            yield from _all_to_all(launch)
        yield from _rows(arch, launch, path)


def prices(launch: Launch, path: Path) -> Iterator[str]:
    """What a path costs elsewhere, and that nobody has measured it: one sentence each."""
    if path.movement is not Movement.SGLANG and launch.hardware != CPU:
        back = f"; {VARIABLE}={SGLANG.name} goes back to SGLang's own way" if path.is_ours else ""
        yield f"{path.name} has not been measured on GPUs for MiniMax-M2{back}."
    if path.is_ours and launch.prefill_graphs:
        yield (
            f"SGLang captures no CUDA graphs of prefill with {path.name} (arg_groups/"
            f"cuda_graph_hook.py, 'unvalidated a2a backend'); {VARIABLE}={SGLANG.name} keeps them."
        )


def _with_path(launch: Launch, path: Path) -> Change:
    return Change(f"use {VARIABLE}={path.name}", replace(launch, moe_exchange=path.name))


def _other_rows(launch: Launch, path: Path) -> tuple[Change, ...]:
    """The same movement with rows of another form, the fewest bytes first."""
    others = (Path(path.movement, rows) for rows in _BY_BYTES if rows is not path.rows)
    return tuple(_with_path(launch, each) for each in others if each.name in FORCEABLE)


def _place(launch: Launch) -> Iterator[Obstacle]:
    if launch.hardware not in ("cuda", CPU):
        here = launch.hardware or "unknown hardware"
        yield Obstacle(f"our exchanges run on CUDA and on the CPU platform, not on {here}")
    if launch.tp == 1:
        yield Obstacle("a stage of one rank has nothing to exchange")


def _features(launch: Launch) -> Iterator[Obstacle]:
    if launch.attention_cp > 1:
        yield Obstacle(
            f"--attn-cp-size {launch.attention_cp} cuts sequences over ranks, which our exchanges "
            "do not follow"
        )
    if launch.moe_dp > 1:
        yield Obstacle(
            f"--moe-dp-size {launch.moe_dp} divides the experts' ranks into groups, and our "
            "exchanges span all of them"
        )
    if launch.enable_lora:
        without = Change("start without --enable-lora", replace(launch, enable_lora=False))
        yield Obstacle("--enable-lora needs SGLang's own exchange", (without,))
    if launch.enable_return_routed_experts:
        option = "--enable-return-routed-experts"
        silent = replace(launch, enable_return_routed_experts=False)
        change = Change(f"start without {option}", silent)
        yield Obstacle(f"{option} needs SGLang's own exchange", (change,))
    for option in launch.needs_sglang:
        others = tuple(each for each in launch.needs_sglang if each != option)
        change = Change(f"start without {option}", replace(launch, needs_sglang=others))
        yield Obstacle(f"{option} needs SGLang's own exchange", (change,))
    if (launch.speculative_algorithm or "").upper() == _NEEDS_STANDARD and launch.dp > 1:
        yield Obstacle(f"{_NEEDS_STANDARD} with attention DP needs SGLang's own exchange")


def _all_to_all(launch: Launch) -> Iterator[Obstacle]:
    gather = _with_path(launch, _GATHER)
    if launch.hardware != CPU:
        yield Obstacle(
            "the sizes of an all-to-all are known to the host only, which no CUDA graph captures",
            (gather,),
        )
    if launch.ep != launch.tp:
        whole = Change(f"use --ep-size {launch.tp}", replace(launch, ep=launch.tp))
        yield Obstacle(
            f"a row goes to the ranks that have its experts whole, and {launch.tp // launch.ep} "
            "ranks share each expert",
            (whole, gather),
        )


def _rows(arch: Architecture, launch: Launch, path: Path) -> Iterator[Obstacle]:
    form = rules_runner.expert_format(arch)
    others = _other_rows(launch, path)
    if path.rows is Rows.FP8 and not rules_runner.has_fp8_blocks(arch):
        blocks = f"{FP8_GROUP}x{FP8_GROUP}"
        why = f"FP8 rows are for FP8 experts in {blocks} blocks, and these are {form.title}"
        yield Obstacle(why, others)
    if path.rows is Rows.FP4 and not rules_runner.has_fp4_inputs(arch):
        without = " without one" if form.tensor("input_scale") is not None else ""
        why = (
            "FP4 rows are for NVFP4 experts with a scale of their inputs, and these are "
            f"{form.title}{without}"
        )
        yield Obstacle(why, others)
    if path.rows is Rows.FP4 and launch.fp4_by_token:
        yield Obstacle(f"{BY_TOKEN} scales each row by itself, which FP4 rows do not carry", others)
    columns = {Rows.FP8: FP8_GROUP, Rows.FP4: FP4_BLOCK}.get(path.rows, 1)
    if arch.hidden_size % columns:
        why = f"a scale is for {columns} columns, which do not divide hidden size"
        yield Obstacle(f"{why} {arch.hidden_size}", others)
    runner = rules_runner.runner_of(arch, launch).name
    if runner not in rules_runner.READERS[path.rows]:
        runners = tuple(
            Change(f"use --moe-runner-backend {name}", replace(launch, moe_runner_backend=name))
            for name in rules_runner.proposals(arch, launch, path.rows)
        )
        why = f"the {runner} kernels {_UNREAD[path.rows]}"
        # One runner is enough; the other way out is another form of rows.
        yield Obstacle(why, (*runners[:1], *others))


_UNREAD = {
    Rows.PLAIN: "are not known to take rows that were routed before they came",
    Rows.FP8: "cannot take FP8 rows with their scales",
    Rows.FP4: "cannot take FP4 rows with their scales",
}
