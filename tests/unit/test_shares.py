"""What a share lets a loader do, and what it refuses by the tensor's name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sglang_minimax.errors import LoadError
from sglang_minimax.loading.formats.base import COLUMNS, ROWS, Axis, StoredTensor
from sglang_minimax.loading.ledger import Placement
from sglang_minimax.loading.names import TensorName
from sglang_minimax.loading.shares import Share, share_of
from sglang_minimax.loading.slots import SCALAR, Slot
from sglang_minimax.topology import Cut, expert_cut

NAME = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
RECORD = TensorName(0, "experts", "weight", 3, "w1")
BOTH = (Axis(ROWS), Axis(COLUMNS))
WHOLE = torch.arange(48.0).reshape(8, 6)


def placement(rows: Cut, columns: Cut, axes=BOTH, padding: float = 0) -> Placement:
    stored = StoredTensor("weight", axes, frozenset({"F32"}), padding=padding)
    slot = Slot("w13_weight", stored, rows, columns, "w1", 4)
    return Placement(slot, RECORD, slot.box)


def share(rows: range = range(2, 4), columns: range = range(6), whole=WHOLE) -> Share:
    held = whole[rows.start : rows.stop, columns.start : columns.stop]
    where = placement(Cut.even(rows, 8), Cut.even(columns, 6))
    return share_of(where, held, NAME)


def plain(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor


# --- the right part ---

RIGHT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "narrow": lambda t: t.narrow(0, 2, 2),
    "slice": lambda t: t[2:4],
    "slice_both": lambda t: t[2:4, :],
    "slice_with_all_columns": lambda t: t[2:4, 0:6],
    "after_all_of_it": lambda t: t[:].narrow(1, 0, 6).narrow(0, 2, 2),
    "transposed": lambda t: t.t().contiguous().narrow(1, 2, 2).t(),
    "last_two_dims": lambda t: t.transpose(-2, -1)[:, 2:4].transpose(0, 1),
    "permuted": lambda t: t.permute(1, 0)[:, 2:4].t(),
    "cast": lambda t: t.to(torch.float64).narrow(0, 2, 2).to(torch.float32),
    "detached": lambda t: t.detach().narrow(0, 2, 2),
    "cloned": lambda t: t.clone().narrow(0, 2, 2),
    "negative": lambda t: t[-6:-4],
}


@pytest.mark.parametrize("case", RIGHT)
def test_the_right_part_is_the_data(case: str) -> None:
    mine = share()
    assert mine.shape == WHOLE.shape
    assert mine.taken == 0
    found = RIGHT[case](mine)
    assert plain(found)
    assert torch.equal(found, WHOLE[2:4])
    assert mine.taken == 1


def test_two_dimensions_are_cut_one_after_the_other() -> None:
    mine = share(range(2, 4), range(3, 6))
    rows = mine.narrow(0, 2, 2)
    assert isinstance(rows, Share)
    assert rows.shape == (2, 6)
    assert mine.taken == 0
    assert torch.equal(rows.narrow(1, 3, 3), WHOLE[2:4, 3:6])
    assert mine.taken == 1
    assert torch.equal(mine[2:4, 3:6], WHOLE[2:4, 3:6])
    assert mine.taken == 2


def test_every_copy_counts() -> None:
    mine = share()
    for copies in range(1, 4):
        mine.narrow(0, 2, 2)
        assert mine.taken == copies


def test_a_whole_share_is_an_ordinary_tensor() -> None:
    mine = share(range(8))
    target = torch.zeros(8, 6)
    target.copy_(mine)
    assert torch.equal(target, WHOLE)
    assert mine.taken == 1
    places = torch.zeros(2, 8, 6)
    places[1] = share(range(8))
    assert torch.equal(places[1], WHOLE)
    assert torch.equal(share(range(8)).reshape(48), WHOLE.reshape(48))
    assert torch.equal(share(range(8))[:].view(6, 8), WHOLE.view(6, 8))
    # All of a dimension is no cut, so that a whole share stays uncounted until it is used.
    untaken = share(range(8))
    assert isinstance(untaken.narrow(0, 0, 8), Share)
    assert untaken.taken == 0


def test_a_scalar() -> None:
    slot = Slot("scale", SCALAR, Cut.whole(1), Cut.whole(1))
    for held in (torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])):
        mine = share_of(Placement(slot, RECORD, ()), held, NAME)
        target = torch.zeros(2)
        target[1] = mine.reshape(())
        assert target.tolist() == [0, 0.5]
        assert mine.taken == 1


def test_an_empty_part_is_taken_like_any_other() -> None:
    mine = share(range(8, 8))
    assert mine.narrow(0, 8, 0).shape == (0, 6)
    assert mine.taken == 1


# --- anything else ---

WRONG: dict[str, Callable[[torch.Tensor], object]] = {
    "another_ranks": lambda t: t.narrow(0, 0, 2),
    "the_next": lambda t: t.narrow(0, 4, 2),
    "overlapping": lambda t: t.narrow(0, 1, 2),
    "less": lambda t: t.narrow(0, 2, 1),
    "more": lambda t: t.narrow(0, 2, 3),
    "none": lambda t: t.narrow(0, 2, 0),
    "columns": lambda t: t.narrow(1, 2, 2),
    "steps": lambda t: t[2:4:2],
    "all_rows_in_steps": lambda t: t[::2],
    "without_transposing": lambda t: t.t().narrow(0, 2, 2),
    "one_row": lambda t: t[2],
    "used_whole": lambda t: torch.zeros(8, 6).copy_(t),
    "set_whole": lambda t: torch.zeros(1, 8, 6).__setitem__(0, t),
    "added": lambda t: torch.zeros(8, 6) + t,
    "flattened": lambda t: t.reshape(48),
    "largest": lambda t: t.max(),
    "stacked": lambda t: torch.stack([t, t]),
    "halves": lambda t: t.chunk(2),
}


@pytest.mark.parametrize("case", WRONG)
def test_anything_else_is_an_error_with_the_name(case: str) -> None:
    mine = share()
    with pytest.raises(LoadError, match=NAME.replace(".", r"\.")):
        WRONG[case](mine)
    assert mine.taken == 0


# --- padding ---

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", range(5))
def test_dealt_blocks_are_padded_in_memory(rank: int, dtype: torch.dtype) -> None:
    """Four blocks of two rows over five ranks: the last one has padding only."""
    cut = expert_cut(8, 5, rank, 2)
    whole = torch.arange(48).reshape(8, 6).to(dtype)
    where = placement(cut, Cut.whole(6))
    mine = share_of(where, whole[cut.lines.start : cut.lines.stop], NAME)
    assert mine.shape == (10, 6)
    found = mine.narrow(0, 2 * rank, 2)
    assert found.dtype == dtype
    wanted = torch.zeros(2, 6)
    wanted[: len(cut.lines)] = whole[cut.lines.start : cut.lines.stop].float()
    assert torch.equal(found.float(), wanted)
    with pytest.raises(LoadError):
        mine.narrow(0, 2 * rank, 1)


@pytest.mark.parametrize("padding", [1, 0.25])
def test_scales_are_padded_with_their_value(padding: float) -> None:
    cut = expert_cut(12, 2, 1, 4)
    axes = (Axis(ROWS, per=4), Axis(COLUMNS, per=3))
    where = placement(cut, Cut.whole(6), axes, padding)
    mine = share_of(where, torch.full((1, 2), 7.0), NAME)
    assert mine.shape == (4, 2)
    assert mine.narrow(0, 2, 2).tolist() == [[7, 7], [padding, padding]]


def test_columns_are_padded_too() -> None:
    cut = expert_cut(12, 2, 1, 4)
    where = placement(Cut.whole(8), cut)
    whole = torch.arange(96.0).reshape(8, 12)
    found = share_of(where, whole[:, 8:12], NAME).narrow(1, 8, 8)
    assert torch.equal(found[:, :4], whole[:, 8:12])
    assert found[:, 4:].eq(0).all()


def test_a_share_says_what_it_is() -> None:
    assert repr(share()) == f"Share({NAME}, [2, 6] of [8, 6])"
