"""Every weight element is owned as often as it must be, at any legal shape; no other shape passes.

Shapes are drawn up to 144 ranks. Each property has mutants: plausible wrong arithmetic that it must
notice.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sglang_minimax import shards
from sglang_minimax import topology as under_test
from sglang_minimax.config import Architecture
from sglang_minimax.errors import TopologyError
from sglang_minimax.legality import OPTIONS, REDUNDANT, Sizes, refusals
from sglang_minimax.loading.formats.base import UNQUANTISED, Names, Recipe
from sglang_minimax.loading.formats.fp8 import blocks
from sglang_minimax.topology import (
    GROUP_KINDS,
    RankShare,
    Topology,
    parameter_count,
    rank_share,
    rank_shares,
)

MOST_RANKS = 144
PUBLISHED = Architecture.from_config({"head_dim": 128})


@dataclass(frozen=True)
class Case:
    """One legal shape of one architecture."""

    arch: Architecture
    topology: Topology
    redundant: int = 0
    dp_lm_head: bool = False

    def shares(self) -> tuple[RankShare, ...]:
        return rank_shares(
            self.arch,
            self.topology,
            redundant_experts=self.redundant,
            dp_lm_head=self.dp_lm_head,
        )


def in_blocks(unit: int) -> Recipe:
    """Experts in blocks whose lines stay together; attention as it is."""
    plain = UNQUANTISED if unit == 1 else Recipe("", "fp8", blocks(unit, unit))
    return replace(plain, plain=Names(("self_attn",)))


def divisors(total: int) -> list[int]:
    return [n for n in range(1, total + 1) if total % n == 0]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Built to be legal: sizes first, then an architecture that they divide."""
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 8]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3, 6, 12]))
    attention_tp = draw(st.sampled_from(shards.legal_attention_tp_sizes(heads, kv_heads)))
    dp = draw(st.integers(1, MOST_RANKS // attention_tp))
    tp = attention_tp * dp
    ep = draw(st.sampled_from(divisors(tp)))
    pp = draw(st.integers(1, min(5, MOST_RANKS // tp)))
    nodes = draw(st.sampled_from([n for n in divisors(tp * pp) if pp % n == 0 or n % pp == 0]))
    experts = draw(st.integers(1, 9))
    unit = draw(st.sampled_from([1, 1, 3, 4]))
    arch = replace(
        PUBLISHED,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4])),
        num_layers=pp + draw(st.integers(0, 7)),
        vocab_size=draw(st.integers(1, 3000)),
        num_experts=experts,
        top_k=1,
        expert_width=tp // ep * draw(st.integers(1, 4)) if unit == 1 else draw(st.integers(1, 60)),
        hidden_size=8,
        tie_word_embeddings=draw(st.booleans()),
        recipe=in_blocks(unit),
    )
    redundant = -experts % ep + ep * draw(st.integers(0, 1))
    return Case(arch, Topology(tp, dp, ep, pp, nodes), redundant, draw(st.booleans()))


# --- what must hold ---


def owners_are_right(case: Case) -> None:
    """Each element of each kind of weight, counted over all ranks."""
    arch, topology, shares = case.arch, case.topology, case.shares()
    replicas = shares[0].attention.kv_replicas
    stages = range(topology.pp)
    assert count((s.pp_rank, i) for s in shares for i in s.attention.q_rows) == every(
        topology.dp, stages, range(arch.num_heads * arch.head_dim)
    ), "q, o and the q norm: once an attention group"
    assert count((s.pp_rank, i) for s in shares for i in s.attention.kv_rows) == every(
        topology.dp * replicas, stages, range(arch.num_kv_heads * arch.head_dim)
    ), "k, v and the k norm: once a replica"
    assert count((s.pp_rank, e, r) for s in shares for e in s.experts for r in s.expert_rows) == (
        every(1, stages, range(arch.num_experts + case.redundant), range(arch.expert_width))
    ), "experts: once a stage"
    stage_of_layer = count(layer for s in shares for layer in s.layers)
    assert stage_of_layer == every_one(topology.tp, range(arch.num_layers)), "layers: one stage"
    vocabulary = range(arch.vocab_size)
    first = [s.embedding_rows for s in shares if s.embedding_rows is not None]
    assert count(i for rows in first for i in rows) == every_one(topology.dp, vocabulary)
    last = [s.head_rows for s in shares if s.head_rows is not None]
    copies = topology.dp if case.dp_lm_head else 1
    assert count(i for rows in last for i in rows) == every_one(copies, vocabulary)
    assert [s.embedding_rows is not None for s in shares] == [s.pp_rank == 0 for s in shares]
    assert [s.head_rows is not None for s in shares] == [
        s.pp_rank == topology.pp - 1 for s in shares
    ]


def count(elements: Iterable[Any]) -> Counter[Any]:
    return Counter(elements)


def every(times: int, *ranges: range) -> dict[Any, int]:
    return dict.fromkeys(itertools.product(*ranges), times)


def every_one(times: int, numbers: range) -> dict[int, int]:
    return dict.fromkeys(numbers, times)


def replicas_are_neighbours(case: Case) -> None:
    """Query heads find their KV head on the same rank; equal KV heads are on consecutive ranks."""
    group = case.arch.num_heads // case.arch.num_kv_heads
    shares = case.shares()
    for share in shares:
        assert {head // group for head in share.attention.q_head_ids} <= set(
            share.attention.kv_head_ids
        )
    for members in case.topology.groups("attention_tp"):
        starts = [shares[rank].attention.kv_rows.start for rank in members]
        assert starts == sorted(starts)


def blocks_are_whole(case: Case) -> None:
    """A rank holds whole blocks of an expert, no rank two more than another; plain rows evenly."""
    unit, width = case.arch.expert_unit, case.arch.expert_width
    counts = set()
    for share in case.shares():
        rows = share.expert_rows
        assert not rows or (
            rows.start % unit == 0 and (rows.stop % unit == 0 or rows.stop == width)
        )
        counts.add(-(-len(rows) // unit))
    assert max(counts) - min(counts) <= (0 if unit == 1 else 1)


def variances_are_means(case: Case) -> None:
    """What the ranks add up, divided by the divisor, is the mean over all columns."""
    arch, shares = case.arch, case.shares()
    q = [1.0 + i * i for i in range(arch.num_heads * arch.head_dim)]
    k = [2.0 + i for i in range(arch.num_kv_heads * arch.head_dim)]
    for members in case.topology.groups("attention_tp"):
        parts = [shares[rank].attention for rank in members]
        sum_q = sum(q[i] for part in parts for i in part.q_rows)
        sum_k = sum(k[i] for part in parts for i in part.kv_rows)
        for part in parts:
            assert sum_q / part.q_divisor == pytest.approx(sum(q) / len(q))
            assert sum_k / part.k_divisor == pytest.approx(sum(k) / len(k))


def groups_are_right(case: Case) -> None:
    """Each kind takes every rank once; who is together agrees in what that kind is about."""
    topology, shares = case.topology, case.shares()
    sizes = {
        "tp": topology.tp,
        "attention_tp": topology.tp // topology.dp,
        "attention_dp": topology.dp,
        "moe_ep": topology.ep,
        "moe_tp": topology.tp // topology.ep,
        "pp": topology.pp,
        "node": topology.tp * topology.pp // topology.nodes,
    }
    assert set(sizes) == set(GROUP_KINDS)
    for kind, size in sizes.items():
        groups = topology.groups(kind)
        assert {len(group) for group in groups} == {size}
        assert sorted(rank for group in groups for rank in group) == list(range(len(shares)))
        for share in shares:
            assert share.rank in share.groups[kind]
            assert share.groups[kind] in groups
    for share in shares:
        mates = {kind: [shares[rank] for rank in share.groups[kind]] for kind in GROUP_KINDS}
        assert {m.attention_dp_rank for m in mates["attention_tp"]} == {share.attention_dp_rank}
        assert {m.attention.q_rows for m in mates["attention_dp"]} == {share.attention.q_rows}
        assert {m.experts for m in mates["moe_tp"]} == {share.experts}
        assert {m.expert_rows for m in mates["moe_ep"]} == {share.expert_rows}
        assert {m.layers for m in mates["tp"]} == {share.layers}
        assert [m.pp_rank for m in mates["pp"]] == list(range(topology.pp))


PROPERTIES = (
    owners_are_right,
    replicas_are_neighbours,
    blocks_are_whole,
    variances_are_means,
    groups_are_right,
)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_any_legal_shape(case: Case) -> None:
    assert refusals(case.arch, case.topology.sizes(case.redundant)) == []
    for holds in PROPERTIES:
        holds(case)


LARGE = [
    Case(PUBLISHED, Topology.parse(text), redundant)
    for text, redundant in (
        ("tp=16,dp=2,ep=16", 0),
        ("tp=48,ep=16", 0),
        ("tp=72,dp=9,ep=72,nodes=18", 32),
        ("tp=72,dp=72,ep=72,nodes=18", 32),
        ("tp=72,dp=3,ep=72,pp=2,nodes=36", 32),
        ("tp=144,dp=3,ep=144", 32),
        ("tp=256,dp=32,ep=256,nodes=32", 0),
    )
]


@pytest.mark.parametrize("case", LARGE, ids=lambda case: str(case.topology))
def test_the_published_model_up_to_256_ranks(case: Case) -> None:
    small = replace(case.arch, head_dim=2, vocab_size=20006, num_layers=3, expert_width=48)
    for holds in PROPERTIES:
        holds(replace(case, arch=small))


# --- what is wrong in a plausible way ---


def strided_kv(shard: shards.AttentionShard) -> int:
    return shard.rank % (shard.size // shard.kv_replicas)


def unreplicated_divisor(shard: shards.AttentionShard) -> int:
    return shard.kv_total


def divided_kv(shard: shards.AttentionShard) -> int:
    return shard.total_kv_heads // shard.size


def local_divisor(shard: shards.AttentionShard) -> int:
    return shard.q_width


def unpadded_rows(vocab_size: int, size: int, rank: int) -> range:
    each = vocab_size // size
    return range(rank * each, (rank + 1) * each)


def blocks_rounded_up(width: int, size: int, rank: int, unit: int = 1) -> range:
    """As many for each rank as the first one has; the last ranks go without."""
    each = -(-width // (size * unit)) * unit
    return range(min(rank * each, width), min((rank + 1) * each, width))


def lines_dealt(width: int, size: int, rank: int, unit: int = 1) -> range:
    each, more = divmod(width, size)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


def first_stages_take_the_rest(
    num_layers: int, pp_size: int, pp_rank: int, partition: object = None
) -> range:
    each = -(-num_layers // pp_size)
    return range(pp_rank * each, (pp_rank + 1) * each)


def experts_dealt_out(num_experts: int, ep_size: int, ep_rank: int) -> range:
    return range(ep_rank, num_experts - 1, ep_size)


def strided_coordinates(self: Topology, rank: int) -> Any:
    place = COORDINATES(self, rank)
    attention_tp_rank, attention_dp_rank = divmod(place.tp_rank, self.dp)
    return replace(
        place, attention_dp_rank=attention_dp_rank, attention_tp_rank=attention_tp_rank % 2
    )


COORDINATES = Topology.coordinates
MUTANTS = [
    (shards.AttentionShard, "kv_owner", property(strided_kv)),
    (shards.AttentionShard, "k_divisor", property(unreplicated_divisor)),
    (shards.AttentionShard, "kv_replicas", property(lambda shard: 1)),
    (shards.AttentionShard, "kv_heads", property(divided_kv)),
    (shards.AttentionShard, "q_divisor", property(local_divisor)),
    (under_test, "vocabulary_rows", unpadded_rows),
    (under_test, "expert_rows", blocks_rounded_up),
    (under_test, "expert_rows", lines_dealt),
    (under_test, "layer_range", first_stages_take_the_rest),
    (under_test, "expert_range", experts_dealt_out),
    (Topology, "coordinates", strided_coordinates),
]


@pytest.mark.parametrize(("owner", "name", "wrong"), MUTANTS, ids=lambda part: str(part)[-40:])
def test_a_mutant_is_caught(
    owner: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [
        Case(replace(PUBLISHED, head_dim=2, vocab_size=999, num_layers=7, expert_width=48), t)
        for t in map(Topology.parse, ("tp=16", "tp=4,dp=2,ep=4,pp=2", "tp=24,ep=4", "tp=8,pp=3"))
    ]
    shapes += [replace(case, arch=replace(case.arch, recipe=in_blocks(4))) for case in shapes]
    under_test._groups.cache_clear()
    monkeypatch.setattr(owner, name, wrong)
    try:
        assert any(not all_hold(case) for case in shapes), f"nothing notices {name}"
    finally:
        under_test._groups.cache_clear()


def all_hold(case: Case) -> bool:
    try:
        for holds in PROPERTIES:
            holds(case)
    except (AssertionError, TopologyError, IndexError):
        return False
    return True


# --- what is illegal ---

sizes_asked = st.builds(
    Sizes,
    tp=st.integers(1, 80),
    dp=st.sampled_from([1, 1, 1, 2, 3, 4, 8, 9]),
    ep=st.sampled_from([1, 1, 2, 3, 4, 8, 16, 72]),
    pp=st.sampled_from([1, 1, 1, 2, 3, 63]),
    nodes=st.sampled_from([1, 1, 1, 2, 3, 4]),
    ep_redundant=st.sampled_from([0, 0, 8, 32]),
)
FP8 = Architecture.from_config(
    {
        "head_dim": 128,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
)
assert replace(FP8, recipe=PUBLISHED.recipe) == PUBLISHED
archs = st.sampled_from([PUBLISHED, FP8, replace(PUBLISHED, num_heads=36, num_kv_heads=6)])


@settings(max_examples=300, deadline=None)
@given(archs, sizes_asked)
def test_legal_means_that_every_share_can_be_computed(arch: Architecture, asked: Sizes) -> None:
    """Judged once more with nothing but remainders."""
    judged = by_remainders(arch, asked)
    assert (refusals(arch, asked) == []) is judged
    if judged:
        topology = Topology(asked.tp, asked.dp, asked.ep, asked.pp, asked.nodes)
        rank_share(arch, topology, topology.world_size - 1, redundant_experts=asked.ep_redundant)


def by_remainders(arch: Architecture, asked: Sizes) -> bool:
    tp, ep, block = asked.tp, asked.ep, 1 if arch.recipe.method is None else 128
    if tp % asked.dp or tp % ep or (arch.num_experts + asked.ep_redundant) % ep:
        return False
    attention, kv = tp // asked.dp, arch.num_kv_heads
    if arch.num_heads % attention or (kv % attention and attention % kv):
        return False
    # Whole blocks of an expert are dealt to any number of ranks; heads are never cut.
    if block == 1 and arch.expert_width % (tp // ep):
        return False
    if arch.num_heads // attention * arch.head_dim % block:
        return False
    whole_stages = asked.pp % asked.nodes == 0
    whole_nodes = asked.nodes % asked.pp == 0 and tp % (asked.nodes // asked.pp) == 0
    return asked.pp <= arch.num_layers and (whole_stages or whole_nodes)


@settings(max_examples=120, deadline=None)
@given(archs, sizes_asked)
def test_an_illegal_shape_names_sizes_that_are_legal_and_the_nearest(
    arch: Architecture, asked: Sizes
) -> None:
    said = refusals(arch, asked)
    assume(said)
    for sentence in said:
        assert "\n" not in sentence
        assert sentence.endswith(".")
        proposed = alternatives(sentence)
        assert proposed, sentence
        for changes in proposed:
            assert helps(arch, asked, sentence, changes), f"{changes} does not help: {sentence}"
            if len(changes) == 1:
                ((name, value),) = changes.items()
                low, high = sorted((value, getattr(asked, name)))
                for n in range(low + 1, high):
                    nearer = {name: n}
                    assert not helps(arch, asked, sentence, nearer), f"{nearer}: {sentence}"


def helps(arch: Architecture, asked: Sizes, sentence: str, changes: dict[str, int]) -> bool:
    """Whether an obstacle is gone with `changes`, and with another --tp-size the others, too."""
    before = {topic(each) for each in refusals(arch, asked)}
    after = {topic(each) for each in refusals(arch, replace(asked, **changes))}
    if "tp" in changes:
        return not after & {"attention", "experts"} and "nodes" not in after - before
    return topic(sentence) not in after


def topic(sentence: str) -> str:
    obstacle, _, _ = sentence.partition("; use ")
    for name, signs in {"attention": ("attention", "--attn"), "pp": ("--pp-size",)}.items():
        if any(sign in obstacle for sign in signs):
            return name
    return "nodes" if obstacle.startswith("--nnodes") else "experts"


def alternatives(sentence: str) -> list[dict[str, int]]:
    """The changes that a sentence proposes, one alternative an entry."""
    names = {option: name for name, option in OPTIONS.items()} | {REDUNDANT: "ep_redundant"}
    found = []
    _, _, remedy = sentence.partition("; use ")
    # Whole experts are proposed for their own sake, not as the nearest.
    for part in re.sub(r"(, or )?--ep-size \d+ for whole experts", "", remedy).split(", or "):
        settings = re.findall(r"(--[a-z-]+) (\d+)(?: or (\d+))?", part)
        if " with " in part:
            found.append({names[option]: int(n) for option, n, _ in settings})
        else:
            found += [{names[o]: int(n)} for o, *values in settings for n in values if n]
    return found


@pytest.mark.parametrize("width", [1536, 1000])
def test_whole_experts_fit_where_they_are_proposed(width: int) -> None:
    arch = replace(PUBLISHED, expert_width=width)
    tried = 0
    for tp in range(2, 65):
        for sentence in refusals(arch, Sizes(tp=tp)):
            if found := re.search(r"--ep-size (\d+) for whole experts", sentence):
                assert int(found[1]) == tp
                assert helps(arch, Sizes(tp=tp), sentence, {"ep": tp})
                tried += 1
    assert tried > 2 or width == 1536


def test_where_no_single_size_helps_three_are_named_together() -> None:
    (sentence,) = refusals(PUBLISHED, Sizes(tp=72, dp=9))
    assert sentence.endswith("use --tp-size 64 with --attn-dp-size 8 and --ep-size 1.")
    assert refusals(PUBLISHED, Sizes(tp=64, dp=8, ep=1)) == []


@pytest.mark.parametrize("name", [*OPTIONS, "ep_redundant"])
def test_no_ranks(name: str) -> None:
    option = OPTIONS.get(name, REDUNDANT)
    (sentence,) = refusals(PUBLISHED, Sizes(**{name: -1}))
    assert sentence.startswith(f"{option} -1 ")
    assert f"use {option} " in sentence


def test_enormous_sizes_are_answered_at_once() -> None:
    for asked in (Sizes(tp=10**9), Sizes(tp=10**9, dp=10**8), Sizes(tp=997, dp=997, ep=991)):
        assert refusals(PUBLISHED, asked)


# --- reading and printing ---


@given(cases())
@settings(max_examples=50, deadline=None)
def test_text_and_back(case: Case) -> None:
    assert Topology.parse(str(case.topology)) == case.topology


@pytest.mark.parametrize(
    "text", ["", "tp", "tp=", "tp=x", "tp=-1", "tp=1.5", "up=2", "tp=2,tp=2", "tp=2;dp=2", "tp=٣"]
)
def test_text_that_is_not_understood(text: str) -> None:
    with pytest.raises(TopologyError, match="is not understood") as caught:
        Topology.parse(text)
    assert "\n" not in str(caught.value)
    assert "tp=8,dp=2" in str(caught.value)


def test_a_topology_is_judged_without_an_architecture() -> None:
    for text, remedy in (
        ("tp=8,dp=3", "use --attn-dp-size 2 or 4, or --tp-size 6 or 9."),
        ("tp=8,ep=3", "use --ep-size 2 or 4, or --tp-size 6 or 9."),
        ("tp=8,nodes=3", "use --nnodes 2 or 4."),
        ("tp=0", "use --tp-size 1 or more."),
    ):
        with pytest.raises(TopologyError, match=re.escape(remedy)):
            Topology.parse(text)


def test_a_share_that_does_not_exist() -> None:
    with pytest.raises(TopologyError, match="use --attn-dp-size 3"):
        rank_share(PUBLISHED, Topology(tp=12), 0)
    with pytest.raises(TopologyError, match="world rank 8 does not exist in a group of 8"):
        rank_share(PUBLISHED, Topology(tp=8), 8)
    with pytest.raises(TopologyError, match="no group is called 'tepid'; there are tp, "):
        Topology().groups("tepid")


def test_a_partition_is_used() -> None:
    shares = rank_shares(PUBLISHED, Topology(pp=3), pp_partition=[20, 22, 20])
    assert [len(share.layers) for share in shares] == [20, 22, 20]


# --- counts ---


@given(cases())
@settings(max_examples=50, deadline=None)
def test_weights_of_all_ranks_are_the_model_and_its_copies(case: Case) -> None:
    arch, shares = replace(case.arch, tie_word_embeddings=False), case.shares()
    one = replace(case, arch=arch, topology=Topology(), redundant=0).shares()[0]
    replicated = case.topology.tp * arch.num_layers  # norms and router, on every rank of a stage
    hidden, dp = arch.hidden_size, case.topology.dp
    kv = shares[0].attention.kv_replicas
    q_width, kv_width = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    expected = (
        arch.num_layers * dp * (2 * hidden + 1) * q_width
        + arch.num_layers * dp * kv * (2 * hidden + 1) * kv_width
        + replicated * (2 * hidden + arch.num_experts * (hidden + 1))
        + arch.num_layers * (arch.num_experts + case.redundant) * 3 * arch.expert_width * hidden
        + arch.vocab_size * hidden * (dp + (dp if case.dp_lm_head else 1))
        + case.topology.tp * hidden
    )
    assert sum(parameter_count(arch, share) for share in shares) == expected
    assert parameter_count(arch, one) <= expected


def test_the_published_model_has_its_published_size() -> None:
    (whole,) = rank_shares(PUBLISHED, Topology())
    assert round(parameter_count(PUBLISHED, whole) / 1e9) == 229
    assert 2 * whole.kv_elements == 253952


def test_the_bundled_checkpoint_has_as_many_elements() -> None:
    from safetensors import safe_open

    from sglang_minimax import TINY_M2
    from sglang_minimax.cli.topology import architecture

    arch = architecture(TINY_M2)
    (whole,) = rank_shares(arch, Topology())
    with safe_open(str(TINY_M2 / "model.safetensors"), framework="np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    elements = 0
    for shape in shapes:
        size = 1
        for side in shape:
            size *= side
        elements += size
    assert parameter_count(arch, whole) == elements
