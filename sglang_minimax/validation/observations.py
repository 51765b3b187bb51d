"""What the probe saw inside the ranks, read back and set against what `topology` says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_minimax.topology import RankShare


@dataclass(frozen=True, slots=True)
class Collective:
    """Calls of one operation on one group from one place of the model, in one forward.

    site: "qk_norm", "experts", "boundary" (between the parts of a layer), "model" (embedding, last
    norm, head) or "scheduler". bytes: of the tensors that this rank gave.
    """

    site: str
    operation: str
    ranks: tuple[int, ...]
    calls: int
    bytes: int

    @property
    def in_a_layer(self) -> bool:
        return self.site in ("qk_norm", "experts", "boundary")


@dataclass(frozen=True, slots=True)
class Forward:
    """One pass through this rank's layers.

    tokens: of this rank's own requests; rows: what was computed, with padding. mode: SGLang's
    forward mode; padding: its DP padding mode, None without attention DP; groups: the rows of each
    attention-DP group, as padded; captured: the layers whose input was kept, one past the last for
    its output. mixed: decoding requests
    that share a prefill. sizes: row counts that went into collectives of variable size. between:
    collectives since the forward before.
    """

    began: float
    mode: str
    tokens: int
    rows: int
    groups: tuple[int, ...]
    captured: tuple[int, ...]
    padding: str | None
    mixed: int
    sizes: tuple[tuple[int, ...], ...]
    collectives: tuple[Collective, ...]
    between: tuple[Collective, ...] = ()

    def calls(self, operation: str) -> int:
        """Calls of an operation inside layers."""
        return sum(c.calls for c in self.collectives if c.operation == operation and c.in_a_layer)


@dataclass(frozen=True, slots=True)
class Window:
    """The time in which a step's requests were under way, on the machine's monotonic clock."""

    step: str
    began: float
    ended: float

    def of(self, forwards: Sequence[Forward]) -> list[Forward]:
        """The forwards that began in it."""
        return [each for each in forwards if self.began <= each.began <= self.ended]


@dataclass(frozen=True, slots=True)
class RankRecord:
    """Everything one rank wrote. path: to the experts, as this rank worked it out."""

    rank: int
    groups: dict[str, tuple[int, ...]]
    layers: range
    kv_layers: int
    weights: dict[str, Any]
    path: str
    forwards: tuple[Forward, ...]


def read(folder: Path) -> list[RankRecord]:
    """The records of all ranks that wrote any, by rank."""
    found = [_record(path) for path in folder.glob("rank-*.jsonl")]
    return sorted((record for record in found if record), key=lambda record: record.rank)


def _record(path: Path) -> RankRecord | None:
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # cut off where the rank was killed
            break
    about = next((line for line in lines if "rank" in line), None)
    if about is None:
        return None
    return RankRecord(
        rank=about["rank"],
        groups={kind: tuple(ranks) for kind, ranks in about["groups"].items()},
        layers=range(*about["layers"]),
        kv_layers=about["kv_layers"],
        weights=about["weights"],
        path=about["path"],
        forwards=tuple(_forward(line) for line in lines if "mode" in line),
    )


def _forward(line: dict[str, Any]) -> Forward:
    return Forward(
        began=line["began"],
        mode=line["mode"],
        tokens=line["tokens"],
        rows=line["rows"],
        groups=tuple(line["groups"]),
        captured=tuple(line["captured"]),
        padding=line["padding"],
        mixed=line["mixed"],
        sizes=tuple(tuple(sizes) for sizes in line["sizes"]),
        collectives=_collectives(line["collectives"]),
        between=_collectives(line["outside"]),
    )


def _collectives(lines: list[list[Any]]) -> tuple[Collective, ...]:
    return tuple(
        Collective(site, operation, tuple(ranks), calls, size)
        for site, operation, ranks, calls, size in lines
    )


def misplaced(records: Sequence[RankRecord], shares: Sequence[RankShare]) -> Iterator[str]:
    """Sentences for ranks that are missing, in other groups, with other layers or other weights."""
    seen = {record.rank: record for record in records}
    for share in shares:
        record = seen.get(share.rank)
        if record is None:
            yield f"rank {share.rank} reported nothing"
            continue
        for kind, ranks in record.groups.items():
            if ranks != share.groups[kind]:
                yield (
                    f"rank {share.rank}: its {kind} group is {list(ranks)}, but the topology says "
                    f"{list(share.groups[kind])}"
                )
        if record.layers != share.layers or record.kv_layers != len(share.layers):
            yield (
                f"rank {share.rank} has layers {_span(record.layers)} and KV cache for "
                f"{record.kv_layers}, but its stage is {_span(share.layers)}"
            )
        yield from record.weights["wrong"]


def _span(layers: range) -> str:
    return f"{layers.start} to {layers.stop - 1}"
