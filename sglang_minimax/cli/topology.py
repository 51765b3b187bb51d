"""`sglang-minimax topology`: which rank owns what, and how tokens reach their experts.

As tables or as JSON, for a launch that is only asked about. No torch, no SGLang.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from sglang_minimax import support
from sglang_minimax.cli import tables
from sglang_minimax.config import Architecture
from sglang_minimax.errors import ConfigError
from sglang_minimax.moe_exchange import report as exchange
from sglang_minimax.moe_exchange.plan import ExchangePlan, default_of_sglang, plan_for
from sglang_minimax.moe_exchange.rules import CPU, resolved
from sglang_minimax.platforms.cpu import support as cpu_support
from sglang_minimax.topology import (
    GROUP_KINDS,
    AttentionShard,
    RankShare,
    Topology,
    exact_div,
    parameter_count,
    rank_shares,
    vocabulary_rows_in_memory,
)

#: Characters of a line, where words or columns can be put on another one.
WIDTH = 100
# What the published checkpoints say beyond the architecture's own values.
PUBLISHED: Mapping[str, Any] = {
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
BF16_BYTES = 2


def topology(
    config: Path | None,
    launch: support.Launch,
    *,
    dp_lm_head: bool = False,
    as_json: bool = False,
) -> int:
    """Print the shares of all ranks and the plan; 1 with sentences on stderr where it is refused.

    config: a config.json or a checkpoint folder, None for the published shape. launch: as it was
    asked for; a quantisation that it does not name is the checkpoint's. Raises ConfigError.
    """
    arch = architecture(config)
    launch = replace(resolved(launch), quantization=launch.quantization or arch.recipe.method)
    obstacles = support.refusals(arch, launch)
    if not obstacles and launch.hardware == CPU:
        obstacles = list(cpu_support.refusals(arch, launch))
    if obstacles:
        for obstacle in obstacles:
            typer.echo(f"sglang-minimax: {obstacle}", err=True)
        return 1
    report = Report(arch, launch, dp_lm_head)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        report.show()
    return 0


def architecture(config: Path | None) -> Architecture:
    """Read a config.json, alone or in a checkpoint folder; ConfigError in one sentence."""
    if config is None:
        return Architecture.from_config(PUBLISHED)
    file = config / "config.json" if config.is_dir() else config
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror}); "
            "give --config a config.json or a checkpoint folder."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}); give --config a config.json.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is not a JSON object; give --config a config.json.")
    return Architecture.from_config(content)


class Report:
    """The shares of all ranks of one legal shape, and what they have in common."""

    def __init__(self, arch: Architecture, launch: support.Launch, dp_lm_head: bool) -> None:
        self.arch = arch
        self.redundant = launch.ep_redundant
        self.dp_lm_head = dp_lm_head
        self.topology = Topology(launch.tp, launch.dp, launch.ep, launch.pp, launch.nodes)
        self.plan = plan_for(arch, launch)
        self.sglangs = default_of_sglang(arch, launch)
        self.notes = support.notes(arch, launch)
        self.shares = rank_shares(
            arch, self.topology, dp_lm_head=dp_lm_head, redundant_experts=self.redundant
        )

    # --- JSON ---

    def as_dict(self) -> dict[str, Any]:
        """Ranges as [first, one past the last], groups as lists of global ranks."""
        first = self.shares[0].attention
        return {
            "topology": {
                **{name: getattr(self.topology, name) for name in ("tp", "dp", "ep", "pp")},
                "nodes": self.topology.nodes,
                "world_size": self.topology.world_size,
                "attention_tp": self.topology.attention_tp,
                "moe_tp": self.topology.moe_tp,
                "redundant_experts": self.redundant,
                "dp_lm_head": self.dp_lm_head,
            },
            "kv_replicas": first.kv_replicas,
            "variance_divisors": {"q": first.q_divisor, "k": first.k_divisor},
            "vocabulary_rows_in_memory": self._vocabulary_in_memory(),
            "groups": {kind: self.topology.groups(kind) for kind in GROUP_KINDS},
            "exchange": {
                **exchange.as_dict(self.plan, self.topology),
                "sglang": exchange.as_dict(self.sglangs, self.topology),
            },
            "notes": self.notes,
            "ranks": [self._rank_as_dict(share) for share in self.shares],
        }

    def _vocabulary_in_memory(self) -> dict[str, int]:
        """Rows of each table that a rank allocates, padding included."""
        topology, vocabulary = self.topology, self.arch.vocab_size
        head = topology.attention_tp if self.dp_lm_head else topology.tp
        return {
            "embedding": vocabulary_rows_in_memory(vocabulary, topology.attention_tp),
            "head": vocabulary_rows_in_memory(vocabulary, head),
        }

    def _rank_as_dict(self, share: RankShare) -> dict[str, Any]:
        return {
            **{name: getattr(share, name) for name in PLACES},
            "q_heads": _pair(share.attention.q_head_ids),
            "kv_heads": _pair(share.attention.kv_head_ids),
            "q_rows": _pair(share.attention.q_rows),
            "kv_rows": _pair(share.attention.kv_rows),
            "layers": _pair(share.layers),
            "experts": _pair(share.experts),
            "expert_rows": _pair(share.expert_rows),
            "embedding_rows": _pair(share.embedding_rows),
            "head_rows": _pair(share.head_rows),
            "weights": parameter_count(self.arch, share),
            "kv_cache_elements_per_token": share.kv_elements,
        }

    # --- tables ---

    def show(self) -> None:
        """Print the sizes, what all ranks have in common, the groups, the plan, one row a rank."""
        columns = {title: [cell(self, share) for share in self.shares] for title, cell in COLUMNS}
        same = {title: cells[0] for title, cells in columns.items() if len(set(cells)) == 1}
        common = ", ".join(f"{title} {cell}" for title, cell in same.items())
        _show_pairs([*self.summary(), *([("on every rank", common)] if common else [])])
        tables.show(
            tables.table("groups of", "number", "size", "global ranks", rows=self._groups())
        )
        differing = {title: cells for title, cells in columns.items() if title not in same}
        ranks = [str(share.rank) for share in self.shares]
        for part in _parts(differing):
            tables.show(tables.table("rank", *part, rows=zip(ranks, *part.values(), strict=True)))
        self._show_plan()

    def _show_plan(self) -> None:
        """The exchange, and the collectives of a layer beside those of SGLang's default."""
        _show_pairs([*exchange.pairs(self.plan), *(("note", note) for note in self.notes)])
        plans = {plan.path.name: plan for plan in (self.plan, self.sglangs)}
        moves = {name: list(self._moves(plan)) for name, plan in plans.items()}
        if not any(moves.values()):
            return
        received = [row for plan in plans.values() for row in self._received(plan)]
        tables.show(tables.table(*RECEIVED, rows=received, right=RECEIVED[-1:]))
        for name, rows in moves.items():
            if rows:
                tables.show(tables.table(name, *MOVES, rows=rows, right=("B given",)))

    def _moves(self, plan: ExchangePlan) -> Iterator[tuple[str, ...]]:
        for name, batch in exchange.batches(self.topology):
            for step in exchange.steps(plan, self.topology, batch):
                group, given = GROUP_TITLES[step.move.kind], f"{step.move.given:,}"
                most = "" if step.move.exact else "<= "
                yield name, step.move.operation, group, most + given, step.dtype, step.what

    def _received(self, plan: ExchangePlan) -> Iterator[tuple[str, ...]]:
        for name, batch in exchange.batches(self.topology):
            rows = "+".join(map(str, batch.groups[:GROUPS_SHOWN]))
            more = "+..." if len(batch.groups) > GROUPS_SHOWN else ""
            each = exchange.per_token(plan, self.topology, batch)
            received = "not counted" if each is None else f"{each:,.0f}"
            yield plan.path.name, name, rows + more, received

    def summary(self) -> list[tuple[str, str]]:
        """(what, how much) of the whole topology."""
        topology, arch, one = self.topology, self.arch, self.shares[0]
        attention, cache = one.attention, [share.kv_elements for share in self.shares]
        weights = [parameter_count(arch, share) for share in self.shares]
        over = "sum" if attention.size == 1 else f"sum over {attention.size} ranks"
        a_node = exact_div(topology.world_size, topology.nodes, "ranks over nodes")
        return [
            (
                "ranks",
                f"{topology.world_size} = TP {topology.tp} x PP {topology.pp}; "
                f"{topology.nodes} {'node' if topology.nodes == 1 else 'nodes'} of {a_node}",
            ),
            (
                "attention",
                f"attention-TP {topology.attention_tp} = TP {topology.tp} / DP {topology.dp}; "
                f"each KV head on {attention.kv_replicas} of these ranks",
            ),
            ("mean of q squares", f"{over} / {_divisor(attention, 'q')}"),
            ("mean of k squares", f"{over} / {_divisor(attention, 'k')}"),
            (
                "experts",
                f"MoE-TP {topology.moe_tp} = TP {topology.tp} / EP {topology.ep}; a rank holds "
                f"{len(one.experts)} of {arch.num_experts + self.redundant} experts, "
                f"{len(one.expert_rows)} of {arch.expert_width} rows of each",
            ),
            ("weights a rank", f"{_span(weights)} of {parameter_count(arch, self._whole()):,}"),
            (
                "KV cache a token",
                f"{_span([BF16_BYTES * each for each in cache])} B a rank in BF16",
            ),
        ]

    def _whole(self) -> RankShare:
        return rank_shares(self.arch, Topology())[0]

    def _groups(self) -> Iterator[tuple[str, ...]]:
        for kind in GROUP_KINDS:
            groups = self.topology.groups(kind)
            shown = ", ".join(_members(group) for group in groups[:GROUPS_SHOWN])
            more = ", ..." if len(groups) > GROUPS_SHOWN else ""
            yield GROUP_TITLES[kind], str(len(groups)), str(len(groups[0])), shown + more


def _show_pairs(rows: Iterable[tuple[str, str]]) -> None:
    """(what, how much), sentences over as many lines as they need."""
    said = list(rows)
    width = WIDTH - 2 - max(len(what) for what, _ in said)
    tables.show(
        tables.pairs(
            (what, textwrap.fill(much, width, break_long_words=False)) for what, much in said
        )
    )


def _parts(columns: Mapping[str, list[str]]) -> Iterator[dict[str, list[str]]]:
    """Columns in order, as many together as a line has room for beside the rank."""
    part: dict[str, list[str]] = {}
    room = WIDTH
    for title, cells in columns.items():
        width = 2 + max(map(len, (title, *cells)))
        if part and width > room:
            yield part
            part, room = {}, WIDTH
        if not part:
            room -= 2 + len("rank")
        part[title] = cells
        room -= width
    if part:
        yield part


def _divisor(attention: AttentionShard, which: str) -> str:
    """The divisor of a variance with the numbers that it is made of."""
    if which == "q":
        return f"{attention.q_divisor} ({attention.total_q_heads} heads x {attention.head_dim})"
    copies = f"{attention.kv_replicas} replica{'s' if attention.kv_replicas > 1 else ''}"
    heads = f"{attention.total_kv_heads} heads x {attention.head_dim}"
    return f"{attention.k_divisor} ({copies} x {heads})"


def _span(values: Sequence[int]) -> str:
    """What every rank has, or the least and the most."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _pair(part: range | None) -> tuple[int, int] | None:
    return None if part is None else (part.start, part.stop)


def _ends(part: range | None) -> str:
    """First and last, both included; "-" for nothing."""
    if not part:
        return "-"
    return str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}"


def _members(group: Sequence[int]) -> str:
    if len(group) < 3:
        return "+".join(map(str, group))
    step = group[1] - group[0]
    return f"{group[0]}-{group[-1]}" + (f" by {step}" if step > 1 else "")


PLACES = (
    "rank",
    "node",
    "pp_rank",
    "tp_rank",
    "attention_dp_rank",
    "attention_tp_rank",
    "moe_ep_rank",
    "moe_tp_rank",
)
GROUPS_SHOWN = 4
MOVES = ("collective of a layer", "group", "B given", "type", "what")
RECEIVED = ("path", "forward", "rows of the groups", "B that reach a rank a token a layer")
GROUP_TITLES = {
    "tp": "TP",
    "attention_tp": "attention-TP",
    "attention_dp": "attention-DP",
    "moe_ep": "MoE-EP",
    "moe_tp": "MoE-TP",
    "pp": "PP",
    "node": "node",
}

# Title -> the cell of one rank. Ranges include both ends, as people count.
COLUMNS: tuple[tuple[str, Callable[[Report, RankShare], str]], ...] = (
    ("node", lambda _, share: str(share.node)),
    ("stage", lambda _, share: str(share.pp_rank)),
    ("layers", lambda _, share: _ends(share.layers)),
    ("att.DP", lambda _, share: str(share.attention_dp_rank)),
    ("att.TP", lambda _, share: str(share.attention_tp_rank)),
    ("q heads", lambda _, share: _ends(share.attention.q_head_ids)),
    ("q norm rows", lambda _, share: _ends(share.attention.q_rows)),
    ("KV heads", lambda _, share: _ends(share.attention.kv_head_ids)),
    ("k norm rows", lambda _, share: _ends(share.attention.kv_rows)),
    ("EP", lambda _, share: str(share.moe_ep_rank)),
    ("experts", lambda _, share: _ends(share.experts)),
    ("MoE-TP", lambda _, share: str(share.moe_tp_rank)),
    ("expert rows", lambda _, share: _ends(share.expert_rows)),
    ("embedding rows", lambda _, share: _ends(share.embedding_rows)),
    ("head rows", lambda _, share: _ends(share.head_rows)),
    ("weights", lambda report, share: f"{parameter_count(report.arch, share):,}"),
)
