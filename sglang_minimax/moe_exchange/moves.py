"""The collectives of one layer on each path, and the bytes that they carry. Arithmetic only.

What SGLang 0.5.23 does comes from its srt/layers/layer_boundary (exit.py, ops.py) and
srt/layers/dp_attention.py (_dp_gather, dp_reduce_scatter_tensor). How rows are padded is its
choice for each forward: MAX_LEN pads all attention-DP groups to the longest, SUM_LEN only to a
multiple of attention-TP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sglang_minimax.moe_exchange.paths import Movement, Path, Rows
from sglang_minimax.moe_exchange.payload import CHOICE_BYTES, Payload
from sglang_minimax.shards import exact_div
from sglang_minimax.topology import Topology

# What happens between a rank's own rows and the experts' outputs for them.
Between = Callable[[Topology, Payload, "Batch", int], Iterator["Move"]]

#: Operation -> bytes that a rank of n receives over links for each byte of the whole tensor, in the
#: usual ring: the tensor before a reduce-scatter, after an all-gather.
RECEIVED = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "reduce_scatter_tensor": lambda n: (n - 1) / n,
    "reduce_scatterv": lambda n: (n - 1) / n,
    "all_gather_into_tensor": lambda n: (n - 1) / n,
    "all_gatherv": lambda n: (n - 1) / n,
    "all_to_all_single": lambda n: 1.0,
}
#: Bytes of a count of rows that an all-to-all tells each rank of: int64.
COUNT_BYTES = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one forward.

    groups: of each attention-DP group, as padded. padding: SGLang's mode, None without any.
    """

    groups: tuple[int, ...]
    padding: str | None = None

    @property
    def rows(self) -> int:
        """Of all ranks."""
        return sum(self.groups)

    @property
    def even(self) -> bool:
        """Whether all groups have the same number."""
        return len(set(self.groups)) == 1

    @classmethod
    def full(cls, topology: Topology, rows_a_group: int, padding: str | None = None) -> Batch:
        """Every group has the same number of rows."""
        if padding is None and topology.dp > 1:
            padding = "MAX_LEN"
        return cls((rows_a_group,) * topology.dp, padding)


@dataclass(frozen=True, slots=True)
class Move:
    """One collective of a layer.

    site: where the model asks for it: "experts" (dispatch and combine) or "boundary". operation: of
    SGLang's GroupCoordinator. kind: of the group, one of topology.GROUP_KINDS. given: bytes that
    the rank hands over, at most where it is not `exact`. whole: bytes of the tensor before a
    reduction or after a gather; of an all-to-all, what reaches a rank where experts are chosen
    evenly.
    """

    site: str
    operation: str
    kind: str
    given: int
    whole: float
    exact: bool = True

    def received(self, topology: Topology) -> float:
        """Bytes that reach this rank over links, in a ring."""
        size = len(topology.groups(self.kind)[0])
        return RECEIVED[self.operation](size) * self.whole


def moves(topology: Topology, path: Path, payload: Payload, batch: Batch, group: int) -> list[Move]:
    """The collectives of one layer on a rank of attention-DP group `group`, in order.

    payload: what travels to the experts on this path. The sums of the QK norm are not among them,
    nor what the kernels of SGLang's own backends move between attention and the experts.
    """
    made = _sglang(topology, payload, batch, group)
    if path.movement is not Movement.SGLANG:
        between = {Movement.GATHER: _gather, Movement.ALL_TO_ALL: _all_to_all}.get(path.movement)
        made = _on_own_rows(topology, payload, batch, group, between)
    sizes = {kind: len(topology.groups(kind)[0]) for kind in ("tp", "attention_tp")}
    return [move for move in made if sizes[move.kind] > 1]


def _sglang(topology: Topology, payload: Payload, batch: Batch, group: int) -> Iterator[Move]:
    if payload.rows is Rows.FP4:
        yield from _on_own_rows(topology, payload, batch, group, _gather_of_sglang)
        return
    row = payload.hidden * payload.item_bytes
    mine, everyone = batch.groups[group] * row, batch.rows * row
    if topology.dp == 1:
        # The sum of attention's outputs, then that of the experts'.
        yield Move("boundary", "all_reduce", "tp", mine, mine)
        yield Move("boundary", "all_reduce", "tp", mine, mine)
        return
    share = exact_div(batch.groups[group], topology.attention_tp, "rows over attention-TP") * row
    padded = batch.padding == "MAX_LEN"
    if padded:
        yield Move("boundary", "reduce_scatter_tensor", "attention_tp", mine, mine)
        yield Move("boundary", "all_gather_into_tensor", "tp", share, everyone)
    else:
        yield Move("boundary", "all_reduce", "tp", everyone, everyone)
    if topology.tp == topology.dp == topology.ep:
        yield Move("boundary", "reduce_scatterv", "tp", everyone, everyone)
    elif padded:
        yield Move("boundary", "reduce_scatter_tensor", "tp", everyone, everyone)
        yield Move("boundary", "all_gather_into_tensor", "attention_tp", share, mine)
    else:
        yield Move("boundary", "all_reduce", "tp", everyone, everyone)


def _on_own_rows(
    topology: Topology, payload: Payload, batch: Batch, group: int, between: Between | None
) -> Iterator[Move]:
    """Where a rank brings its own rows to the experts: its attention-TP share of the group's."""
    row = payload.hidden * payload.item_bytes
    mine = batch.groups[group] * row
    rows = exact_div(batch.groups[group], topology.attention_tp, "rows over attention-TP")
    # Attention's outputs are summed onto each rank's share of the rows, where the residual is too.
    yield Move("boundary", "reduce_scatter_tensor", "attention_tp", mine, mine)
    if between is not None:
        yield from between(topology, payload, batch, rows)
    # The next attention wants the rows of its group again.
    yield Move("boundary", "all_gather_into_tensor", "attention_tp", rows * row, mine)


def _gather(topology: Topology, payload: Payload, batch: Batch, rows: int) -> Iterator[Move]:
    gather = "all_gather_into_tensor" if batch.even else "all_gatherv"
    yield Move("experts", gather, "tp", rows * payload.bytes, batch.rows * payload.bytes)
    scatter = "reduce_scatter_tensor" if batch.even else "reduce_scatterv"
    everyone = batch.rows * payload.hidden * payload.item_bytes
    yield Move("experts", scatter, "tp", everyone, everyone)


def _gather_of_sglang(
    topology: Topology, payload: Payload, batch: Batch, rows: int
) -> Iterator[Move]:
    """Its FP4 all-gather: all parts in one call (token_dispatcher/standard.py)."""
    parts = payload.values + payload.scales + payload.top_k * CHOICE_BYTES
    yield Move("experts", "all_gatherv", "tp", rows * parts, batch.rows * parts)
    everyone = batch.rows * payload.hidden * payload.item_bytes
    yield Move("experts", "reduce_scatterv", "tp", everyone, everyone)


def _all_to_all(topology: Topology, payload: Payload, batch: Batch, rows: int) -> Iterator[Move]:
    row = payload.hidden * payload.item_bytes
    copies = rows * min(topology.tp, payload.top_k)
    others = rows * dispatched_rows(topology.tp, payload.experts, payload.top_k)
    counts = topology.tp * COUNT_BYTES
    yield Move("experts", "all_to_all_single", "tp", counts, counts - COUNT_BYTES)
    yield Move(
        "experts", "all_to_all_single", "tp", copies * payload.bytes, others * payload.bytes, False
    )
    # All rows of all ranks may have come here.
    yield Move("experts", "all_to_all_single", "tp", batch.rows * row, others * row, False)


def dispatched_rows(ranks: int, experts: int, top_k: int) -> float:
    """Other ranks that a token goes to on average, when experts are chosen evenly.

    A token goes once to each rank that holds at least one of its experts, as DeepEP does it: ranks
    minus one, times the chance that `top_k` of `experts` touch a given rank's share.
    """
    share = exact_div(experts, ranks, "experts over ranks")
    missed = 1.0
    for chosen in range(top_k):
        missed *= (experts - share - chosen) / (experts - chosen)
    return (ranks - 1) * (1 - missed)
