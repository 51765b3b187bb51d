"""How one dimension of the model is cut: heads, layers, experts, expert width, vocabulary rows.

Each function answers for one rank of one group of a given size; which groups there are, and who is
in them, is `topology`'s, through which everybody but `legality` takes these. Ranges are half-open
`range` objects over the rows, layers or experts of the whole model. No torch, no SGLang.

QK norm over a group of N attention-TP ranks (explained in docs/topology.md):
  q has H heads, N divides H: each rank holds H/N heads, mean = sum over ranks / (H * head_dim).
  k has K heads. N <= K: as q. N > K: each head lives on R = N/K neighbouring ranks, the sum over
  ranks counts it R times, so mean = sum over ranks / (R * K * head_dim).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sglang_minimax.config import Architecture
from sglang_minimax.errors import TopologyError

# Rows to which SGLang pads a vocabulary (vocab_parallel_embedding.DEFAULT_VOCAB_PADDING_SIZE).
VOCABULARY_PADDING = 64


def exact_div(total: int, parts: int, what: str) -> int:
    """Return total / parts, or raise TopologyError naming both numbers.

    >>> exact_div(48, 16, "query heads over attention-TP")
    3
    """
    if parts < 1:
        raise TopologyError(f"{what}: {total} cannot be divided into {parts} parts")
    quotient, rest = divmod(total, parts)
    if rest:
        near = " or ".join(map(str, nearest(parts, divisors(total))))
        raise TopologyError(
            f"{what}: {total} is not divisible by {parts} (remainder {rest}); "
            f"the nearest sizes that divide it: {near}."
        )
    return quotient


def ceil_div(total: int, part: int) -> int:
    """Return the number of parts of size `part` that cover `total`.

    >>> ceil_div(1536, 128), ceil_div(1537, 128)
    (12, 13)
    """
    return -(-total // part)


def divisors(total: int) -> tuple[int, ...]:
    """Every divisor of `total`, ascending.

    >>> divisors(12)
    (1, 2, 3, 4, 6, 12)
    """
    return tuple(n for n in range(1, total + 1) if total % n == 0)


def nearest(value: int, choices: Iterable[int]) -> tuple[int, ...]:
    """The largest choice below `value` and the smallest above it, where there are such.

    >>> nearest(12, (1, 2, 4, 8, 16, 24, 48)), nearest(64, (1, 2))
    ((8, 16), (2,))
    """
    choices = tuple(choices)
    below = [choice for choice in choices if choice < value]
    above = [choice for choice in choices if choice > value]
    return (*((max(below),) if below else ()), *((min(above),) if above else ()))


def check_rank(rank: int, size: int, group: str) -> None:
    """Raise TopologyError unless 0 <= rank < size."""
    if size < 1:
        raise TopologyError(f"{group} has size {size}; it needs at least one rank")
    if not 0 <= rank < size:
        raise TopologyError(f"{group} rank {rank} does not exist in a group of {size}")


def _part(total: int, size: int, rank: int, what: str) -> range:
    """Rank `rank`'s part of `total` things that `size` ranks share evenly and in order."""
    each = exact_div(total, size, what)
    return range(rank * each, (rank + 1) * each)


@dataclass(frozen=True, slots=True)
class Cut:
    """One rank's part of a dimension of the model.

    lines: this rank's, of `total` in the checkpoint; maybe none. width: lines in memory, those
    beyond `lines` are padding. first, over: where this rank's part begins, and how many lines there
    are, when every rank's part is counted with its padding.
    """

    lines: range
    total: int
    width: int
    first: int
    over: int

    @classmethod
    def even(cls, lines: range, total: int) -> Cut:
        """A part without padding."""
        return cls(lines, total, len(lines), lines.start, total)

    @classmethod
    def whole(cls, total: int) -> Cut:
        """All of a dimension, as a rank holds it that shares it with nobody."""
        return cls.even(range(total), total)

    @property
    def is_padded(self) -> bool:
        """Whether ranks count with more lines than the checkpoint has."""
        return self.over != self.total


# --- attention ---


def is_legal_attention_tp(num_heads: int, num_kv_heads: int, size: int) -> bool:
    """Whether `size` ranks can share the heads: whole query heads, whole or replicated KV heads."""
    if size < 1 or num_heads % size:
        return False
    return num_kv_heads % size == 0 or size % num_kv_heads == 0


def legal_attention_tp_sizes(num_heads: int, num_kv_heads: int) -> tuple[int, ...]:
    """Every attention-TP size that divides the heads, ascending.

    >>> legal_attention_tp_sizes(48, 8)
    (1, 2, 4, 8, 16, 24, 48)
    """
    sizes = range(1, num_heads + 1)
    return tuple(n for n in sizes if is_legal_attention_tp(num_heads, num_kv_heads, n))


def attention_tp_obstacle(num_heads: int, num_kv_heads: int, size: int) -> str | None:
    """Why `size` attention-TP ranks cannot share the heads, as a clause; None when they can."""
    if is_legal_attention_tp(num_heads, num_kv_heads, size):
        return None
    return (
        f"attention-TP size {size} does not divide {num_heads} query heads and {num_kv_heads} KV "
        "heads into whole or replicated heads"
    )


def attention_tp_refusal(num_heads: int, num_kv_heads: int, size: int) -> str | None:
    """The same as a sentence with the nearest sizes that do."""
    obstacle = attention_tp_obstacle(num_heads, num_kv_heads, size)
    if obstacle is None:
        return None
    near = nearest(size, legal_attention_tp_sizes(num_heads, num_kv_heads))
    return f"{obstacle}; the nearest sizes that do: {' or '.join(map(str, near))}."


@dataclass(frozen=True, slots=True)
class AttentionShard:
    """What one attention-TP rank holds of the attention and of the QK norm.

    Rows count the output rows of q_proj, k_proj and v_proj over all ranks, which are also the
    elements of the q_norm and k_norm weights; o_proj has this rank's q rows as its columns.
    """

    size: int
    rank: int
    head_dim: int
    total_q_heads: int
    total_kv_heads: int

    @classmethod
    def of(cls, arch: Architecture, size: int, rank: int) -> AttentionShard:
        """The share of rank `rank` in an attention-TP group of `size`."""
        return cls(size, rank, arch.head_dim, arch.num_heads, arch.num_kv_heads)

    def __post_init__(self) -> None:
        check_rank(self.rank, self.size, "attention-TP")
        refusal = attention_tp_refusal(self.total_q_heads, self.total_kv_heads, self.size)
        if refusal:
            raise TopologyError(refusal)

    @property
    def q_heads(self) -> int:
        """Query heads of this rank."""
        return exact_div(self.total_q_heads, self.size, "query heads over attention-TP")

    @property
    def kv_replicas(self) -> int:
        """Ranks that hold the same KV heads; 1 when every KV head lives on one rank."""
        if self.size <= self.total_kv_heads:
            return 1
        return exact_div(self.size, self.total_kv_heads, "attention-TP over KV heads")

    @property
    def kv_owner(self) -> int:
        """Place among the ranks that hold different KV heads; replicas are neighbours."""
        return self.rank // self.kv_replicas

    @property
    def kv_heads(self) -> int:
        """KV heads of this rank."""
        owners = exact_div(self.size, self.kv_replicas, "attention-TP over KV replicas")
        return exact_div(self.total_kv_heads, owners, "KV heads over attention-TP")

    @property
    def q_width(self) -> int:
        """Columns of this rank's q."""
        return self.q_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of this rank's k, and of its v."""
        return self.kv_heads * self.head_dim

    @property
    def q_head_ids(self) -> range:
        """This rank's query heads."""
        return range(self.rank * self.q_heads, (self.rank + 1) * self.q_heads)

    @property
    def kv_head_ids(self) -> range:
        """This rank's KV heads; replicas share them."""
        return range(self.kv_owner * self.kv_heads, (self.kv_owner + 1) * self.kv_heads)

    @property
    def q_rows(self) -> range:
        """This rank's rows of q_proj and of the q norm weight."""
        return range(self.rank * self.q_width, (self.rank + 1) * self.q_width)

    @property
    def kv_rows(self) -> range:
        """This rank's rows of k_proj, v_proj and of the k norm weight; replicas share them."""
        return range(self.kv_owner * self.kv_width, (self.kv_owner + 1) * self.kv_width)

    @property
    def q_total(self) -> int:
        """Columns of q over all ranks."""
        return self.total_q_heads * self.head_dim

    @property
    def kv_total(self) -> int:
        """Columns of k over all ranks, every head counted once."""
        return self.total_kv_heads * self.head_dim

    @property
    def q_divisor(self) -> int:
        """Divides the sum over ranks of q's squares, to give their mean."""
        return self.q_total

    @property
    def k_divisor(self) -> int:
        """Divides the sum over ranks of k's squares, in which replicas appear again."""
        return self.kv_replicas * self.kv_total


# --- layers ---


def pipeline_refusal(num_layers: int, pp_size: int) -> str | None:
    """Why the layers cannot fill `pp_size` stages, in one sentence; None when they can."""
    if pp_size <= num_layers:
        return None
    return (
        f"--pp-size {pp_size} exceeds the {num_layers} layers and leaves a stage without one; "
        f"use --pp-size {num_layers} or less."
    )


def layer_range(
    num_layers: int, pp_size: int, pp_rank: int, partition: Sequence[int] | None = None
) -> range:
    """The layers of one pipeline stage.

    Without `partition` the layers are spread evenly and the last stages take the remainder, as
    SGLang does; `partition` names the number of layers of every stage (SGLANG_PP_LAYER_PARTITION).

    >>> [len(layer_range(62, 4, r)) for r in range(4)]
    [15, 15, 16, 16]
    """
    check_rank(pp_rank, pp_size, "pipeline-parallel")
    if refusal := pipeline_refusal(num_layers, pp_size):
        raise TopologyError(refusal)
    base, rest = divmod(num_layers, pp_size)
    even = [base + (stage >= pp_size - rest) for stage in range(pp_size)]
    counts = even if partition is None or pp_size == 1 else list(partition)
    if len(counts) != pp_size or sum(counts) != num_layers or min(counts) < 1:
        raise TopologyError(
            f"the pipeline partition {','.join(map(str, counts))} must name {pp_size} stages "
            f"of at least one layer that add up to {num_layers}; "
            f"an even one is {','.join(map(str, even))}."
        )
    start = sum(counts[:pp_rank])
    return range(start, start + counts[pp_rank])


# --- experts ---


def expert_range(num_experts: int, ep_size: int, ep_rank: int) -> range:
    """The experts of one expert-parallel rank when they are placed in order.

    num_experts: redundant copies included; expert i of them is a copy of i modulo the model's
    number of experts, where nothing has been rebalanced (`ExpertLocationMetadata.init_trivial`).
    """
    check_rank(ep_rank, ep_size, "expert-parallel")
    return _part(num_experts, ep_size, ep_rank, "experts over EP")


def moe_tp_size(tp_size: int, ep_size: int) -> int:
    """Ranks that share the width of one expert."""
    return exact_div(tp_size, ep_size, "TP ranks over EP")


def expert_cut(expert_width: int, size: int, rank: int, unit: int = 1) -> Cut:
    """This rank's rows of w1 and w3, and columns of w2, when `size` ranks share an expert.

    unit: lines that share a scale or a packed word, and stay together. Where `size` does not divide
    the width into whole units, whole ones are dealt: the first ranks hold one more than the last,
    and every rank's share is padded to the same whole units in memory, as SGLang's kernels want.

    >>> [len(expert_cut(1536, 8, rank, 128).lines) for rank in range(8)]
    [256, 256, 256, 256, 128, 128, 128, 128]
    >>> expert_cut(1536, 8, 5, 128).width
    256
    """
    check_rank(rank, size, "MoE-TP")
    if unit == 1 or expert_width % (size * unit) == 0:
        return Cut.even(_part(expert_width, size, rank, "expert width over MoE-TP"), expert_width)
    units = ceil_div(expert_width, unit)
    each, more = divmod(units, size)
    start = rank * each + min(rank, more)
    stop = start + each + (rank < more)
    width = ceil_div(units, size) * unit
    lines = range(min(start * unit, expert_width), min(stop * unit, expert_width))
    return Cut(lines, expert_width, width, rank * width, size * width)


def expert_rows(expert_width: int, size: int, rank: int, unit: int = 1) -> range:
    """The lines of `expert_cut`, without padding."""
    return expert_cut(expert_width, size, rank, unit).lines


# --- vocabulary ---


def vocabulary_rows_in_memory(vocab_size: int, size: int) -> int:
    """Rows of an embedding or head that each of `size` ranks allocates, padding included.

    SGLang pads the table to a multiple of 64 rows, or of 64 * size where 64 will not do
    (layers/vocab_parallel_embedding.py: VocabParallelEmbedding.__init__).

    >>> vocabulary_rows_in_memory(200064, 1), vocabulary_rows_in_memory(200064, 72)
    (200064, 2816)
    """
    padded = ceil_div(vocab_size, VOCABULARY_PADDING) * VOCABULARY_PADDING
    if padded % size:
        unit = VOCABULARY_PADDING * size
        padded = ceil_div(vocab_size, unit) * unit
    return exact_div(padded, size, "padded vocabulary over ranks")


def vocabulary_rows(vocab_size: int, size: int, rank: int) -> range:
    """This rank's rows of an embedding or head that `size` ranks share; padding is not counted.

    Empty, at the end of the vocabulary, for a rank that holds padding only.
    """
    check_rank(rank, size, "vocabulary")
    held = vocabulary_rows_in_memory(vocab_size, size)
    return range(min(rank * held, vocab_size), min((rank + 1) * held, vocab_size))
