"""The exchange plan for people and for programs: start-up lines, and the moves of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sglang_minimax.legality import Sizes
from sglang_minimax.moe_exchange.moves import Batch, Move
from sglang_minimax.moe_exchange.paths import Movement, Rows
from sglang_minimax.moe_exchange.plan import ExchangePlan
from sglang_minimax.topology import Topology

#: Bytes of a number -> the type of the model's rows.
DTYPES = {2: "bf16", 4: "fp32"}
#: Form of quantised rows -> their type, and that of their scales.
QUANTISED = {Rows.FP8: ("e4m3", "fp32"), Rows.FP4: ("e2m1", "e4m3")}
#: Rows of each attention-DP group that are shown: one token of 32 requests, and prompts of which
#: the first group has half as many rows as the others.
DECODE_ROWS, PREFILL_ROWS = 32, 2048


class Step(NamedTuple):
    """A collective of a layer. what: it does. dtype: of what it carries, without scales."""

    what: str
    move: Move
    dtype: str


class Shown(NamedTuple):
    """A batch that is shown. name: decode or prefill."""

    name: str
    batch: Batch


def lines(plan: ExchangePlan, sizes: Sizes) -> list[str]:
    """The start-up lines of a plan. sizes: of the launch that it was made for."""
    said = [
        f"{plan.path.name} ({plan.why}): {_sent(plan)}; experts run {plan.runner} "
        f"({plan.runner_why}); {plan.combine} after them ({plan.combine_why})"
    ]
    if sizes.attention_cp == sizes.moe_dp == 1:
        topology = Topology(sizes.tp, sizes.dp, sizes.ep, sizes.pp, sizes.nodes)
        said += _in_a_layer(plan, topology)
    return [f"MoE exchange: {each}" for each in (*said, *plan.prices)]


def _in_a_layer(plan: ExchangePlan, topology: Topology) -> Iterator[str]:
    """The collectives of a decode and of a prefill, and what a token costs on links."""
    for shown in batches(topology):
        received = per_token(plan, topology, shown.batch)
        named = [
            f"{move.operation} over {move.kind.replace('_', '-')}"
            for move in plan.layer(topology, shown.batch)
        ]
        if received and named:
            yield (
                f"a layer of a {shown.name}: {', '.join(named)}; {received:,.0f} B reach a rank "
                "for each token"
            )


def _sent(plan: ExchangePlan) -> str:
    """What leaves a rank for the experts, for each token."""
    if plan.path.movement is Movement.BACKEND:
        return "as SGLang's dispatcher packs them"
    more = ", ids and weights" if _routed_before(plan) else ""
    return f"{dtype_of(plan)}{more}, {sent(plan):,} B a row"


def dtype_of(plan: ExchangePlan) -> str:
    """The type of the rows that travel to the experts, with that of their scales."""
    if plan.payload.rows is Rows.PLAIN:
        return _model_dtype(plan)
    return "{} with {} scales".format(*QUANTISED[plan.payload.rows])


def _model_dtype(plan: ExchangePlan) -> str:
    return DTYPES.get(plan.payload.item_bytes, f"{plan.payload.item_bytes} B")


def batches(topology: Topology) -> tuple[Shown, Shown]:
    """A decode, padded alike, and a prefill, padded to attention-TP alone, as SGLang does both."""
    decode = Batch.full(topology, DECODE_ROWS * topology.attention_tp)
    rows = PREFILL_ROWS * topology.attention_tp
    if topology.dp == 1:
        return Shown("decode", decode), Shown("prefill", Batch((rows,)))
    groups = (rows // 2, *(rows,) * (topology.dp - 1))
    return Shown("decode", decode), Shown("prefill", Batch(groups, "SUM_LEN"))


def steps(plan: ExchangePlan, topology: Topology, batch: Batch) -> list[Step]:
    """The collectives of a layer, in order, on a rank of the first group."""
    across = iter(_across(plan, topology))
    model = _model_dtype(plan)
    said = []
    for move in plan.layer(topology, batch):
        if move.kind == "tp":
            what, dtype = next(across)
            said.append(Step(what, move, dtype or model))
        elif move.operation == "reduce_scatter_tensor":
            said.append(Step("attention's sum", move, model))
        else:
            said.append(Step("the group's rows again", move, model))
    return said


def _across(plan: ExchangePlan, topology: Topology) -> Sequence[tuple[str, str]]:
    """(what it does, type) of the moves over all ranks of a stage; no type for the model's."""
    movement = plan.path.movement
    rows, _ = QUANTISED.get(plan.payload.rows, ("", ""))
    if movement is Movement.GATHER or plan.payload.rows is Rows.FP4:
        return ("all ranks' rows, ids, weights", rows), ("experts' sums, to the owners", "")
    if movement is Movement.ALL_TO_ALL:
        return (
            ("how many rows come", "int64"),
            ("rows, to their experts", rows),
            ("outputs, to the owners", ""),
        )
    if topology.dp == 1:
        return ("attention's sum", ""), ("experts' sum", "")
    return ("all groups' rows", ""), ("experts' sums", "")


def as_dict(plan: ExchangePlan, topology: Topology) -> dict[str, Any]:
    """The plan and the moves of both batches, for JSON."""
    return {
        "path": plan.path.name,
        "why": plan.why,
        "runner": plan.runner,
        "runner_why": plan.runner_why,
        "combine": str(plan.combine),
        "combine_why": plan.combine_why,
        "dtype": dtype_of(plan),
        "bytes_a_row": sent(plan),
        "prices": list(plan.prices),
        "layer": {shown.name: _layer(plan, topology, shown.batch) for shown in batches(topology)},
    }


def sent(plan: ExchangePlan) -> int:
    """Bytes of a row on its way to the experts, with ids and weights where they travel too."""
    return plan.payload.bytes if _routed_before(plan) else plan.payload.values


def _routed_before(plan: ExchangePlan) -> bool:
    """Whether rows are routed before they travel: on our paths, and by SGLang's FP4 all-gather."""
    return plan.path.is_ours or plan.payload.rows is Rows.FP4


def _layer(plan: ExchangePlan, topology: Topology, batch: Batch) -> dict[str, Any]:
    return {
        "rows": list(batch.groups),
        "padding": batch.padding,
        "moves": [
            {
                "what": step.what,
                "operation": step.move.operation,
                "group": step.move.kind,
                "dtype": step.dtype,
                "given": step.move.given,
                "exact": step.move.exact,
            }
            for step in steps(plan, topology, batch)
        ],
        "received_a_token": per_token(plan, topology, batch),
    }


def per_token(plan: ExchangePlan, topology: Topology, batch: Batch) -> float | None:
    """Bytes that reach an average rank over links in a layer, for each row of the batch.

    In a ring. None where kernels of SGLang's backends move them, which count nothing.
    """
    if plan.path.movement is Movement.BACKEND:
        return None
    groups = range(topology.dp)
    made = [move for group in groups for move in plan.layer(topology, batch, group)]
    return sum(move.received(topology) for move in made) / topology.dp / max(1, batch.rows)


def pairs(plan: ExchangePlan) -> Iterator[tuple[str, str]]:
    """(what, how it is and why), for a table."""
    yield "path to the experts", f"{plan.path.name}: {plan.why}"
    yield "rows on their way", _sent(plan)
    yield "experts run", f"{plan.runner}: {plan.runner_why}"
    yield "their outputs", f"{plan.combine}: {plan.combine_why}"
    for price in plan.prices:
        yield "note", price
