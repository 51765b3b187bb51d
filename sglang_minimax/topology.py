"""Which rank owns what, and with whom it works. Arithmetic only: no torch, no SGLang.

Every number that depends on a rank comes from here: the model, the layers and the loader ask, and
compute none themselves. `Topology` lays the ranks out in groups, `rank_share` says what one of them
owns of an architecture. How a single dimension is cut is in `shards`, which sizes are legal and
which are the nearest legal ones in `legality`; both are reached through this module.

The layout is SGLang's: distributed/parallel_state.py (initialize_model_parallel) builds the groups,
runtime_context.py (derive_spawn_ranks, derive_attention_ranks) numbers the ranks in them, and
entrypoints/engine.py (_calculate_rank_ranges) puts them on nodes. In words, outermost first:

  rank = pp_rank * tp + tp_rank
  tp_rank = attention_dp_rank * attention_tp + attention_tp_rank    (attention_tp = tp / dp)
  tp_rank = moe_ep_rank * moe_tp + moe_tp_rank                      (moe_tp = tp / ep)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from types import MappingProxyType

from sglang_minimax.config import Architecture
from sglang_minimax.errors import TopologyError
from sglang_minimax.legality import Sizes, refusals
from sglang_minimax.shards import (
    AttentionShard,
    Cut,
    attention_tp_refusal,
    ceil_div,
    check_rank,
    exact_div,
    expert_cut,
    expert_range,
    expert_rows,
    is_legal_attention_tp,
    layer_range,
    legal_attention_tp_sizes,
    moe_tp_size,
    nearest,
    vocabulary_rows,
    vocabulary_rows_in_memory,
)

__all__ = [
    "GROUP_KINDS",
    "AttentionShard",
    "Cut",
    "RankShare",
    "Topology",
    "attention_tp_refusal",
    "ceil_div",
    "check_rank",
    "exact_div",
    "expert_cut",
    "expert_range",
    "expert_rows",
    "is_legal_attention_tp",
    "layer_range",
    "legal_attention_tp_sizes",
    "moe_tp_size",
    "nearest",
    "parameter_count",
    "rank_share",
    "rank_shares",
    "vocabulary_rows",
    "vocabulary_rows_in_memory",
]

# Kind of group -> the coordinates in which its members agree; they differ in all others.
_SHARED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "tp": ("pp_rank",),
        "attention_tp": ("pp_rank", "attention_dp_rank"),
        "attention_dp": ("pp_rank", "attention_tp_rank"),
        "moe_ep": ("pp_rank", "moe_tp_rank"),
        "moe_tp": ("pp_rank", "moe_ep_rank"),
        "pp": ("tp_rank",),
        "node": ("node",),
    }
)
GROUP_KINDS = tuple(_SHARED)

Group = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where one rank stands in each dimension."""

    rank: int
    node: int
    pp_rank: int
    tp_rank: int
    attention_dp_rank: int
    attention_tp_rank: int
    moe_ep_rank: int
    moe_tp_rank: int


@dataclass(frozen=True, slots=True)
class Topology:
    """How many ranks there are in each dimension; sizes that do not divide are a TopologyError.

    tp: all ranks of a pipeline stage. dp: attention groups that these ranks form, each with its own
    requests. ep: parts in which these ranks hold the experts. pp: stages. nodes: machines, which
    take equal runs of ranks. Whether a model can be divided so is `rank_share`'s question.
    """

    tp: int = 1
    dp: int = 1
    ep: int = 1
    pp: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        if obstacles := refusals(None, self.sizes()):
            raise TopologyError(obstacles[0])

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Read "tp=8,dp=2"; what is not named is 1. TopologyError in one sentence on bad text.

        >>> Topology.parse("tp=16, dp=2, ep=16")
        Topology(tp=16, dp=2, ep=16, pp=1, nodes=1)
        """
        return cls(**cls.parse_sizes(text))

    @classmethod
    def parse_sizes(cls, text: str) -> dict[str, int]:
        """The sizes that such a text names, which may divide nothing; the same TopologyError."""
        known = [each.name for each in fields(cls)]
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, _, value = (each.strip() for each in part.partition("="))
            if name not in known or name in sizes or not _is_size(value):
                raise TopologyError(
                    f"the topology {text!r} is not understood at {part.strip()!r}; write it as "
                    f"tp=8,dp=2 with each of {', '.join(known)} at most once and a whole number."
                )
            sizes[name] = int(value)
        return sizes

    def __str__(self) -> str:
        """As `parse` reads it, without the sizes that are 1; "tp=1" where all are."""
        named = [f"{name}={size}" for name, size in asdict(self).items() if size > 1]
        return ",".join(named) or "tp=1"

    def sizes(self, redundant_experts: int = 0) -> Sizes:
        """The same as SGLang's options, to be judged together with an architecture."""
        return Sizes(**asdict(self), ep_redundant=redundant_experts)

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tp * self.pp

    @property
    def attention_tp(self) -> int:
        """Ranks that share the heads of one attention group."""
        return exact_div(self.tp, self.dp, "TP ranks over attention-DP")

    @property
    def moe_tp(self) -> int:
        """Ranks that share the width of one expert."""
        return moe_tp_size(self.tp, self.ep)

    def coordinates(self, rank: int) -> Coordinates:
        """Where global rank `rank` stands."""
        check_rank(rank, self.world_size, "world")
        pp_rank, tp_rank = divmod(rank, self.tp)
        attention_dp_rank, attention_tp_rank = divmod(tp_rank, self.attention_tp)
        moe_ep_rank, moe_tp_rank = divmod(tp_rank, self.moe_tp)
        return Coordinates(
            rank=rank,
            node=rank // exact_div(self.world_size, self.nodes, "ranks over nodes"),
            pp_rank=pp_rank,
            tp_rank=tp_rank,
            attention_dp_rank=attention_dp_rank,
            attention_tp_rank=attention_tp_rank,
            moe_ep_rank=moe_ep_rank,
            moe_tp_rank=moe_tp_rank,
        )

    def groups(self, kind: str) -> tuple[Group, ...]:
        """The global ranks of every group of a kind, which together are all ranks once.

        kind: one of GROUP_KINDS. Members ascend, and so do groups by their first member.
        """
        if kind not in _SHARED:
            raise TopologyError(f"no group is called {kind!r}; there are {', '.join(GROUP_KINDS)}.")
        return _groups(self, kind)

    def group_of(self, kind: str, rank: int) -> Group:
        """The global ranks of the group of a kind that `rank` is in."""
        check_rank(rank, self.world_size, "world")
        return next(group for group in self.groups(kind) if rank in group)


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


@lru_cache(maxsize=256)
def _groups(topology: Topology, kind: str) -> tuple[Group, ...]:
    members: dict[tuple[int, ...], list[int]] = {}
    for rank in range(topology.world_size):
        place = topology.coordinates(rank)
        members.setdefault(tuple(getattr(place, name) for name in _SHARED[kind]), []).append(rank)
    return tuple(tuple(group) for group in members.values())


@dataclass(frozen=True, slots=True)
class RankShare(Coordinates):
    """What one global rank owns of the model, and with whom.

    layers: of the model. experts: of each of those layers, redundant copies counted on after the
    model's own. expert_rows: of each of those experts, rows of w1 and w3 and columns of w2.
    embedding_rows, head_rows: of the vocabulary, padding not counted (a rank that holds nothing
    else has an empty range); None on a stage without that module. groups: kind -> global ranks.
    """

    attention: AttentionShard
    layers: range
    experts: range
    expert_rows: range
    embedding_rows: range | None
    head_rows: range | None
    groups: Mapping[str, Group] = field(hash=False)

    @property
    def kv_elements(self) -> int:
        """Elements of KV cache that one token of this rank's requests takes here."""
        return len(self.layers) * 2 * self.attention.kv_width


def rank_share(
    arch: Architecture,
    topology: Topology,
    rank: int,
    *,
    dp_lm_head: bool = False,
    redundant_experts: int = 0,
    pp_partition: Sequence[int] | None = None,
) -> RankShare:
    """What global rank `rank` owns of `arch`.

    dp_lm_head: the head is cut over the attention-TP group, as with --enable-dp-lm-head, instead of
    over all ranks of the stage. redundant_experts: --ep-num-redundant-experts. pp_partition: layers
    of every stage (SGLANG_PP_LAYER_PARTITION). Raises TopologyError, with the nearest legal sizes,
    where `arch` cannot be divided so.
    """
    if obstacles := refusals(arch, topology.sizes(redundant_experts)):
        raise TopologyError(obstacles[0])
    place = topology.coordinates(rank)
    attention_tp = (topology.attention_tp, place.attention_tp_rank)
    tp = (topology.tp, place.tp_rank)
    first, last = place.pp_rank == 0, place.pp_rank == topology.pp - 1
    # With attention DP a rank embeds the tokens of its own requests, so the attention group shares
    # the table; without, that group is all ranks of the stage.
    return RankShare(
        **asdict(place),
        attention=AttentionShard.of(arch, *attention_tp),
        layers=layer_range(arch.num_layers, topology.pp, place.pp_rank, pp_partition),
        experts=expert_range(arch.num_experts + redundant_experts, topology.ep, place.moe_ep_rank),
        expert_rows=expert_rows(
            arch.expert_width, topology.moe_tp, place.moe_tp_rank, arch.expert_unit
        ),
        embedding_rows=vocabulary_rows(arch.vocab_size, *attention_tp) if first else None,
        head_rows=vocabulary_rows(arch.vocab_size, *(attention_tp if dp_lm_head else tp))
        if last
        else None,
        groups=MappingProxyType({kind: topology.group_of(kind, rank) for kind in GROUP_KINDS}),
    )


def rank_shares(
    arch: Architecture,
    topology: Topology,
    *,
    dp_lm_head: bool = False,
    redundant_experts: int = 0,
    pp_partition: Sequence[int] | None = None,
) -> tuple[RankShare, ...]:
    """`rank_share` of every rank, in order."""
    return tuple(
        rank_share(
            arch,
            topology,
            rank,
            dp_lm_head=dp_lm_head,
            redundant_experts=redundant_experts,
            pp_partition=pp_partition,
        )
        for rank in range(topology.world_size)
    )


def parameter_count(arch: Architecture, share: RankShare) -> int:
    """Elements of the checkpoint's weights that a rank holds; scales and padding are not counted.

    A tied head that is cut as the embedding on the same rank is the embedding.
    """
    hidden, attention = arch.hidden_size, share.attention
    projections = 2 * hidden * (attention.q_width + attention.kv_width)
    norms = 2 * hidden + len(attention.q_rows) + len(attention.kv_rows)
    router = arch.num_experts * (hidden + 1)
    experts = len(share.experts) * 3 * len(share.expert_rows) * hidden
    total = len(share.layers) * (projections + norms + router + experts)
    if share.embedding_rows is not None:
        total += len(share.embedding_rows) * hidden
    if share.head_rows is not None:
        tied = arch.tie_word_embeddings and share.head_rows == share.embedding_rows
        total += hidden + (0 if tied else len(share.head_rows) * hidden)
    return total
