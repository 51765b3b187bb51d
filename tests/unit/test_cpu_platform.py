"""The CPU platform's own operators, against the definition of what they replace."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from sglang_minimax.platforms.cpu import collectives
from sglang_minimax.platforms.cpu.experts import local_experts, mask_padding

SIZES = [3, 0, 5]  # the second rank has no rows


def _replaced(wrap: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Our function in place of one of GroupCoordinator's, which must not be called."""

    def original(*_: Any, **__: Any) -> None:
        raise AssertionError("SGLang's function was called")

    original.__name__ = name
    return wrap(original)


gatherv = _replaced(collectives.gather_uneven_rows, "all_gatherv")
scatterv = _replaced(collectives.scatter_uneven_sums, "reduce_scatterv")


def _group(rank: int, size: int) -> Any:
    return SimpleNamespace(rank_in_group=rank, world_size=size, device_group=None)


def _rows(rank: int) -> torch.Tensor:
    return torch.arange(SIZES[rank] * 2.0).view(-1, 2) + 100 * rank


def _partial(rank: int) -> torch.Tensor:
    return torch.randn(sum(SIZES), 2, generator=torch.Generator().manual_seed(rank))


def _gathers(rank: int, group: Any) -> None:
    everything = torch.cat([_rows(r) for r in range(3)])
    (found,) = gatherv(group, _rows(rank), sizes=SIZES)
    assert torch.equal(found, everything)
    into = torch.empty_like(everything)
    gatherv(group, _rows(rank), sizes=SIZES, output=into)
    assert torch.equal(into, everything)
    several = gatherv(group, [_rows(rank), _rows(rank).long()], sizes=SIZES)
    assert torch.equal(several[1], everything.long())
    assert gatherv(group, torch.full((2, 1), rank))[0].flatten().tolist() == [0, 0, 1, 1, 2, 2]


def _scatters(rank: int, group: Any) -> None:
    mine = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    expected = (_partial(0) + _partial(1) + _partial(2))[mine]
    given = _partial(rank)
    torch.testing.assert_close(scatterv(group, given, sizes=SIZES), expected)
    assert torch.equal(given, _partial(rank)), "the input was overwritten"
    into = torch.empty(SIZES[rank], 2)
    scatterv(group, given, output=into, sizes=SIZES)
    torch.testing.assert_close(into, expected)
    assert scatterv(group, torch.ones(6, 1)).tolist() == [[3.0], [3.0]]


def _in_rank(check: Callable[[int, Any], None], rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    check(rank, _group(rank, 3))
    dist.destroy_process_group()


@pytest.mark.parametrize("check", [_gathers, _scatters])
def test_uneven_collectives(check: Callable[[int, Any], None], tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_in_rank, args=(check, rank, str(tmp_path / "store")))
        for rank in range(3)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0, 0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gatherv(_group(0, 3), _rows(0), sizes=[3, 5]), "2 sizes for a group of 3"),
        (lambda: gatherv(_group(2, 3), _rows(0), sizes=SIZES), "3 rows instead of 5"),
        (lambda: gatherv(_group(0, 3), [_rows(0)], output=_rows(0)), "not a list"),
        (lambda: scatterv(_group(0, 3), torch.ones(7, 2), sizes=SIZES), "add up to 8"),
        (lambda: scatterv(_group(0, 3), torch.ones(7, 2)), "7 rows cannot be shared"),
    ],
)
def test_sizes_that_contradict_each_other(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def _experts(ids: torch.Tensor, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The definition, one pair of token and expert after the other."""
    w13, w2 = _weights()
    total = torch.zeros_like(x)
    for token, slot in torch.cartesian_prod(torch.arange(ids.shape[0]), torch.arange(3)).tolist():
        expert = int(ids[token, slot])
        if expert >= 0:
            gate, up = (w13[expert] @ x[token]).chunk(2)
            total[token] += weights[token, slot] * (w2[expert] @ (F.silu(gate) * up))
    return total


def _weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(4, 12, 8, generator=generator) / 8**0.5,
        torch.randn(4, 8, 6, generator=generator) / 6**0.5,
    )


@pytest.mark.parametrize(
    "ids",
    [
        [[0, 1, 2], [3, 0, 1]],
        [[-1, 1, -1], [3, -1, -1], [-1, -1, -1]],  # what a rank of EP sees
        [[2, 2, 2]],  # two replicas of an expert on one rank
        [[-1, -1, -1]],
    ],
)
def test_experts_of_this_rank(ids: list[list[int]]) -> None:
    chosen = torch.tensor(ids)
    x, weights = torch.randn(len(ids), 8), torch.rand(len(ids), 3)
    # Products of 8 and 6 terms of order one in fp32.
    torch.testing.assert_close(
        local_experts(x, *_weights(), weights, chosen), _experts(chosen, weights, x),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_experts_without_a_token() -> None:
    found = local_experts(
        torch.empty(0, 8), *_weights(), torch.empty(0, 3), torch.empty(0, 3, dtype=torch.int32)
    )
    assert found.shape == (0, 8)


def test_padding_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.dp_attention import _DpGatheredBufferWrapper as Buffer

    monkeypatch.setattr(Buffer, "_global_num_tokens_gpu", torch.tensor([2, 0, 3]))
    monkeypatch.setattr(Buffer, "_local_dp_buffer_len", 3)
    mask = _replaced(mask_padding, "mask_dp_pad_moe_topk_ids")
    ids = torch.arange(18).view(9, 2)
    mask(ids)
    assert (ids == -1).all(1).tolist() == [False, False, True, True, True, True, *[False] * 3]
    other = torch.arange(4).view(2, 2)
    mask(other)  # not the gathered batch
    assert other.tolist() == [[0, 1], [2, 3]]
