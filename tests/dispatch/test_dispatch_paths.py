"""Our dispatchers, over threads: each path computes the layer that fp64 computes row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput

from jit_kernels.row_quant.reference import fp4_blocks, fp4_rows, fp8_groups, fp8_rows
from sglang_minimax.layers.dispatch import all_to_all, factory
from sglang_minimax.moe_exchange.moves import Batch, moves
from sglang_minimax.moe_exchange.paths import FORCEABLE, Movement, Path, Rows
from sglang_minimax.moe_exchange.payload import Payload
from sglang_minimax.topology import Topology
from tests.dispatch import stage as stages
from tests.dispatch.stage import EXPERTS, HIDDEN, TOP_K, Group, Model, Stage
from tests.ranks import own_rank

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


class Strict(Group):
    """Fails where the ranks of a server would wait for each other, or read past what came."""

    def all_to_all(
        self, output: torch.Tensor, given: torch.Tensor, received: Any = None, sent: Any = None
    ) -> None:
        self._together("all_to_all_single")
        if received is not None:
            coming = [each[self.rank_in_group] for each in self._exchange(sent)]
            assert coming == received, f"{coming} rows come to one that expects {received}"
        super().all_to_all(output, given, received, sent)

    def _all(self, operation: str, mine: torch.Tensor) -> list[torch.Tensor]:
        self._together(operation)
        return super()._all(operation, mine)

    def _together(self, operation: str) -> None:
        called = self._exchange(operation)
        assert len(set(called)) == 1, f"the ranks call {called} at once"


def stage(
    monkeypatch: pytest.MonkeyPatch, topology: str, path: Path, groups: tuple[int, ...]
) -> Stage:
    monkeypatch.setattr(stages, "Group", Strict)
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
    assert_computes(ranks, model)


def assert_computes(ranks: Stage, model: Model) -> None:
    """Every rank ends with the layer's outputs of its own rows, and no others."""
    found = ranks.run(model)
    expected = model.outputs(as_transported(ranks.path, model.hidden))
    for rank, outputs in enumerate(found):
        mine = ranks.rows_of(rank)
        torch.testing.assert_close(
            outputs.double(), expected[mine.start : mine.stop], atol=CLOSE, rtol=CLOSE
        )


#: What a server's forwards bring one after the other: prefills, a lone decode, nothing at all for
#: most ranks, and the same number of all rows shared out in another way.
STEPS = {
    "tp=4,dp=4,ep=4": ((2, 2, 2, 2), (0, 8, 0, 0), (1, 1, 1, 1), (0, 0, 0, 1), (5, 0, 1, 2)),
    "tp=4,dp=2": ((2, 2), (0, 4), (6, 2), (2, 0), (2, 2)),
}


@pytest.mark.parametrize(
    ("name", "topology"), sorted({case[:2] for case in CASES if case[1] in STEPS})
)
def test_a_batch_that_changes_its_shape_every_step(
    monkeypatch: pytest.MonkeyPatch, name: str, topology: str
) -> None:
    """A layer keeps its dispatcher, which keeps nothing of the forward before."""
    made: dict[int, Any] = {}
    original = factory.dispatcher_for

    def dispatcher_for(path: Path, config: Any) -> Any:
        if own_rank() not in made:
            made[own_rank()] = original(path, config)
        return made[own_rank()]

    monkeypatch.setattr(factory, "dispatcher_for", dispatcher_for)
    ranks = stage(monkeypatch, topology, PATHS[name], ())
    for seed, groups in enumerate(STEPS[topology]):
        ranks.groups = groups
        assert_computes(ranks, Model.random(sum(groups), seed))


@pytest.mark.parametrize(("topology", "groups"), [(t, g) for t in BATCHES for g in BATCHES[t]])
@pytest.mark.parametrize("rows", Rows)
def test_a_gather_gives_what_the_plan_says(
    monkeypatch: pytest.MonkeyPatch, topology: str, groups: tuple[int, ...], rows: Rows
) -> None:
    path = Path(Movement.GATHER, rows)
    ranks = stage(monkeypatch, topology, path, groups)
    ranks.run(Model.random(sum(groups)))
    payload = Payload(rows, HIDDEN, TOP_K, item_bytes=4)
    for rank, calls in sorted(ranks.calls.items()):
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


def routed(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights by the scores of a gate, as a model has them. hidden: [rows, HIDDEN]."""
    gate = torch.randn((EXPERTS, HIDDEN), generator=torch.Generator().manual_seed(9))
    scores, ids = (hidden @ gate.t() / HIDDEN**0.5).sigmoid().topk(TOP_K)
    return ids.to(torch.int32), scores / scores.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", [name for name in PATHS if name.startswith("gather")])
def test_choices_are_those_of_the_rows_before_they_are_rounded(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = Model.random(8)
    model.ids, model.weights = routed(model.hidden)
    ranks = stage(monkeypatch, "tp=4,dp=4,ep=4", PATHS[name], (5, 0, 1, 2))
    ranks.run(model)
    for rank, came in ranks.arrived.items():
        weights, ids, _ = came.topk_output
        assert torch.equal(weights, model.weights)
        assert ids.dtype == torch.int32
        held = model.ids // 2 == rank
        assert torch.equal(ids, torch.where(held, model.ids % 2, -1))


def test_fp4_rows_are_under_one_scale_of_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise ranks would read codes by another scale than they were written by."""
    original = factory.codec_for

    def codec_for(rows: Rows, dtype: torch.dtype, layer: Any) -> Any:
        layer.w13_input_scale = 2.0 ** torch.arange(-8 - EXPERTS, -8.0)[:, None].expand(-1, 2)
        return original(rows, dtype, layer)

    monkeypatch.setattr(factory, "codec_for", codec_for)
    ranks = stage(monkeypatch, "tp=4,dp=4,ep=4", PATHS["gather-fp4"], (2, 2, 2, 2))
    assert_computes(ranks, Model.random(8))


def with_padding() -> Iterator[tuple[str, str, Path, Model]]:
    """(topology, name, path, model) of each path; SGLang has marked row 3 as padding by id -1."""
    for topology in ("tp=4,dp=4,ep=4", "tp=4,dp=4"):
        for name, path in PATHS.items():
            if path.movement is Movement.ALL_TO_ALL and "ep" not in topology:
                continue
            model = Model.random(8)
            model.ids[3] = -1
            yield topology, name, path, model


def test_padding_is_worth_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output is zero, and where no expert is elsewhere a runner is given ids that it holds."""
    for topology, name, path, model in with_padding():
        ranks = stage(monkeypatch, topology, path, (2, 2, 2, 2))
        found = torch.cat(ranks.run(model))
        assert not found[3].any(), name
        if "ep" not in topology:
            ids = torch.cat([came.topk_output.topk_ids for came in ranks.arrived.values()])
            assert ids.min() >= 0, f"{name}: id {ids.min()}"


def test_a_sum_of_copies_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = torch.randn((8, HIDDEN), generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = torch.tensor([0, 1] * 4)  # two rows, to each of four ranks
    monkeypatch.setattr(all_to_all, "exchange", lambda rows, sent, received: rows)
    dispatcher = object.__new__(all_to_all.AllToAllDispatcher)
    dispatcher._route = all_to_all.Route(rows, [2] * 4, [2] * 4, 2)
    found = dispatcher.combine(StandardCombineInput(outputs))
    expected = torch.stack([outputs[rows == row].double().sum(0) for row in (0, 1)])
    assert torch.equal(found, expected.bfloat16())


def test_one_that_marks_padding_gives_it_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang marks padding by id -1, and leaves anything in it: no other row notices."""
    for topology, name, path, model in with_padding():
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
    for rank, calls in sorted(ranks.calls.items()):
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
