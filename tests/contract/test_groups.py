"""Our groups, ranks and bounds against those that SGLang itself constructs, without processes.

SGLang's own `initialize_model_parallel` runs; only the last step, which would open communicators,
is replaced by a recorder of the rank lists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt import runtime_context
from sglang.srt.distributed import parallel_state
from sglang.srt.entrypoints import engine
from sglang.srt.layers.dp_attention import compute_dp_attention_world_info
from sglang.srt.layers.linear import QKVParallelLinear
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

from sglang_minimax.config import Architecture
from sglang_minimax.errors import TopologyError
from sglang_minimax.layers.cut import check_layers, check_vocabulary
from sglang_minimax.topology import (
    AttentionShard,
    Topology,
    vocabulary_rows,
    vocabulary_rows_in_memory,
)

TOPOLOGIES = [
    Topology.parse(text)
    for text in (
        "tp=1",
        "tp=2,nodes=2",
        "pp=4,nodes=2",
        "tp=4,dp=2",
        "tp=4,dp=2,ep=2,pp=2",
        "tp=4,dp=4,ep=4",
        "tp=8,ep=2,nodes=2",
        "tp=8,dp=2,ep=4,pp=3",
        "tp=8,dp=8,ep=1,pp=2,nodes=4",
        "tp=16,dp=2,ep=16",
        "tp=16,ep=4,pp=2,nodes=8",
        "tp=24,dp=3,ep=8",
        "tp=72,dp=9,ep=72,nodes=18",
        "tp=72,dp=3,ep=8,pp=2,nodes=2",
    )
]
BUILT = ("tp", "attention_tp", "moe_ep", "moe_tp", "pp")
SGLANG_NAMES = {"attention_tp": "_ATTN_TP", "moe_ep": "_MOE_EP", "moe_tp": "_MOE_TP"}
GLOBALS = ("_TP", "_DCP", "_ATTN_CP", "_ATTN_TP", "_SHARED_EXPERTS_TP", "_MOE_DP", "_MOE_EP")
GLOBALS += ("_MOE_TP", "_PP", "_SELF_PP", "_PDMUX_PREFILL_TP_GROUP")

Groups = dict[str, list[list[int]]]


@contextlib.contextmanager
def sizes_published(topology: Topology, **more: Any) -> Iterator[Any]:
    parallel = runtime_context.get_parallel()
    with parallel.override(
        tp_size=topology.tp,
        attn_dp_size=topology.dp,
        moe_ep_size=topology.ep,
        pp_size=topology.pp,
        nnodes=topology.nodes,
        attn_cp_size=1,
        moe_dp_size=1,
        attn_dcp_size=1,
        shared_experts_tp_size=None,
        **more,
    ):
        yield parallel


def groups_of_sglang(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> Groups:
    """Every group of each kind as SGLang would create it."""

    def recorder(group_ranks: list[list[int]], *_: Any, **__: Any) -> Any:
        return SimpleNamespace(group_ranks=group_ranks, rank_in_group=0, pynccl_comm=None)

    with monkeypatch.context() as patch:
        for name in GLOBALS:
            patch.setattr(parallel_state, name, None)
        patch.setattr(parallel_state, "init_model_parallel_group", recorder)
        patch.setattr(runtime_context.ParallelContext, "override_permanently", lambda *_, **__: 0)
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: topology.world_size)
        world = SimpleNamespace(local_rank=0, device_group=None)
        with sizes_published(topology, world_group=world):
            parallel_state.initialize_model_parallel("gloo")
        return {
            kind: getattr(parallel_state, SGLANG_NAMES.get(kind, f"_{kind.upper()}")).group_ranks
            for kind in BUILT
        }


def agrees(topology: Topology, theirs: Groups, ours: Callable[[str], Any]) -> bool:
    return all([tuple(group) for group in theirs[kind]] == list(ours(kind)) for kind in BUILT)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_groups(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    assert agrees(topology, groups_of_sglang(topology, monkeypatch), topology.groups)


def strided_attention(topology: Topology) -> Groups:
    """Every dp-th rank in one attention group, instead of neighbours."""
    stages = [range(s * topology.tp, (s + 1) * topology.tp) for s in range(topology.pp)]
    return {
        "attention_tp": [stage[d :: topology.dp] for stage in stages for d in range(topology.dp)]
    }


def neighbouring_experts(topology: Topology) -> Groups:
    """EP as the inner dimension and MoE-TP as the outer one."""
    ep, world = topology.ep, topology.world_size
    return {"moe_ep": [range(start, start + ep) for start in range(0, world, ep)]}


def inner_stages(topology: Topology) -> Groups:
    """Neighbouring ranks on consecutive stages."""
    pp, world = topology.pp, topology.world_size
    return {"pp": [range(start, start + pp) for start in range(0, world, pp)]}


@pytest.mark.parametrize("mutant", [strided_attention, neighbouring_experts, inner_stages])
def test_a_plausible_other_layout_is_noticed(
    mutant: Callable[[Topology], Groups], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ours(topology: Topology) -> Callable[[str], Any]:
        wrong = mutant(topology)
        return lambda kind: [tuple(g) for g in wrong.get(kind, topology.groups(kind))]

    assert not all(
        agrees(topology, groups_of_sglang(topology, monkeypatch), ours(topology))
        for topology in TOPOLOGIES
    )


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_coordinates(topology: Topology) -> None:
    for rank in range(topology.world_size):
        place = topology.coordinates(rank)
        theirs = runtime_context.derive_spawn_ranks(
            world_rank=rank,
            tp_size=topology.tp,
            ep_join_rank_offset=0,
            attn_cp_size=1,
            attn_tp_size=topology.attention_tp,
            moe_dp_size=1,
            moe_ep_size=topology.ep,
        )
        for name in ("tp_rank", "pp_rank", "moe_ep_rank", "moe_tp_rank"):
            assert getattr(place, name) == theirs[name], name
        assert compute_dp_attention_world_info(place.tp_rank, topology.tp, topology.dp) == (
            place.attention_tp_rank,
            topology.attention_tp,
            place.attention_dp_rank,
            topology.dp,
        )


def ranks_started(topology: Topology) -> list[tuple[int, int]]:
    """(node, rank) of every process that SGLang's launchers start on all nodes together."""
    with sizes_published(topology):
        ranges = [engine._calculate_rank_ranges(node) for node in range(topology.nodes)]
    return [
        (node, stage * topology.tp + tp_rank)
        for node, (stages, tp_ranks, *_) in enumerate(ranges)
        for stage in stages
        for tp_rank in tp_ranks
    ]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_nodes(topology: Topology) -> None:
    places = [topology.coordinates(rank) for rank in range(topology.world_size)]
    assert ranks_started(topology) == [(place.node, place.rank) for place in places]


def test_nodes_that_we_refuse_would_leave_ranks_unstarted() -> None:
    """SGLang accepts these, since the nodes divide the ranks, and then waits for ever."""
    sizes = SimpleNamespace(tp=2, dp=1, ep=1, pp=3, nodes=2)
    assert len(ranks_started(sizes)) < 6  # type: ignore[arg-type]
    with pytest.raises(TopologyError, match="use --nnodes 1 or 3"):
        Topology(tp=2, pp=3, nodes=2)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 16, 24, 64, 72, 144])
@pytest.mark.parametrize("vocabulary", [1, 64, 512, 1000, 200064])
def test_vocabulary(vocabulary: int, size: int) -> None:
    with runtime_context.get_parallel().override(
        tp_size=size, tp_rank=size - 1, tp_group=SimpleNamespace(world_size=size)
    ):
        table = VocabParallelEmbedding(vocabulary, 1)
    assert table.num_embeddings_per_partition == vocabulary_rows_in_memory(vocabulary, size)
    padded = table.num_embeddings_padded
    for rank in range(size):
        cut = table._get_indices(padded, padded, vocabulary, vocabulary, rank, size)
        rows = vocabulary_rows(vocabulary, size, rank)
        assert (rows.start, rows.stop) == (cut.org_vocab_start_index, cut.org_vocab_end_index)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 24, 48])
def test_attention(size: int) -> None:
    """The rows that SGLang's packed projection copies out of full q, k and v weights."""
    arch = Architecture.from_config({"head_dim": 4})
    for rank in range(size):
        group = SimpleNamespace(world_size=size, rank_in_group=rank)
        with runtime_context.get_parallel().override(
            attn_tp_size=size, attn_tp_rank=rank, attn_tp_group=group, tp_size=size, tp_rank=rank
        ):
            packed = QKVParallelLinear(1, 4, 48, 8, bias=False, parallel_group="attn_tp")
        shard, start = AttentionShard.of(arch, size, rank), 0
        for part, rows, total in (
            ("q", shard.q_rows, shard.q_total),
            ("k", shard.kv_rows, shard.kv_total),
            ("v", shard.kv_rows, shard.kv_total),
        ):
            full = torch.arange(total, dtype=packed.weight.dtype).unsqueeze(1)
            packed.weight.weight_loader(packed.weight, full, part)
            mine = packed.weight[start : start + len(rows), 0]
            assert mine.tolist() == list(rows), (part, rank)
            start += len(rows)
        assert start == packed.weight.shape[0]


def test_a_table_that_sglang_cuts_otherwise_ends_the_start() -> None:
    arch = Architecture.from_config({"vocab_size": 1000})
    with runtime_context.get_parallel().override(
        tp_size=3, tp_rank=1, tp_group=SimpleNamespace(world_size=3)
    ):
        check_vocabulary(arch, "head", VocabParallelEmbedding(1000, 1))
        check_vocabulary(arch, "head", torch.nn.Identity())  # another stage has it
        with pytest.raises(
            TopologyError, match="rows of the head from 704 to 1408, but 384 to 768"
        ):
            check_vocabulary(arch, "head", VocabParallelEmbedding(2000, 1))


def test_a_stage_that_sglang_cuts_otherwise_ends_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arch = Architecture.from_config({})
    group = SimpleNamespace(world_size=3, rank_in_group=1)
    with runtime_context.get_parallel().override(pp_group=group):
        monkeypatch.delenv("SGLANG_PP_LAYER_PARTITION", raising=False)
        check_layers(arch, range(20, 41))
        monkeypatch.setenv("SGLANG_PP_LAYER_PARTITION", "20,22,20")
        check_layers(arch, range(20, 42))
        with pytest.raises(TopologyError, match="stage 1 from 20 to 41, but 20 to 42"):
            check_layers(arch, range(20, 41))
