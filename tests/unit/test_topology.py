"""Rank arithmetic: exact, complete, without overlap, and the same as SGLang's."""

from __future__ import annotations

import ast
import doctest
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_minimax import shards, topology
from sglang_minimax.errors import TopologyError
from sglang_minimax.topology import (
    AttentionShard,
    attention_tp_refusal,
    ceil_div,
    exact_div,
    expert_cut,
    expert_range,
    expert_rows,
    layer_range,
    legal_attention_tp_sizes,
    moe_tp_size,
)

PUBLISHED_HEADS = (48, 8)


def shard(size: int, rank: int, heads: tuple[int, int] = PUBLISHED_HEADS) -> AttentionShard:
    return AttentionShard(size, rank, 128, *heads)


head_counts = st.tuples(st.integers(1, 12), st.integers(1, 12)).map(lambda t: (t[0] * t[1], t[1]))


def test_exact_div_names_both_numbers_and_what():
    assert exact_div(48, 16, "heads") == 3
    with pytest.raises(TopologyError, match=r"query heads.*48.*divisible by 5"):
        exact_div(48, 5, "query heads")
    with pytest.raises(TopologyError, match="0 parts"):
        exact_div(48, 0, "heads")


@given(st.integers(0, 10**6), st.integers(1, 10**4))
def test_ceil_div_covers_with_nothing_to_spare(total, part):
    parts = ceil_div(total, part)
    assert (parts - 1) * part < total <= parts * part or total == parts == 0


def test_legal_sizes_of_the_published_shape():
    assert legal_attention_tp_sizes(*PUBLISHED_HEADS) == (1, 2, 4, 8, 16, 24, 48)


@pytest.mark.parametrize(("size", "near"), [(3, "2 or 4"), (12, "8 or 16"), (32, "24 or 48")])
def test_an_illegal_size_names_the_nearest_legal_ones(size, near):
    assert f"the nearest sizes that do: {near}." in attention_tp_refusal(*PUBLISHED_HEADS, size)
    with pytest.raises(TopologyError, match=near):
        shard(size, 0)


def test_a_rank_outside_its_group_is_refused():
    for rank in (-1, 8):
        with pytest.raises(TopologyError, match="does not exist"):
            shard(8, rank)


@pytest.mark.parametrize(
    ("size", "q_heads", "kv_heads", "replicas"),
    [(1, 48, 8, 1), (2, 24, 4, 1), (8, 6, 1, 1), (16, 3, 1, 2), (24, 2, 1, 3), (48, 1, 1, 6)],
)
def test_published_shares(size, q_heads, kv_heads, replicas):
    part = shard(size, size - 1)
    assert (part.q_heads, part.kv_heads, part.kv_replicas) == (q_heads, kv_heads, replicas)
    assert part.q_divisor == 6144
    assert part.k_divisor == replicas * 1024


@given(head_counts)
def test_rows_cover_every_row_as_often_as_there_are_replicas(heads):
    for size in legal_attention_tp_sizes(*heads):
        parts = [shard(size, rank, heads) for rank in range(size)]
        assert [row for part in parts for row in part.q_rows] == list(range(parts[0].q_total))
        replicas = parts[0].kv_replicas
        held = [row for part in parts for row in part.kv_rows]
        assert sorted(held) == sorted(list(range(parts[0].kv_total)) * replicas)
        # The divisor is what the ranks' sums count, replicas and all.
        assert parts[0].k_divisor == len(held)
        assert parts[0].q_divisor == sum(len(part.q_rows) for part in parts)


@given(head_counts)
def test_each_query_head_sits_with_its_kv_head(heads):
    group = heads[0] // heads[1]
    for size in legal_attention_tp_sizes(*heads):
        for rank in range(size):
            part = shard(size, rank, heads)
            kv_heads = {row // 128 for row in part.kv_rows}
            assert {row // 128 // group for row in part.q_rows} <= kv_heads


@given(st.integers(1, 80), st.integers(1, 16))
def test_stages_cover_the_layers_in_order_and_evenly(layers, stages):
    if stages > layers:
        with pytest.raises(TopologyError, match=f"--pp-size {layers}"):
            layer_range(layers, stages, 0)
        return
    parts = [layer_range(layers, stages, rank) for rank in range(stages)]
    assert [layer for part in parts for layer in part] == list(range(layers))
    lengths = [len(part) for part in parts]
    assert lengths == sorted(lengths)
    assert lengths[-1] - lengths[0] <= 1


def test_a_named_partition_is_used_and_checked():
    assert layer_range(62, 3, 1, [20, 22, 20]) == range(20, 42)
    for wrong in ([20, 22], [20, 22, 21], [0, 42, 20]):
        with pytest.raises(TopologyError, match="add up to 62"):
            layer_range(62, 3, 1, wrong)
    assert layer_range(62, 1, 0, [1]) == range(62)


def test_stages_agree_with_sglang(monkeypatch):
    indices = pytest.importorskip("sglang.srt.distributed.utils").get_pp_indices
    monkeypatch.delenv("SGLANG_PP_LAYER_PARTITION", raising=False)
    for layers in (1, 4, 61, 62, 80):
        for stages in range(1, min(layers, 9) + 1):
            for rank in range(stages):
                assert range(*indices(layers, rank, stages)) == layer_range(layers, stages, rank)
    monkeypatch.setenv("SGLANG_PP_LAYER_PARTITION", "20,22,20")
    assert range(*indices(62, 1, 3)) == layer_range(62, 3, 1, [20, 22, 20])


def test_expert_shares():
    assert expert_range(256, 8, 7) == range(224, 256)
    assert expert_rows(1536, 4, 1) == range(384, 768)
    assert moe_tp_size(16, 8) == 2
    with pytest.raises(TopologyError, match="experts over EP"):
        expert_range(256, 3, 0)
    with pytest.raises(TopologyError, match="1536 is not divisible by 7"):
        expert_rows(1536, 7, 0)


@given(st.integers(1, 3000), st.integers(1, 40), st.integers(2, 130))
def test_an_expert_in_blocks_is_dealt_whole_and_in_order(width, size, unit):
    cuts = [expert_cut(width, size, rank, unit) for rank in range(size)]
    assert [line for cut in cuts for line in cut.lines] == list(range(width))
    held = [ceil_div(len(cut.lines), unit) for cut in cuts]
    assert held == sorted(held, reverse=True)
    assert held[0] - held[-1] <= 1
    for rank, cut in enumerate(cuts):
        assert (cut.total, cut.width, cut.over) == (width, cuts[0].width, size * cut.width)
        assert cut.first == rank * cut.width
        assert len(cut.lines) <= cut.width
        assert cut.lines.start % unit == 0 or not cut.lines
    if size > 1:
        assert cuts[0].width % unit == 0
        assert cuts[0].width - len(cuts[0].lines) < unit


def test_a_padded_part_of_an_expert_says_so():
    assert not expert_cut(1536, 4, 3, 128).is_padded
    assert not expert_cut(1536, 12, 3, 128).is_padded
    assert expert_cut(1536, 8, 0, 128).is_padded
    assert expert_cut(1536, 24, 23, 128).lines == range(1536, 1536)
    assert expert_cut(1536, 24, 23, 128).width == 128


@pytest.mark.parametrize("module", [shards, topology], ids=lambda module: module.__name__)
def test_examples(module):
    done = doctest.testmod(module)
    assert done.attempted
    assert not done.failed


PACKAGE = Path(topology.__file__).parent
ROOMS = [PACKAGE / room for room in ("models", "layers", "loading")]
OF_A_RANK = re.compile(r"(^|_)(rank|ranks|tp|dp|ep|pp|cp|world)(_|$)|group_size")


def rank_arithmetic(source: str) -> list[str]:
    """The divisions and remainders in which a rank or the size of a group takes part."""
    found = []
    for node in ast.walk(ast.parse(source)):
        divides = isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv | ast.Mod)
        divides |= isinstance(node, ast.Call) and getattr(node.func, "id", "") == "divmod"
        names = {getattr(each, "attr", getattr(each, "id", "")) for each in ast.walk(node)}
        if divides and any(OF_A_RANK.search(name) for name in names):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_nobody_else_divides_by_a_number_of_ranks(room):
    for path in room.rglob("*.py"):
        assert rank_arithmetic(path.read_text()) == [], path


def test_a_division_elsewhere_would_show():
    assert rank_arithmetic("heads = arch.num_heads // parallel.attn_tp_size")
    assert rank_arithmetic("owner, _ = divmod(self.rank, replicas)")
    assert rank_arithmetic("half = data.shape[1] // 2") == []
