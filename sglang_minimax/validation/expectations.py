"""What must have happened inside the ranks: stages, zero-token ranks, chunks, mixed batches.

Every function yields sentences about what did not, for one shape. The collectives of a layer are
`ledger`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sglang_minimax.topology import RankShare
from sglang_minimax.validation.observations import Forward, RankRecord, Window
from sglang_minimax.validation.workloads import CHUNK, MIXING_STAGES, Step


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
