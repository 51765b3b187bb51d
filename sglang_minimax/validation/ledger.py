"""The collectives that ran inside the ranks, against those of the exchange plan: calls and bytes.

The plan's are `moe_exchange.moves`, for the rows that SGLang padded in each forward. The QK norm
adds one all-reduce over the attention-TP group, where the rank has tokens. Where a rank holds its
own rows between layers, what is captured there for a draft model is gathered once more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sglang_minimax.moe_exchange.moves import Batch, Move, moves
from sglang_minimax.moe_exchange.paths import Movement, Path
from sglang_minimax.moe_exchange.payload import Payload
from sglang_minimax.topology import RankShare, Topology
from sglang_minimax.validation.observations import Forward

#: (site, operation, ranks of the group)
Key = tuple[str, str, tuple[int, ...]]
Calls = Counter[Key]


@dataclass(frozen=True, slots=True)
class Exchange:
    """How a server moves rows: its topology, the path to the experts, what travels on it."""

    topology: Topology
    path: Path
    payload: Payload

    def moves(self, share: RankShare, forward: Forward) -> list[Move]:
        """The collectives of one layer of this forward on a rank, without the QK norm's."""
        batch = Batch(forward.groups, forward.padding)
        return moves(self.topology, self.path, self.payload, batch, share.attention_dp_rank)

    def all_moves(self, share: RankShare, forward: Forward) -> list[Move]:
        """Those of all layers of the rank's stage."""
        found = self.moves(share, forward) * len(share.layers)
        if self.path.movement is Movement.SGLANG:
            return found
        # What comes in at the first layer, or goes out of the last, is on the rows of attention.
        between = [i for i in forward.captured if share.layers.start < i < share.layers.stop]
        again = [move for move in self.moves(share, forward) if move.kind == "attention_tp"][1:]
        return found + again * len(between)


def calls_of_layers(exchange: Exchange, share: RankShare, forward: Forward) -> Calls:
    """What the layers of the rank's stage should ask of the groups in this forward."""
    found: Calls = Counter(
        (move.site, move.operation, share.groups[move.kind])
        for move in exchange.all_moves(share, forward)
    )
    attention = share.groups["attention_tp"]
    if len(attention) > 1 and forward.mode != "IDLE":
        found["qk_norm", "all_reduce", attention] += len(share.layers)
    return found


def collectives(
    exchange: Exchange, share: RankShare, forwards: Sequence[Forward], *, dp_lm_head: bool
) -> Iterator[str]:
    """Sentences for collectives other than the plan's, at most one of a kind."""
    told: set[str] = set()
    for forward in forwards:
        kind = f"{forward.mode} {forward.padding}"
        sentence = _calls(exchange, share, forward) or _bytes(exchange, share, forward)
        if sentence and kind not in told:
            told.add(kind)
            yield (
                f"rank {share.rank}, {forward.mode.lower()} of {forward.tokens} tokens"
                f"{_padded(forward)}: {sentence}in {len(share.layers)} layers"
            )
        yield from _head(share, forward, told, dp_lm_head=dp_lm_head)


def _calls(exchange: Exchange, share: RankShare, forward: Forward) -> str:
    wanted = calls_of_layers(exchange, share, forward)
    found: Calls = Counter()
    for each in forward.collectives:
        if each.in_a_layer:
            found[each.site, each.operation, each.ranks] += each.calls
    return f"{_list(found - wanted, 'too many')}{_list(wanted - found, 'missing')}"


def _bytes(exchange: Exchange, share: RankShare, forward: Forward) -> str:
    """The bytes that this rank gave; of an all-to-all's rows, at most those that it could."""
    wanted: Calls = Counter()
    bounds = set()
    for move in exchange.all_moves(share, forward):
        key = (move.site, move.operation, share.groups[move.kind])
        wanted[key] += move.given
        if not move.exact:
            bounds.add(key)
    found: Calls = Counter()
    for each in forward.collectives:
        found[each.site, each.operation, each.ranks] += each.bytes
    for key, most in wanted.items():
        if found[key] > most or (found[key] < most and key not in bounds):
            site, operation, ranks = key
            return f"{found[key]} bytes to {operation} at {site} over {list(ranks)}, not {most} "
    return ""


def astray(exchange: Exchange, share: RankShare, forwards: Sequence[Forward]) -> Iterator[str]:
    """Sentences for collectives that no layer should use; for an engine that ended in a forward."""
    told: set[Key] = set()
    for forward in forwards:
        known = calls_of_layers(exchange, share, forward)
        for each in forward.collectives:
            key = (each.site, each.operation, each.ranks)
            if each.in_a_layer and key not in known and key not in told:
                told.add(key)
                yield (
                    f"rank {share.rank} used {each.operation} at {each.site} over ranks "
                    f"{list(each.ranks)}, which this topology does not ask for"
                )


def _head(share: RankShare, forward: Forward, told: set[str], *, dp_lm_head: bool) -> Iterator[str]:
    """Outside layers: embedding and head work in the TP or attention-TP group."""
    allowed = {share.groups["attention_tp"]}
    if not dp_lm_head:
        allowed.add(share.groups["tp"])
    for each in forward.collectives:
        if each.site == "model" and each.ranks not in allowed and "head" not in told:
            told.add("head")
            yield (
                f"rank {share.rank}: embedding or head used {each.operation} over ranks "
                f"{list(each.ranks)}, outside of {sorted(map(list, allowed))}"
            )


def _padded(forward: Forward) -> str:
    return f" ({forward.padding}, {forward.rows} rows)" if forward.padding else ""


def _list(calls: Calls, what: str) -> str:
    if not calls:
        return ""
    named = [
        f"{number} {operation} at {site} over {list(ranks)}"
        for (site, operation, ranks), number in calls.items()
    ]
    return f"{what}: {', '.join(named)} "
