"""What must have happened inside the ranks: collectives, zero-token ranks, chunks, mixed batches.

Every function yields sentences about what did not, for one shape. The groups come from
`topology.rank_share`, the operations from how SGLang 0.5.23 moves rows between ranks on gloo:

  without attention DP, a layer on more than one rank: two all-reduces over the TP group
  with it, rows gathered by ... and brought back by ...
    SUM_LEN padding: an all-reduce of zero-filled rows      the same, or reduce_scatterv
    MAX_LEN padding: (reduce-scatter over attention-TP and) (reduce-scatter over TP and all-gather
                     all-gather over TP                     over attention-TP), or reduce_scatterv
  reduce_scatterv takes the way back where TP = DP = EP
  the QK norm: one all-reduce over the attention-TP group, where the rank has tokens
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from sglang_minimax.topology import RankShare, Topology
from sglang_minimax.validation.observations import Forward, RankRecord, Window
from sglang_minimax.validation.workloads import CHUNK, MIXING_STAGES, Step

#: (site, operation, ranks of the group) -> calls
Calls = Counter[tuple[str, str, tuple[int, ...]]]


def calls_in_a_layer(topology: Topology, share: RankShare, forward: Forward) -> Calls:
    """What one layer should ask of the groups in this forward."""
    found: Calls = Counter()
    tp, attention = share.groups["tp"], share.groups["attention_tp"]
    if len(attention) > 1 and forward.mode != "IDLE":
        found["qk_norm", "all_reduce", attention] += 1
    if len(tp) == 1:
        return found

    def boundary(operation: str, group: tuple[int, ...]) -> None:
        if len(group) > 1:
            found["boundary", operation, group] += 1

    padded = forward.padding == "MAX_LEN"
    if topology.dp == 1:
        boundary("all_reduce", tp)
        boundary("all_reduce", tp)
        return found
    if padded:
        boundary("reduce_scatter_tensor", attention)
        boundary("all_gather_into_tensor", tp)
    else:
        boundary("all_reduce", tp)
    if topology.tp == topology.dp == topology.ep:
        boundary("reduce_scatterv", tp)
    elif padded:
        boundary("reduce_scatter_tensor", tp)
        boundary("all_gather_into_tensor", attention)
    else:
        boundary("all_reduce", tp)
    return found


def collectives(
    topology: Topology, share: RankShare, forwards: Sequence[Forward], *, dp_lm_head: bool
) -> Iterator[str]:
    """Sentences for collectives other than the topology asks for, at most one of a kind."""
    told: set[str] = set()
    for forward in forwards:
        expected = calls_in_a_layer(topology, share, forward)
        found: Calls = Counter()
        for each in forward.collectives:
            if each.in_a_layer:
                found[each.site, each.operation, each.ranks] += each.calls
        wanted = Counter({key: calls * len(share.layers) for key, calls in expected.items()})
        if found != wanted:
            kind = f"{forward.mode} {forward.padding}"
            if kind not in told:
                yield (
                    f"rank {share.rank}, {forward.mode.lower()} of {forward.tokens} tokens"
                    f"{_padded(forward)}: {_list(found - wanted, 'too many')}"
                    f"{_list(wanted - found, 'missing')}in {len(share.layers)} layers"
                )
            told.add(kind)
        yield from _head(share, forward, told, dp_lm_head=dp_lm_head)


def astray(topology: Topology, share: RankShare, forwards: Sequence[Forward]) -> Iterator[str]:
    """Sentences for collectives that no layer should use; for an engine that ended in a forward."""
    told: set[tuple[str, str, tuple[int, ...]]] = set()
    for forward in forwards:
        known = calls_in_a_layer(topology, share, forward)
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


def stages(share: RankShare, forwards: Sequence[Forward]) -> Iterator[str]:
    """What a pipeline stage sends and receives goes through the rank's own PP group, both ways."""
    if len(share.groups["pp"]) == 1:
        return
    for operation in ("send_tensor_dict", "recv_tensor_dict"):
        used = {
            each.ranks
            for forward in forwards
            for each in forward.between
            if each.operation == operation
        }
        if used != {share.groups["pp"]}:
            yield (
                f"rank {share.rank} used {operation} over {sorted(map(list, used))}, not over its "
                f"PP group {list(share.groups['pp'])} alone"
            )


def combine(operation: str, records: Sequence[RankRecord]) -> Iterator[str]:
    """The named reduce-scatter must have brought back the experts' sums, on every rank."""
    for record in records:
        decodes = [each for each in record.forwards if each.mode in ("DECODE", "IDLE")]
        used = [each for each in decodes if each.calls(operation)]
        if not used:
            yield f"rank {record.rank} never used {operation} in {len(decodes)} decode steps"
        elif operation == "reduce_scatterv":
            sizes = {sizes for each in record.forwards for sizes in each.sizes}
            if not any(len(set(each)) > 1 for each in sizes):
                yield f"rank {record.rank} used {operation} with equal sizes only"
        elif not any(each.padding == "MAX_LEN" and each.rows > each.tokens for each in used):
            yield f"rank {record.rank} used {operation}, but never with padded rows"


def zero_tokens(
    shares: Sequence[RankShare],
    records: Sequence[RankRecord],
    steps: Sequence[tuple[Step, Window]],
) -> Iterator[str]:
    """In each step, ranks of groups without requests have no tokens, and all others have some."""
    by_rank = {record.rank: record for record in records}
    for step, window in steps:
        busy = {request.group for request in step.requests}
        for share in shares:
            if share.rank not in by_rank:
                continue
            forwards = window.of(by_rank[share.rank].forwards)
            tokens = sum(forward.tokens for forward in forwards)
            if not forwards:
                yield f"rank {share.rank} ran nothing in step {step.name!r}"
            elif share.attention_dp_rank in busy and not tokens:
                yield f"rank {share.rank} got no tokens in step {step.name!r}"
            elif share.attention_dp_rank not in busy and tokens:
                yield (
                    f"rank {share.rank} got {tokens} tokens in step {step.name!r}, whose requests "
                    f"went to attention-DP group {', '.join(map(str, sorted(busy)))}"
                )


def idle_ranks(
    records: Sequence[RankRecord], steps: Sequence[tuple[Step, Window]]
) -> dict[str, list[int]]:
    """step -> ranks that took part in it without a single token."""
    return {
        step.name: [
            record.rank
            for record in records
            if not any(forward.tokens for forward in window.of(record.forwards))
        ]
        for step, window in steps
    }


def chunks(
    shares: Sequence[RankShare],
    records: Sequence[RankRecord],
    steps: Sequence[tuple[Step, Window]],
) -> Iterator[str]:
    """The lone prompts came in chunks, and the mixed step mixed."""
    groups = {share.rank: share.attention_dp_rank for share in shares}
    mixes = len({share.pp_rank for share in shares}) <= MIXING_STAGES
    for step, window in steps:
        for record in records:
            if groups[record.rank] != step.requests[0].group:
                continue
            prefills = [each for each in window.of(record.forwards) if each.mode == "EXTEND"]
            if len(step.requests) == 1:
                length = len(step.requests[0].prompt)
                wanted = [min(CHUNK, length - at) for at in range(0, length, CHUNK)]
                sizes = [each.tokens for each in prefills]
                if sizes != wanted:
                    yield f"rank {record.rank}: {step.name!r} was cut into {sizes}, not {wanted}"
            elif step.name == "mixed" and mixes and not any(each.mixed for each in prefills):
                yield f"rank {record.rank}: no prefill was mixed with decode steps"


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
