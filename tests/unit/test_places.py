"""Experts copied past SGLang's loader: only where it would have put them, and never unnoticed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import load_checkpoints, load_rank
from sglang_minimax import TINY_M2
from sglang_minimax.errors import LoadError
from sglang_minimax.loading.formats.base import COLUMNS, FLOATS, ROWS, Axis, StoredTensor
from sglang_minimax.loading.ledger import Placement
from sglang_minimax.loading.names import TensorName
from sglang_minimax.loading.places import Places
from sglang_minimax.loading.slots import Slot, Stage
from sglang_minimax.topology import AttentionShard, Cut

EXPERTS, ROWS_HERE, WIDTH = 6, 4, 5
WEIGHT = StoredTensor("weight", (Axis(ROWS), Axis(COLUMNS)), FLOATS)
Write = Callable[[torch.nn.Parameter, torch.Tensor, int], None]


class FusedMoE(torch.nn.Module):
    """Named as SGLang's. `stored`: the experts in the order of storage; `write`: of one of them."""

    def __init__(self, stored: list[int], write: Write, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.stored, self.write, self.calls = stored, write, 0
        data = torch.full((len(stored), *shape), -1.0)
        self.weight = torch.nn.Parameter(data, requires_grad=False)

    def weight_loader(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
    ) -> None:
        self.calls += 1
        for index, expert in enumerate(self.stored):
            if expert == expert_id:
                self.write(param, loaded_weight, index)


def cut(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The second of two shares of the rows, as rank 1 of 2 cuts it."""
    return tensor.narrow(dim, ROWS_HERE, ROWS_HERE)


def plain(param: torch.nn.Parameter, tensor: torch.Tensor, index: int) -> None:
    param.data[index].narrow(0, ROWS_HERE, ROWS_HERE).copy_(cut(tensor))


def transposed(param: torch.nn.Parameter, tensor: torch.Tensor, index: int) -> None:
    expert = param.data[index]
    expert.narrow(1, 0, ROWS_HERE).copy_(cut(tensor.t().contiguous(), 1))


def assigned(param: torch.nn.Parameter, tensor: torch.Tensor, index: int) -> None:
    param.data[index] = cut(tensor)


def padding(param: torch.nn.Parameter, tensor: torch.Tensor, index: int) -> None:
    plain(param, tensor, index)
    param.data[index].narrow(0, 0, ROWS_HERE).zero_()


def twice(param: torch.nn.Parameter, tensor: torch.Tensor, index: int) -> None:
    plain(param, tensor, index)
    param.data[index].narrow(0, 0, ROWS_HERE).copy_(cut(tensor))


def in_halves(param: torch.nn.Parameter, tensor: torch.Tensor, index: int) -> None:
    box, target = cut(tensor), param.data[index]
    target[:2].copy_(box[:2])
    target[2:].copy_(box[2:])


def doubled(param: torch.nn.Parameter, tensor: torch.Tensor, index: int) -> None:
    plain(param, cut(tensor) * 2, index) if False else param.data[index][:4].copy_(cut(tensor) * 2)


def rounded(param: torch.nn.Parameter, tensor: torch.Tensor, index: int) -> None:
    param.data[index][:4].copy_(cut(tensor.to(torch.bfloat16)))


def looking(param: torch.nn.Parameter, tensor: torch.Tensor, index: int) -> None:
    if (param.data[index] == -1).all():
        plain(param, tensor, index)


def across(param: torch.nn.Parameter, tensor: torch.Tensor, index: int) -> None:
    param.data[:, 0, index % WIDTH].fill_(0)
    param.data.view(-1)[index * ROWS_HERE * WIDTH :][:20].view(4, 5).copy_(cut(tensor))


WIDE = (2 * ROWS_HERE, WIDTH)
LEARNED = [(plain, WIDE), (transposed, (WIDTH, 2 * ROWS_HERE)), (assigned, (ROWS_HERE, WIDTH))]
LEFT = [
    (padding, WIDE),
    (twice, WIDE),
    (in_halves, (ROWS_HERE, WIDTH)),
    (doubled, WIDE),
    (rounded, WIDE),
    (looking, WIDE),
    (across, WIDE),
]
NAMES = lambda value: getattr(value, "__name__", None)  # noqa: E731


def stage(stored: list[int] | None) -> Stage:
    whole = Cut.whole(1)
    held = {} if stored is None else {expert: stored.count(expert) for expert in stored}
    return Stage(
        attention=AttentionShard.__new__(AttentionShard),  # nothing asks for it
        layers=range(1),
        embedding=None,
        head=None,
        width=whole,
        experts=lambda layer: held,
        stored=None if stored is None else lambda layer: stored,
    )


def slot(shard: str, *, is_padded: bool = False) -> Slot:
    """Rows 4 to 8 of 8; with padding, 4 to 7 of 7 and one of zeros."""
    total = 7 if is_padded else 8
    lines = range(ROWS_HERE, total)
    rows = Cut(lines, total, ROWS_HERE, ROWS_HERE, 8) if is_padded else Cut.even(lines, total)
    return Slot("weight", WEIGHT, rows, Cut.whole(WIDTH), shard, EXPERTS)


def load(
    layer: FusedMoE,
    known: list[int] | None,
    *,
    shard: str = "w1",
    is_padded: bool = False,
    loader: Any = None,
) -> torch.Tensor:
    """All experts in an order that is not that of storage, as `StrictLoader._write` does it."""
    places, where = Places(stage(known)), slot(shard, is_padded=is_padded)
    for expert in (3, 0, 5, 1, 4, 2):
        copies = layer.stored.count(expert)
        if copies:
            record = TensorName(0, "experts", "weight", expert, shard)
            placement = Placement(where, record, where.box, copies)
            values = torch.rand(len(where.rows.lines), WIDTH, generator=torch.manual_seed(expert))
            if not places.put(layer.weight, placement, values):
                share = places.load(
                    layer.weight,
                    loader or layer.weight_loader,
                    placement,
                    values,
                    f"tensor {expert}",
                )
                assert share.taken >= copies
    return layer.weight.data


@pytest.mark.parametrize("stored", [[0, 1, 2, 3, 4, 5], [5, 3, 0], [2, 0, 2, 4, 1, 0]], ids=str)
@pytest.mark.parametrize(("write", "shape"), LEARNED, ids=NAMES)
@pytest.mark.parametrize("is_padded", [False, True], ids=["", "dealt"])
def test_what_is_learned_is_what_the_loader_does(
    write: Write, shape: tuple[int, ...], stored: list[int], is_padded: bool
) -> None:
    learned, left = FusedMoE(stored, write, shape), FusedMoE(stored, write, shape)
    ours = load(learned, stored, is_padded=is_padded)
    assert torch.equal(ours, load(left, None, is_padded=is_padded))
    assert (learned.calls, left.calls) == (2, len(set(stored)))


@pytest.mark.parametrize(("write", "shape"), LEFT, ids=NAMES)
def test_what_is_more_than_copies_is_left_to_the_loader(
    write: Write, shape: tuple[int, ...]
) -> None:
    stored = list(range(EXPERTS))
    watched, left = FusedMoE(stored, write, shape), FusedMoE(stored, write, shape)
    assert torch.equal(load(watched, stored), load(left, None))
    assert watched.calls == left.calls == EXPERTS


def test_a_loader_of_others_is_called_for_every_expert() -> None:
    """It may keep books, as SGLang's quantisation while loading does."""
    stored = list(range(EXPERTS))
    layer = FusedMoE(stored, plain, WIDE)
    load(layer, stored, loader=lambda *words, **named: layer.weight_loader(*words, **named))
    assert layer.calls == EXPERTS

    @functools.wraps(FusedMoE.weight_loader)
    def counting(self: FusedMoE, *words: Any, **named: Any) -> None:
        return FusedMoE.weight_loader(self, *words, **named)

    layer = FusedMoE(stored, plain, WIDE)
    load(layer, stored, loader=counting.__get__(layer))
    assert layer.calls == EXPERTS


@pytest.mark.parametrize(
    ("shard", "known"),
    [("w1", [0, 1, 2, 3, 5, 4]), ("w1", [5, 1, 2, 3, 4, 0]), ("w2", [1, 0, 2, 3, 4, 5])],
)
def test_experts_that_are_not_where_we_think_are_noticed(shard: str, known: list[int]) -> None:
    """A part of the parameters is enough: all of a layer's have the same order."""
    stored = list(range(EXPERTS))
    layer = FusedMoE(stored, plain, WIDE)
    with pytest.raises(LoadError, match="report this"):
        load(layer, known, shard=shard)


def test_another_place_for_later_experts_is_noticed() -> None:
    def surprising(param: torch.nn.Parameter, tensor: torch.Tensor, index: int) -> None:
        start = 0 if index > 3 else ROWS_HERE
        param.data[index].narrow(0, start, ROWS_HERE).copy_(cut(tensor))

    stored = list(range(EXPERTS))
    with pytest.raises(LoadError, match=r"tensor 5.*report this"):
        load(FusedMoE(stored, surprising, WIDE), stored)


def test_a_parameter_that_moves_is_given_to_the_loader() -> None:
    stored = list(range(EXPERTS))

    def moving(param: torch.nn.Parameter, tensor: torch.Tensor, index: int) -> None:
        param.data = param.data.clone()
        plain(param, tensor, index)

    layer = FusedMoE(stored, moving, WIDE)
    assert torch.equal(load(layer, stored), load(FusedMoE(stored, plain, WIDE), None))


# --- SGLang's own ----------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _preloaded() -> None:
    load_rank.preload()


def _loaded(folder: Path, place: load_rank.Place, learn: bool) -> tuple[int, int, dict[str, Any]]:
    """(experts put, experts given to the loader, the bytes of each parameter)."""
    put, load_, counts = Places.put, Places.load, [0, 0]

    def counted_put(self: Places, *words: Any) -> bool:
        done = learn and put(self, *words)
        counts[0] += done
        return done

    def counted_load(self: Places, *words: Any) -> Any:
        counts[1] += 1
        return load_(self, *words)

    Places.put, Places.load = counted_put, counted_load  # type: ignore[method-assign]
    model = load_rank.Rank(folder, place, load_rank.OURS).load()
    found = {
        name: parameter.data.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, parameter in model.named_parameters()
    }
    return *counts, found


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six blocks in an expert's width, so that TP4 deals them and pads."""
    folder = tmp_path_factory.mktemp("places") / "fp8"
    load_checkpoints.write(folder, load_checkpoints.Size(2, 8, 128, 48, 8, 4, 512, 8, files=2))
    return folder


@pytest.mark.parametrize("checkpoint", ["bf16", "fp8"])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"tp": 2}, {"tp": 4}, {"tp": 2, "ep": 2}],
    ids=["tp=1", "tp=2", "tp=4", "tp=2,ep=2"],
)
def test_sglangs_layers_get_the_same(checkpoint: str, sizes: dict[str, int], fp8: Path) -> None:
    place, folder = load_rank.Place("", sizes), fp8 if checkpoint == "fp8" else TINY_M2
    put, loaded, learned = load_rank.in_child(_loaded, folder, place, True)
    _, all_experts, left = load_rank.in_child(_loaded, folder, place, False)
    assert learned == left
    assert put + loaded == all_experts
    assert put >= loaded > 0  # the first and the last of four, or more, go through the loader
