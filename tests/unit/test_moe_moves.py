"""The moves of a layer, carried out on labelled rows by ranks that know nothing of the paths.

A row is the set of ranks whose share its number already has. The machine below only knows what a
collective does to such rows and how many bytes a rank hands over; a list of moves is right if it
takes every row complete to the experts and complete back to its group, with the bytes it claims.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest

from sglang_minimax.moe_exchange.moves import (
    COUNT_BYTES,
    Batch,
    Move,
    dispatched_rows,
    moves,
)
from sglang_minimax.moe_exchange.paths import FORCEABLE, SGLANG, Movement, Path, Rows
from sglang_minimax.moe_exchange.payload import Payload
from sglang_minimax.topology import Topology

HIDDEN, ITEM, TOP_K = 256, 2, 4

# (group, number in the group) -> ranks that have added their part.
Held = dict[tuple[int, int], frozenset[int]]


class Wrong(AssertionError):
    """The moves do not do what a layer needs."""


@dataclass
class Ranks:
    """All ranks of a stage between two layers, with what each of them holds."""

    topology: Topology
    batch: Batch
    payload: Payload
    held: list[Held]
    dispatched: bool = False

    @classmethod
    def after_attention(cls, topology: Topology, batch: Batch, payload: Payload) -> Ranks:
        """Every rank has a part of the sum for each row of its group."""
        held = []
        for rank in range(topology.tp):
            group = topology.coordinates(rank).attention_dp_rank
            held.append({(group, n): frozenset({rank}) for n in range(batch.groups[group])})
        return cls(topology, batch, payload, held)

    def run(self, made: Sequence[Move]) -> None:
        """One move of every rank, which must be the same collective on all."""
        kinds = {(move.operation, move.kind, move.site) for move in made}
        if len(kinds) != 1:
            raise Wrong(f"ranks do different things: {kinds}")
        ((operation, kind, site),) = kinds
        width = HIDDEN * ITEM
        if site == "experts" and operation.startswith("all_gather"):
            width = self.payload.bytes
        for members in self.topology.groups(kind):
            before = [self.held[rank] for rank in members]
            if operation == "all_reduce":
                after, given = self._all_reduce(before)
            elif operation.startswith("all_gather"):
                after, given = self._all_gather(before, even="into" in operation)
            else:
                after, given = self._reduce_scatter(before, kind, even="tensor" in operation)
            for rank, rows, gave in zip(members, after, given, strict=True):
                self.held[rank] = rows
                if made[rank].given != gave * width:
                    raise Wrong(f"{operation} gives {gave * width}, not {made[rank].given}")

    def experts(self) -> None:
        """Every rank must have every row complete, and has then a part of each output."""
        everyone = {(g, n) for g, rows in enumerate(self.batch.groups) for n in range(rows)}
        for rank, rows in enumerate(self.held):
            if set(rows) != everyone:
                raise Wrong(f"rank {rank} has {len(rows)} of {len(everyone)} rows")
            for (group, _), parts in rows.items():
                if parts != self._attention_group(group):
                    raise Wrong("an expert reads a sum that is not complete")
        self.held = [
            {row: frozenset({rank}) for row in everyone} for rank in range(self.topology.tp)
        ]
        self.dispatched = True

    def check_end(self) -> None:
        """The next attention has the complete outputs of its group's rows on each of its ranks."""
        for rank, rows in enumerate(self.held):
            group = self.topology.coordinates(rank).attention_dp_rank
            for n in range(self.batch.groups[group]):
                if rows.get((group, n)) != frozenset(range(self.topology.tp)):
                    raise Wrong(f"rank {rank} lacks part of row {n} of its group")

    def _attention_group(self, group: int) -> frozenset[int]:
        size = self.topology.attention_tp
        return frozenset(range(group * size, (group + 1) * size))

    def _all_reduce(self, before: list[Held]) -> tuple[list[Held], list[int]]:
        # Of the whole buffer: rows that a rank does not have are zeros there.
        rows = {row for held in before for row in held}
        sums = {row: _add([held[row] for held in before if row in held]) for row in rows}
        return [dict(sums) for _ in before], [len(rows)] * len(before)

    def _all_gather(self, before: list[Held], *, even: bool) -> tuple[list[Held], list[int]]:
        if even and len({len(held) for held in before}) != 1:
            raise Wrong("an even gather of uneven rows")
        gathered: Held = {}
        for held in before:
            if gathered.keys() & held.keys():
                raise Wrong("a row is gathered twice")
            gathered |= held
        return [dict(gathered) for _ in before], [len(held) for held in before]

    def _reduce_scatter(
        self, before: list[Held], kind: str, *, even: bool
    ) -> tuple[list[Held], list[int]]:
        if any(set(held) != set(before[0]) for held in before):
            raise Wrong("a reduce-scatter of different rows")
        rows = sorted(before[0])
        sums = {row: _add([held[row] for held in before]) for row in rows}
        if kind == "tp":
            size = self.topology.attention_tp
            shares = [rows_ // size for rows_ in self.batch.groups for _ in range(size)]
        else:
            shares = [len(rows) // len(before)] * len(before)
        if sum(shares) != len(rows) or (even and len(set(shares)) != 1):
            raise Wrong("rows do not divide over the ranks")
        left = iter(rows)
        after = [{row: sums[row] for row in itertools.islice(left, n)} for n in shares]
        return after, [len(rows)] * len(before)


def _add(parts: list[frozenset[int]]) -> frozenset[int]:
    total = frozenset[int]().union(*parts)
    if sum(map(len, parts)) != len(total):
        raise Wrong("a part is added twice")
    return total


Moves = Callable[[Topology, Path, Payload, Batch, int], list[Move]]


def simulate(
    topology: Topology, path: Path, payload: Payload, batch: Batch, made: Moves = moves
) -> None:
    """Run a layer; Wrong where the moves do not do it with the bytes that they claim."""
    ranks = Ranks.after_attention(topology, batch, payload)
    by_rank = [
        made(topology, path, payload, batch, topology.coordinates(rank).attention_dp_rank)
        for rank in range(topology.tp)
    ]
    if len({len(each) for each in by_rank}) != 1:
        raise Wrong("ranks make different numbers of moves")
    for step in zip(*by_rank, strict=True):
        over_all = step[0].kind == "tp"
        ranks.run(step)
        if over_all and not ranks.dispatched:
            ranks.experts()
    if topology.tp == 1:
        ranks.experts()
    ranks.check_end()


TOPOLOGIES = [
    Topology(tp=tp, dp=dp, ep=ep)
    for tp in (1, 2, 4, 8, 16)
    for dp in (1, 2, 4, 8, 16)
    for ep in (1, 2, 4, 8, 16)
    if tp % dp == 0 and tp % ep == 0
]
PATHS = [SGLANG, *(Path(Movement.GATHER, rows) for rows in Rows)]


def payload_of(path: Path) -> Payload:
    return Payload(path.rows, HIDDEN, TOP_K, ITEM)


def batches(topology: Topology) -> Iterator[Batch]:
    """As SGLang pads: all groups alike, or to attention-TP alone, with empty groups among them."""
    size = topology.attention_tp
    for rows in (1, 3):
        yield Batch.full(topology, rows * size)
    if topology.dp > 1:
        draw = random.Random(str(topology))
        for _ in range(3):
            groups = tuple(size * draw.randrange(4) for _ in range(topology.dp))
            yield Batch(groups, "SUM_LEN")
        yield Batch((size,) + (0,) * (topology.dp - 1), "SUM_LEN")


CASES = [
    (topology, path, batch)
    for topology in TOPOLOGIES
    for path in PATHS
    for batch in batches(topology)
    if batch.rows
]


def test_every_row_reaches_the_experts_and_its_group_with_the_bytes_that_are_claimed() -> None:
    assert len(CASES) > 500
    for topology, path, batch in CASES:
        simulate(topology, path, payload_of(path), batch)


def test_the_fp4_gather_of_sglang_takes_rows_there_and_back() -> None:
    """One call with all parts of a row, and a reduce-scatter of uneven rows."""
    payload = Payload(Rows.FP4, HIDDEN, TOP_K, ITEM)
    for topology in TOPOLOGIES:
        if topology.dp == topology.tp == topology.ep > 1:
            simulate(topology, SGLANG, payload, Batch.full(topology, 3))
            simulate(topology, SGLANG, payload, Batch((2,) + (1,) * (topology.dp - 1), "SUM_LEN"))


# --- mistakes that the machine must notice ---


def _changed(change: Callable[[list[Move]], list[Move]]) -> Moves:
    return lambda *arguments: change(moves(*arguments))


MISTAKES: dict[str, Moves] = {
    "the gather comes before attention's sum": _changed(
        lambda made: sorted(made, key=lambda move: move.operation != "all_gather_into_tensor")
    ),
    "no sum of the outputs": _changed(
        lambda made: [move for move in made if not _is_combine(move, made)]
    ),
    "outputs are summed twice": _changed(
        lambda made: made + [move for move in made if _is_combine(move, made)]
    ),
    "the sum goes over attention-TP": _changed(
        lambda made: [
            replace(move, kind="attention_tp") if _is_combine(move, made) else move for move in made
        ]
    ),
    "rows do not come back to the group": _changed(
        lambda made: [move for move in made if move.operation != "all_gather_into_tensor"]
    ),
    "an even gather whatever the rows": _changed(
        lambda made: [
            replace(move, operation=move.operation.replace("gatherv", "gather_into_tensor"))
            for move in made
        ]
    ),
    "ids and weights are not counted": lambda topology, path, payload, batch, group: [
        replace(move, given=move.given // payload.bytes * payload.values)
        if move.site == "experts" and move.operation.startswith("all_gather")
        else move
        for move in moves(topology, path, payload, batch, group)
    ],
    "a rank gives the rows of its whole group": lambda topology, path, payload, batch, group: [
        replace(move, given=move.given * topology.attention_tp)
        if move.operation.startswith("all_gather") and move.kind == "tp"
        else move
        for move in moves(topology, path, payload, batch, group)
    ],
    "the first group's rows for all": lambda topology, path, payload, batch, group: moves(
        topology, path, payload, batch, 0
    ),
}


def _is_combine(move: Move, made: list[Move]) -> bool:
    return move.kind == "tp" and move == [each for each in made if each.kind == "tp"][-1]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake: str) -> None:
    def goes_through(topology: Topology, path: Path, batch: Batch) -> bool:
        try:
            simulate(topology, path, payload_of(path), batch, MISTAKES[mistake])
        except Wrong:
            return False
        return True

    assert not all(goes_through(*case) for case in CASES)


# --- bytes over links ---


def over_links(operation: str, parts: Sequence[int]) -> float:
    """Bytes that an average rank receives in a ring of ranks; parts: of the tensor, one a rank.

    In each round every rank passes one part on, which it got in the round before.
    """
    size = len(parts)
    rounds = [[parts[(rank - number) % size] for rank in range(size)] for number in range(size - 1)]
    once = sum(map(sum, rounds)) / size
    return 2 * once if operation == "all_reduce" else once


def test_received_bytes_are_those_of_a_ring() -> None:
    for topology, path, batch in CASES:
        payload = payload_of(path)
        groups = range(topology.dp)
        found = wanted = 0.0
        for group in groups:
            for move in moves(topology, path, payload, batch, group):
                found += move.received(topology)
                members = len(topology.groups(move.kind)[0])
                parts = [int(move.whole) // members] * members
                parts[0] += int(move.whole) % members
                wanted += over_links(move.operation, parts)
        assert found == pytest.approx(wanted)


def test_uneven_parts_change_nothing_on_average() -> None:
    assert over_links("all_gatherv", [7, 0, 1, 0]) == 8 * 3 / 4
    assert over_links("all_reduce", [2, 2, 2, 2]) == 2 * 8 * 3 / 4


def test_by_hand() -> None:
    """DP8 EP8 of the published shape, one token a rank: 8 rows of 6144 B, 3232 of them in FP8."""
    topology, batch = Topology(tp=8, dp=8, ep=8), Batch.full(Topology(tp=8, dp=8, ep=8), 1)

    def received(path: Path, rows: Rows) -> float:
        found = moves(topology, path, Payload(rows, 3072, 8), batch, 0)
        return sum(move.received(topology) for move in found) / batch.rows

    assert received(SGLANG, Rows.PLAIN) == 2 * 6144 * 7 / 8
    assert Payload(Rows.FP8, 3072, 8).bytes == 3072 + 24 * 4 + 64
    assert received(Path(Movement.GATHER, Rows.FP8), Rows.FP8) == (3232 + 6144) * 7 / 8
    assert received(Path(Movement.GATHER), Rows.PLAIN) == (6208 + 6144) * 7 / 8


# --- all-to-all ---


@pytest.mark.parametrize(
    ("ranks", "experts", "top_k"), [(2, 4, 2), (4, 8, 2), (2, 6, 3), (4, 4, 2)]
)
def test_other_ranks_of_a_token_by_counting_all_choices(
    ranks: int, experts: int, top_k: int
) -> None:
    held = experts // ranks
    chosen = list(itertools.combinations(range(experts), top_k))
    # Seen from rank 0; all ranks are alike.
    others = [len({expert // held for expert in choice} - {0}) for choice in chosen]
    mean = Fraction(sum(others), len(others))
    assert dispatched_rows(ranks, experts, top_k) == pytest.approx(float(mean))


@pytest.mark.parametrize("name", ["all-to-all", "all-to-all-fp8"])
def test_an_all_to_all_gives_at_most_a_copy_for_each_expert(name: str) -> None:
    path = FORCEABLE[name]
    for topology in TOPOLOGIES:
        if topology.tp != topology.ep or topology.tp == 1:
            continue
        payload = Payload(path.rows, HIDDEN, TOP_K, ITEM, experts=32)
        batch = Batch.full(topology, 3 * topology.attention_tp)
        made = moves(topology, path, payload, batch, 0)
        counts, there, back = [move for move in made if move.operation == "all_to_all_single"]
        assert counts.given == topology.tp * COUNT_BYTES
        assert there.given == 3 * min(TOP_K, topology.tp) * payload.bytes
        assert back.given == batch.rows * HIDDEN * ITEM
        assert counts.exact
        assert not there.exact
        assert not back.exact
        assert there.whole == pytest.approx(
            3 * dispatched_rows(topology.tp, 32, TOP_K) * payload.bytes
        )
        assert (made[0].operation == "reduce_scatter_tensor") == (topology.attention_tp > 1)
