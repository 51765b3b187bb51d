"""The benchmark of the experts' communication: its arithmetic, its model, and what it says of both.

No engine runs here, and nothing is timed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    bench_moe_comm,
    common,
    links,
    moe_comm_cases,
    moe_comm_engines,
    moe_comm_gloo,
    moe_comm_plot,
    moe_comm_table,
)
from benchmarks.moe_comm_cases import (
    CHECKPOINTS,
    FP4,
    IN_TREE,
    LOADS,
    OPT_IN,
    OURS,
    SMALL,
    TOPOLOGIES,
    Load,
    Row,
)
from sglang_minimax.config import Architecture
from sglang_minimax.moe_exchange.moves import Batch, Move, moves
from sglang_minimax.moe_exchange.paths import FORCEABLE, SGLANG
from sglang_minimax.moe_exchange.payload import Payload
from sglang_minimax.moe_exchange.plan import plan_for
from sglang_minimax.support import Launch
from sglang_minimax.topology import RankShare, Topology, rank_shares
from sglang_minimax.validation import ledger
from sglang_minimax.validation.observations import Collective, Forward, RankRecord
from sglang_minimax.validation.shapes import catalogue
from tests.formats.nvfp4 import FIXTURES as nvfp4_checkpoints

ROOT = Path(__file__).parents[2]
QUANTISED = "quantization_config"
DECODE, LOPSIDED, EAGER, PREFILL = LOADS
DP8 = Topology(tp=8, dp=8, ep=8)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return moe_comm_cases.rows()


def find(rows: list[Row], **wanted: str) -> Row:
    """The one row with these values."""
    (found,) = (row for row in rows if wanted.items() <= row.items())
    return found


def bytes_of(row: Row) -> dict[str, float]:
    return row["bytes_a_token_a_layer"]


def test_the_shape_is_the_published_one() -> None:
    arch = Architecture.from_config(
        json.loads((ROOT / "tests/data/published_config.json").read_text())
    )
    assert (arch.hidden_size, arch.top_k, arch.num_layers, arch.expert_width) == (
        moe_comm_cases.HIDDEN,
        moe_comm_cases.TOP_K,
        moe_comm_cases.LAYERS,
        moe_comm_cases.EXPERT_WIDTH,
    )
    assert arch.expert_unit == moe_comm_cases.BLOCK


def test_our_ways_are_those_that_the_plan_takes() -> None:
    published = json.loads((ROOT / "tests/data/published_config.json").read_text())
    plain = {key: value for key, value in published.items() if key != "quantization_config"}
    nvfp4 = plain | {"quantization_config": nvfp4_checkpoints["nvfp4"]().config[QUANTISED]}
    for checkpoint, config, capability in (
        ("BF16", plain, 90),
        ("FP8", published, 90),
        ("NVFP4", nvfp4, 100),
    ):
        arch = Architecture.from_config(config)
        for topology in TOPOLOGIES.values():
            launch = Launch(**dataclasses.asdict(topology), hardware="cuda", capability=capability)
            path = plan_for(arch, launch).path
            assert path == moe_comm_cases.ours_for(topology, checkpoint), (checkpoint, topology)


# --- batches ---


def test_a_decode_is_padded_as_far_as_sglang_pads_one() -> None:
    """Twice its tokens is the most for which get_dp_padding_mode takes MAX_LEN."""
    for topology in TOPOLOGIES.values():
        if topology.dp == 1:
            continue
        tokens = EAGER.tokens(topology)
        assert 2 * sum(tokens) == max(tokens) * topology.dp, topology
        assert min(tokens) > 0
        assert all(each % topology.attention_tp == 0 for each in tokens)
        assert EAGER.batch(topology).rows == 2 * sum(tokens)


def test_a_graph_has_the_longest_groups_rows_in_either_mode() -> None:
    longest = max(LOPSIDED.tokens(DP8))
    for padding in (None, moe_comm_cases.SUM_LEN):
        assert LOPSIDED.batch(DP8, padding).groups == (longest,) * 8
    assert EAGER.batch(DP8, moe_comm_cases.SUM_LEN).groups == EAGER.tokens(DP8)


def test_rows_come_in_multiples_of_attention_tp() -> None:
    odd = Load("odd", moe_comm_cases.SUM_LEN, lambda _: (1, 2, 3, 0))
    assert odd.batch(Topology(tp=8, dp=4)).groups == (2, 2, 4, 0)
    assert odd.batch(Topology(tp=8, dp=4), moe_comm_cases.MAX_LEN).groups == (4, 4, 4, 4)


def test_one_all_reduce_needs_one_node_a_decode_and_no_idle_group() -> None:
    assert moe_comm_cases.small_decode(DP8, DECODE)
    assert not moe_comm_cases.small_decode(TOPOLOGIES["EP16, two nodes"], DECODE)
    assert not moe_comm_cases.small_decode(TOPOLOGIES["TP8"], DECODE)
    assert not moe_comm_cases.small_decode(DP8, PREFILL)

    def decode(*tokens: int) -> Load:
        return Load("decode", moe_comm_cases.MAX_LEN, lambda _: tokens, graph=True)

    assert not moe_comm_cases.small_decode(DP8, decode(0, *[16] * 7))
    # 16 MB are 2730 rows of 6144 bytes.
    assert moe_comm_cases.small_decode(DP8, decode(*[341] * 8))
    assert not moe_comm_cases.small_decode(DP8, decode(*[342] * 8))


# --- bytes ---


def test_bytes_by_hand(rows: list[Row]) -> None:
    """DP8 EP8, each token's row of 6144 bytes: seven of eight parts come from other ranks."""
    found = {
        row["way"] + row["path"]: bytes_of(row)
        for row in rows
        if (row["topology"], row["load"]) == ("DP8 EP8", "prefill")
    }
    away = 7 / 8
    gathers = {
        "in-treesglang": 2 * 6144,
        "oursgather": 6144 + 64,
        "in-tree, opt-in FP8opt-in": 3072 + 24 * 4,
        "oursgather-fp8": 3072 + 24 * 4 + 64,
        "in-tree, FP4 all-gatherFP4 all-gather": 1536 + 192 + 64,
        "oursgather-fp4": 1536 + 192 + 64,
    }
    assert {name: each["gather"] for name, each in found.items()} == pytest.approx(
        {name: away * size for name, size in gathers.items()}
    )
    for each in found.values():
        assert each["combine"] == pytest.approx(away * 6144)
        assert each["total"] == pytest.approx(each["gather"] + each["combine"])


def test_attention_has_its_own_part() -> None:
    """An attention-TP pair sums halves of its group's rows, a quarter of all, and gathers them."""
    topology = TOPOLOGIES["DP4 x TP2 EP8"]
    rows = moe_comm_cases.rows()
    for way in (IN_TREE, OURS):
        row = find(rows, topology="DP4 x TP2 EP8", checkpoint="FP8", load="decode", way=way)
        assert bytes_of(row)["attention"] == pytest.approx(2 * (1 / 2) * 6144 / 4)
        assert row["collectives"] == 4
    both = moves(topology, SGLANG, moe_comm_cases.payload_of(SGLANG), Batch((8,) * 4, "SUM_LEN"), 0)
    split = moe_comm_cases.parts(topology, both)
    assert split["attention"] == 0, "the all-reduce that gathers also sums attention's outputs"
    assert split["gather"] == split["combine"] > 0


def test_without_attention_dp_ours_is_sglangs(rows: list[Row]) -> None:
    for name in ("TP8", "TP16, two nodes"):
        for checkpoint in CHECKPOINTS:
            for load in ("decode", "prefill"):
                pair = [
                    find(rows, topology=name, checkpoint=checkpoint, load=load, way=way)
                    for way in (IN_TREE, OURS)
                ]
                assert bytes_of(pair[0]) == bytes_of(pair[1])
                assert pair[1]["path"] == "sglang"


def test_a_mean_is_over_all_groups() -> None:
    """The first group of the ramp has no tokens: its own attention moves nothing."""
    topology = TOPOLOGIES["DP4 x TP2 EP8"]
    way = next(way for way in moe_comm_cases.ways(topology, "BF16", PREFILL) if way.name == OURS)
    assert way.moves(0)[0].whole == 0 < way.moves(3)[0].whole
    row = moe_comm_cases.row("x", topology, "BF16", PREFILL, way)
    assert bytes_of(row)["attention"] == pytest.approx(2 * (1 / 2) * 6144 / 4)


def test_the_opt_in_needs_attention_tp_1_and_sum_len(rows: list[Row]) -> None:
    there = {(row["topology"], row["load"]) for row in rows if row["way"] == OPT_IN}
    assert {name for name, _ in there} == {"DP8 EP8", "DP8 without EP", "EP16, two nodes"}
    assert ("EP16, two nodes", "prefill") in there
    assert ("EP16, two nodes", "decode") not in there, "no custom all-reduce over two nodes"
    assert {row["checkpoint"] for row in rows if row["way"] == OPT_IN} == {"FP8"}


def test_the_opt_in_leaves_the_way_back_as_it_is(rows: list[Row]) -> None:
    ends = {
        row["topology"]: row["operations"]
        for row in rows
        if (row["way"], row["load"]) == (OPT_IN, "prefill")
    }
    gathers = ["all_gatherv", "all_gatherv"]
    assert ends["DP8 EP8"] == [*gathers, "reduce_scatterv"]
    assert ends["DP8 without EP"] == [*gathers, "all_reduce"]


def test_sglangs_fp4_gather_is_one_call(rows: list[Row]) -> None:
    found = [row for row in rows if row["way"] == FP4]
    assert {row["topology"] for row in found} == {"DP8 EP8", "EP16, two nodes"}
    assert all(row["operations"] == ["all_gatherv", "reduce_scatterv"] for row in found)
    payload = Payload(CHECKPOINTS["NVFP4"], 3072, 8)
    batch = Batch((5,) * 8, "MAX_LEN")
    apart = moves(DP8, SGLANG, payload, batch, 0)
    together = moe_comm_cases.fp4_moves(DP8, batch, 0)
    assert sum(move.given for move in apart) == sum(move.given for move in together)
    assert sum(move.received(DP8) for move in apart) == sum(move.received(DP8) for move in together)


def test_in_tree_refuses_blocks_that_are_cut(rows: list[Row]) -> None:
    refused = {row["topology"] for row in rows if row["refused_in_tree"]}
    assert refused == {"TP8", "TP16, two nodes", "DP8 without EP"}
    assert {row["checkpoint"] for row in rows if row["refused_in_tree"]} == {"FP8"}
    assert not any(row["refused_in_tree"] for row in rows if row["way"] == OURS)


# --- the aims ---


def test_the_gather_is_within_its_aim(rows: list[Row]) -> None:
    said = moe_comm_table.gather_share(rows)
    assert said.startswith("met: ")
    assert said.endswith("26.3 to 52.6 %"), "3232 of 6144 bytes, and of twice as many"


def test_an_aim_can_be_missed(rows: list[Row]) -> None:
    plain = [row | {"path": "gather-fp8"} if row["path"] == "gather" else row for row in rows]
    assert moe_comm_table.gather_share(plain).startswith("NOT MET: ")
    assert moe_comm_table.gather_share([]).startswith("not computed: ")


def test_where_ours_moves_more_than_in_tree(rows: list[Row]) -> None:
    """Two causes: ids and weights with bf16 rows, and a decode that is padded without a graph."""
    found = moe_comm_table.excesses(rows)
    assert {(each["load"], each["path"]) for each in found} == {
        ("decode", "gather"),
        ("lopsided decode", "gather"),
        (EAGER.name, "gather"),
        (EAGER.name, "gather-fp8"),
        (EAGER.name, "gather-fp4"),
    }
    for each in found:
        if each["load"] != EAGER.name:
            assert each["more"] < 0.0053, "64 bytes of the 12,288 of a row both ways"
    padded = [each for each in found if each["load"] == EAGER.name]
    assert max(each["more"] for each in padded) == pytest.approx(1.0), "half of its rows"
    said = moe_comm_table.no_more_bytes(rows)
    assert said.startswith("NOT MET: at no topology more bytes than in-tree: ")
    assert "decode, gather: up to 0.5 % more than in-tree" in said


def test_no_excess_is_met(rows: list[Row]) -> None:
    quantised = [row for row in rows if row["checkpoint"] != "BF16" and row["load"] != EAGER.name]
    assert moe_comm_table.no_more_bytes(quantised).startswith("met: ")


def test_in_tree_is_taken_at_its_best(rows: list[Row]) -> None:
    for launch in moe_comm_table.launches(rows):
        names = [each["way"] for each in moe_comm_table.references(launch)]
        assert names == ([FP4] if FP4 in launch else [n for n in (IN_TREE, SMALL) if n in launch])
        assert OPT_IN not in names, "not a default"


# --- the model of links ---


def test_the_model_is_near_what_others_measured() -> None:
    """NCCL within a quarter; SGLang's own all-reduce of 2025 at the slow end of its range."""
    for each in links.PUBLISHED:
        low, high = each.model
        assert low <= high
        assert 0.7 * each.microseconds < high < 1.25 * each.microseconds, each
        if each.source == links.CUSTOM_TIMES:
            assert low < 1.05 * each.microseconds, each


def test_more_bytes_and_more_ranks_take_longer() -> None:
    for operation in links.RECEIVED:
        if operation == "all_to_all_single":
            continue
        for nodes in (1, 2):
            times = [links.nccl(operation, size, 16, nodes) for size in (0, 10**4, 10**6, 10**8)]
            assert times == sorted(set(times)), operation
        assert links.nccl(operation, 10**6, 4) < links.nccl(operation, 10**6, 8)
        assert links.nccl(operation, 10**6, 16) < links.nccl(operation, 10**6, 16, 2)


def test_large_collectives_run_at_the_links_speed() -> None:
    size = 10**10
    ring = 7 / 8 * size / links.NVLINK
    assert links.nccl("all_gather_into_tensor", size, 8) == pytest.approx(ring, rel=0.01)
    assert links.nccl("all_reduce", size, 8) == pytest.approx(2 * ring, rel=0.01)
    # Eight adapters of a node together carry a little more than one GPU's NVLink.
    assert links.bandwidth(2, 16) == min(links.NVLINK, 8 * links.INFINIBAND)
    assert links.bandwidth(2, 2) == links.INFINIBAND


def test_sglangs_own_all_reduce_is_for_one_node_and_some_sizes() -> None:
    low, high = links.collective("all_reduce", 10**6, 8)
    assert low < high
    for whole, nodes in ((links.CUSTOM_MOST + 1, 1), (10**6, 2)):
        low, high = links.collective("all_reduce", whole, 8 * nodes, nodes)
        assert low == high == links.nccl("all_reduce", whole, 8 * nodes, nodes)


def test_groups_know_their_nodes() -> None:
    wide = TOPOLOGIES["EP16, two nodes"]
    assert links.nodes_of(wide, "tp") == 2
    assert links.nodes_of(Topology(tp=16, dp=8, nodes=2), "attention_tp") == 1
    near = links.expected(Topology(tp=16), [Move("experts", "all_gatherv", "tp", 1, 10**6)])
    far = links.expected(wide, [Move("experts", "all_gatherv", "tp", 1, 10**6)])
    assert near < far


def test_collectives_add_up() -> None:
    move = Move("boundary", "all_reduce", "tp", 10**5, 10**5)
    once, twice = (links.expected(Topology(tp=8), [move] * n) for n in (1, 2))
    assert twice == pytest.approx([2 * each for each in once])


# --- the counts ---

PAYLOAD = Payload(SGLANG.rows, 128, 3, 4)
PAIR = Topology(tp=2, dp=2, ep=2)
LAYERS = range(4)


def record(
    rank: int, tokens: tuple[int, ...], made: list[Move], path: str = "gather"
) -> RankRecord:
    """A rank that ran one decode with the given moves in each layer."""
    forward = Forward(
        began=0.0,
        mode="DECODE" if tokens[rank] else "IDLE",
        tokens=tokens[rank],
        rows=tokens[rank],
        groups=tokens,
        captured=(),
        padding="SUM_LEN",
        mixed=0,
        sizes=(),
        collectives=(
            *(
                Collective(move.site, move.operation, (0, 1), len(LAYERS), len(LAYERS) * move.given)
                for move in made
            ),
            Collective("qk_norm", "all_reduce", (0, 1), 3, 24),
            Collective("model", "all_gather", (0, 1), 1, 99),
        ),
    )
    return RankRecord(rank, {}, LAYERS, len(LAYERS), {}, path, (forward,))


EXCHANGE = ledger.Exchange(PAIR, FORCEABLE["gather"], PAYLOAD)


def compared(change: Callable[[list[Move]], list[Move]], path: str = "gather") -> Row:
    tokens = (3, 0)
    batch = Batch(tokens, "SUM_LEN")
    records = [
        record(rank, tokens, change(moves(PAIR, EXCHANGE.path, PAYLOAD, batch, rank)), path)
        for rank in (0, 1)
    ]
    return moe_comm_engines.summary(moe_comm_engines.compared(EXCHANGE, shares(), records))


def shares() -> tuple[RankShare, ...]:
    return rank_shares(Architecture.from_config(catalogue().config("kv4")), PAIR)


def test_counts_that_are_as_computed() -> None:
    found = compared(lambda made: made)
    assert (found["forwards"], found["equal"], found["first_difference"]) == (2, 2, None)
    # Three rows of 128 fp32 and three choices from one rank, and all of them to be summed on both.
    given = (3 * (512 + 24) + 2 * 3 * 512) / (2 * 3)
    assert found["kinds"] == {
        "decode SUM_LEN": {"collectives_a_layer": 2.0, "given_a_row_a_layer": given}
    }


def one_call_less(made: list[Move]) -> list[Move]:
    return made[:-1]


def bytes_of_another_rank(made: list[Move]) -> list[Move]:
    return [dataclasses.replace(made[0], given=made[0].given + 512), *made[1:]]


def an_all_reduce_and_a_slice(made: list[Move]) -> list[Move]:
    return [made[0], dataclasses.replace(made[1], operation="all_reduce")]


def at_the_boundary(made: list[Move]) -> list[Move]:
    return [dataclasses.replace(each, site="boundary") for each in made]


@pytest.mark.parametrize(
    "mistake", [one_call_less, bytes_of_another_rank, an_all_reduce_and_a_slice, at_the_boundary]
)
def test_counts_that_are_not_are_told(mistake: Callable[[list[Move]], list[Move]]) -> None:
    found = compared(mistake)
    assert found["equal"] == 0
    difference = found["first_difference"]
    assert difference["forward"] == "decode SUM_LEN, 3 rows"
    assert difference["found"] != difference["expected"]
    row = {"topology": "t", "checkpoint": "BF16", "way": OURS, "path": "gather"} | found
    assert moe_comm_table.counted_as_computed([row]).startswith("NOT SO: ")


def test_ranks_that_ran_unlike_forwards_are_an_error() -> None:
    alone = record(0, (3, 0), [])
    with pytest.raises(ValueError, match="1 of 2 ranks recorded"):
        moe_comm_engines.compared(EXCHANGE, shares(), [alone])


def test_ranks_that_took_another_path_are_an_error() -> None:
    with pytest.raises(ValueError, match="the ranks took sglang, not gather"):
        compared(lambda made: made, "sglang")


def test_what_is_said_of_the_counts() -> None:
    good: Row = {"topology": "t", "checkpoint": "BF16", "way": OURS, "path": "gather"}
    good |= {"forwards": 4, "equal": 4, "kinds": {}}
    ended = {key: good[key] for key in ("topology", "checkpoint", "way", "path")}
    ended |= {"ends": "RuntimeError: no"}
    said = moe_comm_table.counted_as_computed
    assert said([good]).startswith("so: ")
    assert said([good, ended]).startswith("NOT SO: ")
    assert said([]).startswith("not counted: ")
    assert moe_comm_table.engine_lines([ended])[0][4] == "ends: RuntimeError: no"


def test_the_small_fp8_checkpoint_is_in_whole_blocks() -> None:
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    state = {name: weight, "model.layers.0.block_sparse_moe.gate.weight": weight}
    found = dict(moe_comm_engines.in_blocks(state))
    assert found["model.layers.0.block_sparse_moe.gate.weight"] is weight
    scale = found[f"{name}_scale_inv"]
    assert found[name].dtype == torch.float8_e4m3fn
    assert scale.shape == (2, 1)
    back = found[name].float().view(2, 128, 1, 128) * scale[:, None, :, None]
    # Half a step of e4m3, whose steps are an eighth of a power of two.
    assert ((back.view(256, 128) - weight).abs() <= weight.abs() / 16 + scale.max() / 512).all()


# --- gloo, without timing ---


def test_gloo_carries_the_bytes_of_the_moves() -> None:
    """Every rank's tensors have the sizes that the moves say, also where shares differ."""
    made = moe_comm_gloo.plans(PREFILL, "FP8")
    assert set(made) == {IN_TREE, OPT_IN, OURS}
    for layer in made.values():
        assert layer.rows == (0, 256, 512, 768)
        for rank, own in enumerate(layer.moves):
            for move in own:
                call = moe_comm_gloo.prepared(move, layer.rows, rank)
                tensors = [cell.cell_contents for cell in call.__closure__ or ()]
                assert total_bytes(tensors) >= move.whole, move


def total_bytes(values: Any) -> int:
    if isinstance(values, torch.Tensor):
        return values.numel() * values.element_size()
    return sum(map(total_bytes, values)) if isinstance(values, list) else 0


# --- what it shows ---


def test_the_lines_of_a_table(rows: list[Row]) -> None:
    lines = moe_comm_table.lines(rows, "prefill")
    assert all(len(line) == len(moe_comm_table.HEAD) for line in lines)
    (line,) = (each for each in lines if each[:3] == ("DP8 EP8", "FP8", "ours: gather-fp8"))
    assert line[3:9] == ("2", "0", "2,828", "5,376", "8,204", "50.9 %")
    shared = [each for each in lines if each[0] == "DP8 EP8" and each[1] == "all"]
    assert [each[2] for each in shared] == [IN_TREE], "three checkpoints, one line"


def test_a_range_is_shown_as_one() -> None:
    assert moe_comm_table.microseconds([19.2, 54.8]) == "19 to 55"
    assert moe_comm_table.microseconds([33.4, 33.4]) == "33"


def test_the_plot_says_what_is_a_model(rows: list[Row], tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = moe_comm_plot.distinct(rows, "decode")
    assert len({moe_comm_plot.label(row) for row in shown}) == len(shown)
    _, axis = pyplot.subplots()
    moe_comm_plot.stacked(axis, shown)
    ends = [bar.get_extents().x1 for bar in axis.patches[-len(shown) :]]
    last, widest = ends[0], bytes_of(shown[0])["total"]
    start = axis.patches[0].get_extents().x0
    for end, row in zip(ends, shown, strict=True):
        assert (end - start) / (last - start) == pytest.approx(bytes_of(row)["total"] / widest)
    _, axis = pyplot.subplots()
    moe_comm_plot.modelled(axis, shown)
    assert {bar.get_hatch() for bar in axis.patches} == {"////"}
    assert "model" in axis.get_xlabel()
    assert "NOT MEASURED" in moe_comm_plot.MODEL
    pyplot.close("all")


def test_it_runs_and_writes_what_it_says(tmp_path: Path) -> None:
    module = "benchmarks.bench_moe_comm"
    run = subprocess.run(
        [sys.executable, "-m", module, "--no-engines", "--no-gloo", "--results", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-2:] == ["moe_comm.json", "moe_comm.png"]
    data = json.loads((tmp_path / "moe_comm.json").read_text())
    assert (tmp_path / "moe_comm.png").stat().st_size > 1000
    assert data["model"]["what"] == "a model, not a measurement"
    assert data["model"]["constants"]["nvlink"] == pytest.approx(370.8)
    assert [each.partition(":")[0] for each in data["aims"]] == ["NOT MET", "met", "not counted"]
    assert {row["topology"] for row in data["rows"]} == set(TOPOLOGIES)


def test_a_part_does_not_replace_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    result = common.RESULTS / "moe_comm.json"
    before = result.read_bytes() if result.exists() else None
    bench_moe_comm.main(engines=False, gloo=False, runs=1, results=common.RESULTS)
    assert "nothing written: a part is not a result" in capsys.readouterr().out
    assert (result.read_bytes() if result.exists() else None) == before


# --- the documentation ---


def test_the_documentation_has_the_computed_bytes(rows: list[Row]) -> None:
    """Each line of its table, and no way of an even decode or a prefill left out."""
    text = (ROOT / "docs/benchmarks-communication.md").read_text()
    for load in ("decode", "prefill"):
        block = text.partition(f"<!-- {load} -->")[2].partition("<!-- /")[0].strip()
        shown = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.split("\n")
        ]
        lines = [[*line[:9]] for line in moe_comm_table.lines(rows, load)]
        assert shown[2:] == lines, load


def test_the_documentation_says_what_is_not_met(rows: list[Row]) -> None:
    text = " ".join((ROOT / "docs/benchmarks-communication.md").read_text().split())
    worst: dict[str, float] = {}
    for each in moe_comm_table.excesses(rows):
        if each["load"] == EAGER.name:
            worst[each["path"]] = max(worst.get(each["path"], 0), each["more"])
    for path, more in worst.items():
        assert f"`{path}` {100 * more:.1f} %" in text
    assert "26.3 to 52.6 %" in text


def test_the_documentation_has_what_the_model_says(rows: list[Row]) -> None:
    text = " ".join((ROOT / "docs/benchmarks-communication.md").read_text().split())
    for each in links.PUBLISHED:
        low, high = each.model
        model = f"{low:.1f}" if low == high else f"{low:.1f} to {high:.1f}"
        assert f"| {each.whole:,} | {each.ranks} | {each.microseconds:g} | {model} |" in text
    shown = [
        moe_comm_table.microseconds(
            find(rows, topology=topology, checkpoint="FP8", load="decode", way=way)[
                "model_microseconds_a_layer"
            ]
        )
        for topology in ("DP8 EP8", "DP4 x TP2 EP8")
        for way in (SMALL, OURS)
    ]
    assert f"the model has {shown[0]} us a layer for in-tree and {shown[1]} for" in text
    assert f"in-tree two, {shown[2]} and {shown[3]}." in text
