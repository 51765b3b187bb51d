"""Which lines of which matrix of `tiny()` a rank holds, by hand, and the comparison with the plan.

Nothing here asks our package how a tensor is cut: the lines are tables and plain divisions, and a
`Layout`, which each test module writes from the definition of its format, turns lines into slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sglang_minimax.config import Architecture
from sglang_minimax.loading.plan import plan_of_rank
from sglang_minimax.loading.planned import PlannedWeights, ReadOptions
from sglang_minimax.loading.shares import share_of
from sglang_minimax.topology import Topology
from tests.formats.base import EXPERTS, HIDDEN, LAYERS, VOCABULARY, WIDTH, Fixture, State

Lines = tuple[int, int]

TOPOLOGIES: Mapping[str, Topology] = {
    "tp1": Topology(),
    "tp2": Topology(tp=2),
    "tp4": Topology(tp=4),
    "ep2": Topology(tp=2, ep=2),
    "tp4ep2": Topology(tp=4, ep=2),
    "tp4ep4": Topology(tp=4, ep=4),
    "pp2": Topology(pp=2),
}

# Six blocks of 64 for so many ranks; the first ones take what is left over.
DEALT = {
    1: [(0, 384)],
    2: [(0, 192), (192, 384)],
    4: [(0, 128), (128, 256), (256, 320), (320, 384)],
}
DEALT_WIDTH = {1: 384, 2: 192, 4: 128}
STAGES = {1: [(0, 3)], 2: [(0, 1), (1, 3)]}


@dataclass(frozen=True)
class Held:
    """A rank's part of a matrix: lines of the checkpoint, and how many there are in memory."""

    rows: Lines
    columns: Lines
    height: int
    breadth: int


@dataclass(frozen=True)
class Layout:
    """A format, by hand.

    cuts: kind -> the part of a stored tensor that belongs to (rows, columns) of the matrix.
    dequantise: a rank's tensors by kind -> its matrix. blocks: whether experts are dealt in blocks
    of 64 lines, else they are cut evenly.
    """

    cuts: Mapping[str, Callable[[torch.Tensor, Lines, Lines], torch.Tensor]]
    dequantise: Callable[[State], torch.Tensor]
    blocks: bool


def even(total: int, size: int, rank: int) -> Lines:
    """The part of one of `size` equal ranks."""
    assert total % size == 0
    return rank * (total // size), (rank + 1) * (total // size)


def _part(rows: Lines, columns: Lines) -> Held:
    return Held(rows, columns, rows[1] - rows[0], columns[1] - columns[0])


def matrices(topology: Topology, rank: int, blocks: bool) -> dict[str, Held]:
    """Every quantised module of a rank, and its part."""
    pp_rank, tp_rank = divmod(rank, topology.tp)
    moe_tp = topology.tp // topology.ep
    ep_rank, moe_rank = divmod(tp_rank, moe_tp)
    all_of = (0, HIDDEN)
    q, kv = even(512, topology.tp, tp_rank), even(256, topology.tp, tp_rank)
    width = DEALT[moe_tp][moe_rank] if blocks else even(WIDTH, moe_tp, moe_rank)
    room = DEALT_WIDTH[moe_tp] if blocks else WIDTH // moe_tp
    held = {}
    for layer in range(*STAGES[topology.pp][pp_rank]):
        path = f"model.layers.{layer}"
        held[f"{path}.self_attn.q_proj"] = _part(q, all_of)
        held[f"{path}.self_attn.k_proj"] = _part(kv, all_of)
        held[f"{path}.self_attn.v_proj"] = _part(kv, all_of)
        held[f"{path}.self_attn.o_proj"] = _part(all_of, q)
        for expert in range(*even(EXPERTS, topology.ep, ep_rank)):
            experts = f"{path}.block_sparse_moe.experts.{expert}"
            held[f"{experts}.w1"] = held[f"{experts}.w3"] = Held(width, all_of, room, HIDDEN)
            held[f"{experts}.w2"] = Held(all_of, width, HIDDEN, room)
    return held


def plain(topology: Topology, rank: int) -> dict[str, Lines]:
    """Every tensor of a rank that is not quantised, and its rows."""
    pp_rank, tp_rank = divmod(rank, topology.tp)
    q, kv = even(512, topology.tp, tp_rank), even(256, topology.tp, tp_rank)
    vocabulary = even(VOCABULARY, topology.tp, tp_rank)
    held: dict[str, Lines] = {}
    if pp_rank == 0:
        held["model.embed_tokens.weight"] = vocabulary
    for layer in range(*STAGES[topology.pp][pp_rank]):
        path = f"model.layers.{layer}"
        held[f"{path}.input_layernorm.weight"] = (0, HIDDEN)
        held[f"{path}.post_attention_layernorm.weight"] = (0, HIDDEN)
        held[f"{path}.self_attn.q_norm.weight"] = q
        held[f"{path}.self_attn.k_norm.weight"] = kv
        held[f"{path}.block_sparse_moe.gate.weight"] = (0, EXPERTS)
        held[f"{path}.block_sparse_moe.e_score_correction_bias"] = (0, EXPERTS)
    if pp_rank == topology.pp - 1:
        held["model.norm.weight"] = (0, HIDDEN)
        held["lm_head.weight"] = vocabulary
    return held


def expected(
    fixture: Fixture, layout: Layout, topology: Topology, rank: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """(tensor, this rank's part of it), all of them."""
    for module, part in matrices(topology, rank, layout.blocks).items():
        for kind, cut in layout.cuts.items():
            name = f"{module}.{kind}"
            yield name, cut(fixture.tensors[name], part.rows, part.columns)
    for name, (start, stop) in plain(topology, rank).items():
        yield name, fixture.tensors[name][start:stop]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors agree in every bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return (
        one.contiguous()
        .reshape(-1)
        .view(torch.uint8)
        .equal(other.contiguous().reshape(-1).view(torch.uint8))
    )


def check(
    fixture: Fixture, folder: Path, layout: Layout, topology: Topology, arch: Architecture
) -> None:
    """AssertionError unless the plans of all ranks are what the tables and the layout say."""
    files = [folder / "model.safetensors"]
    counts = {name: torch.zeros(value.shape) for name, value in fixture.tensors.items()}
    for rank in range(topology.world_size):
        plan = plan_of_rank(files, arch, topology, rank)
        assert not plan.problems, plan.problems
        shares: State = {}
        wanted = dict(expected(fixture, layout, topology, rank))
        for read, held in PlannedWeights(plan, ReadOptions(threads=1)).pieces():
            assert read.name not in shares, read.name
            assert same(held, wanted[read.name]), (rank, read.name)
            shares[read.name] = share_of(read.placement, held.clone(), read.name).held
            box = read.placement.box
            counts[read.name][tuple(slice(r.start, r.stop) for r in box)] += 1
        assert shares.keys() == wanted.keys(), (rank, shares.keys() ^ wanted.keys())
        for module, part in matrices(topology, rank, layout.blocks).items():
            kinds = {kind: shares[f"{module}.{kind}"] for kind in layout.cuts}
            matrix = layout.dequantise(kinds)
            assert matrix.shape == (part.height, part.breadth), (rank, module, matrix.shape)
            truth = torch.zeros(part.height, part.breadth)
            (top, bottom), (left, right) = part.rows, part.columns
            whole = fixture.dequantised[f"{module}.weight"]
            truth[: bottom - top, : right - left] = whole[top:bottom, left:right]
            assert torch.equal(matrix, truth), (rank, module)
    _check_counts(counts, topology)


def check_all(
    fixture: Fixture,
    folder: Path,
    layout: Layout,
    topologies: Iterable[Topology],
    arch: Architecture,
) -> None:
    """`check` of each topology in turn."""
    for topology in topologies:
        check(fixture, folder, layout, topology, arch)


def _check_counts(counts: State, topology: Topology) -> None:
    """Weights are held once, what all ranks need by all, and scales once for each rank in need."""
    moe_tp = topology.tp // topology.ep
    whole = ("layernorm.weight", "model.norm.weight", ".gate.weight", "correction_bias")
    for name, count in counts.items():
        often = count.unique().tolist()
        assert len(often) == 1, (name, often)
        if name.endswith(whole):
            assert often == [topology.tp], (name, often)
        elif name.endswith((".weight", ".weight_packed")):
            assert often == [1], (name, often)
        else:
            assert often[0] in (1, moe_tp if ".experts." in name else topology.tp), (name, often)
    assert len(counts) > 3 * LAYERS * EXPERTS


def rows_and_columns(high: int, wide: int) -> Callable[[torch.Tensor, Lines, Lines], torch.Tensor]:
    """The cut of a tensor of which an element covers high x wide elements of the matrix."""

    def cut(tensor: torch.Tensor, rows: Lines, columns: Lines) -> torch.Tensor:
        top, bottom = rows[0] // high, -(-rows[1] // high)
        left, right = columns[0] // wide, -(-columns[1] // wide)
        return tensor[top:bottom, left:right]

    return cut


def all_of_it(tensor: torch.Tensor, rows: Lines, columns: Lines) -> torch.Tensor:
    """The cut of a tensor that every rank keeps whole."""
    return tensor


def rows_only(tensor: torch.Tensor, rows: Lines, columns: Lines) -> torch.Tensor:
    """The cut of a tensor with one line a row."""
    return tensor[rows[0] : rows[1]]


def columns_only(tensor: torch.Tensor, rows: Lines, columns: Lines) -> torch.Tensor:
    """The cut of a vector with one element a column."""
    return tensor[columns[0] : columns[1]]
