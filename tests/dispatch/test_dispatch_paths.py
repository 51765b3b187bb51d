"""Our dispatchers, over threads: each path computes the layer that fp64 computes row by row."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from jit_kernels.row_quant.reference import fp4_blocks, fp4_rows, fp8_groups, fp8_rows
from sglang_minimax.moe_exchange.moves import Batch, moves
from sglang_minimax.moe_exchange.paths import FORCEABLE, Movement, Path, Rows
from sglang_minimax.moe_exchange.payload import Payload
from sglang_minimax.topology import Topology
from tests.dispatch.stage import HIDDEN, TOP_K, Model, Stage

PATHS = {name: path for name, path in FORCEABLE.items() if path.is_ours}
#: Topology -> rows of its attention-DP groups: even, uneven, with empty ones, one row in all.
BATCHES: dict[str, tuple[tuple[int, ...], ...]] = {
    "tp=4,ep=4": ((4,), (8,)),
    "tp=4,ep=2": ((4,),),
    "tp=4": ((8,),),
    "tp=3,dp=3": ((5, 1, 2), (0, 0, 1)),
    "tp=4,dp=4,ep=4": ((3, 3, 3, 3), (5, 0, 1, 2), (0, 0, 0, 1)),
    "tp=4,dp=2,ep=4": ((4, 4), (2, 6), (0, 2)),
    "tp=4,dp=2,ep=2": ((2, 4),),
    "tp=4,dp=2": ((6, 2), (0, 4)),
    "tp=8,dp=4,ep=8": ((2, 0, 4, 2),),
    "tp=1": ((3,),),
}
CASES = [
    (name, topology, groups)
    for name, path in PATHS.items()
    for topology, several in BATCHES.items()
    for groups in several
    if path.movement is Movement.GATHER or Topology.parse(topology).moe_tp == 1
]
#: fp32 sums of some hundred products of numbers around 1, against fp64: 2**-24 * sqrt(256) * few.
CLOSE = 2e-5


def stage(
    monkeypatch: pytest.MonkeyPatch, topology: str, path: Path, groups: tuple[int, ...]
) -> Stage:
    made = Stage(Topology.parse(topology), path, groups, monkeypatch)
    made.patch()
    return made


def as_transported(path: Path, hidden: torch.Tensor) -> torch.Tensor:
    """What a row is after the path's rounding; the roundings have oracles of their own."""
    if path.rows is Rows.FP8:
        return fp8_rows(*fp8_groups(hidden))
    if path.rows is Rows.FP4:
        scale = torch.tensor(2.0**9)
        return fp4_rows(*fp4_blocks(hidden, scale), scale)
    return hidden


@pytest.mark.parametrize(("name", "topology", "groups"), CASES)
def test_a_path_computes_the_layer(
    monkeypatch: pytest.MonkeyPatch, name: str, topology: str, groups: tuple[int, ...]
) -> None:
    path, model = PATHS[name], Model.random(sum(groups))
    ranks = stage(monkeypatch, topology, path, groups)
    found = ranks.run(model)
    expected = model.outputs(as_transported(path, model.hidden))
    for rank, outputs in enumerate(found):
        mine = ranks.rows_of(rank)
        torch.testing.assert_close(
            outputs.double(), expected[mine.start : mine.stop], atol=CLOSE, rtol=CLOSE
        )


@pytest.mark.parametrize(("topology", "groups"), [(t, g) for t in BATCHES for g in BATCHES[t]])
@pytest.mark.parametrize("rows", Rows)
def test_a_gather_gives_what_the_plan_says(
    monkeypatch: pytest.MonkeyPatch, topology: str, groups: tuple[int, ...], rows: Rows
) -> None:
    path = Path(Movement.GATHER, rows)
    ranks = stage(monkeypatch, topology, path, groups)
    ranks.run(Model.random(sum(groups)))
    payload = Payload(rows, HIDDEN, TOP_K, item_bytes=4)
    for rank, calls in ranks.calls.items():
        group = ranks.topology.coordinates(rank).attention_dp_rank
        planned = moves(ranks.topology, path, payload, Batch(groups), group)
        wanted = [(move.operation, move.given) for move in planned if move.site == "experts"]
        assert calls == wanted


@pytest.mark.parametrize("topology", ["tp=4,dp=4,ep=4", "tp=4,dp=2,ep=4", "tp=4,dp=2"])
def test_fp8_rows_are_those_that_the_runner_would_make_of_plain_ones(
    monkeypatch: pytest.MonkeyPatch, topology: str
) -> None:
    groups = (6, 2) if "dp=2" in topology else (5, 0, 1, 2)
    model = Model.random(8)
    for path in (Path(Movement.GATHER), Path(Movement.GATHER, Rows.FP8)):
        ranks = stage(monkeypatch, topology, path, groups)
        ranks.run(model)
        for came in ranks.arrived.values():
            if path.rows is Rows.FP8:
                codes, scales = came.hidden_states_pre_quant
            else:
                codes, scales = fp8_groups(came.hidden_states)
            wanted_codes, wanted_scales = fp8_groups(model.hidden)
            assert torch.equal(codes.view(torch.uint8), wanted_codes.view(torch.uint8))
            assert torch.equal(scales, wanted_scales)


def test_one_that_marks_padding_gives_it_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang marks padding by id -1: the row's output is zero, and no other row notices."""
    for topology in ("tp=4,dp=4,ep=4", "tp=4,dp=4"):
        for name, path in PATHS.items():
            if path.movement is Movement.ALL_TO_ALL and "ep" not in topology:
                continue
            model = Model.random(8)
            model.ids[3] = -1
            model.hidden[3] = float("nan")
            if path.rows is not Rows.PLAIN:
                model.hidden[3] = 1e30  # a NaN has no code in every form
            found = torch.cat(stage(monkeypatch, topology, path, (2, 2, 2, 2)).run(model))
            others = [row for row in range(8) if row != 3]
            clean = torch.where(model.hidden.isnan(), 0.0, model.hidden)
            expected = model.outputs(as_transported(path, clean))[others]
            torch.testing.assert_close(
                found.double()[others], expected, atol=CLOSE, rtol=CLOSE, msg=name
            )


def test_an_all_to_all_sends_a_row_once_to_each_rank_that_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model.random(8)
    ranks = stage(monkeypatch, "tp=4,dp=4,ep=4", Path(Movement.ALL_TO_ALL), (2, 2, 2, 2))
    ranks.run(model)
    payload = Payload(Rows.PLAIN, HIDDEN, TOP_K, item_bytes=4)
    for rank, calls in ranks.calls.items():
        mine = ranks.rows_of(rank)
        copies = sum(len({expert // 2 for expert in row}) for row in model.ids[mine].tolist())
        back = Counter(
            owner for row in model.ids.tolist() for owner in {expert // 2 for expert in row}
        )[rank]
        assert calls == [
            ("all_to_all_single", 4 * 8),
            ("all_to_all_single", copies * payload.bytes),
            ("all_to_all_single", back * HIDDEN * 4),
        ]


def test_rows_that_the_forward_does_not_count_are_a_defect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = stage(monkeypatch, "tp=2,dp=2", Path(Movement.GATHER), (2, 2))
    ranks.rows_of = lambda rank: range(3)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="3 rows where the forward counts 2"):
        ranks.run(Model.random(4))
