"""What the CUDA implementation refuses, splits and stacks before any launch; needs no GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jit_kernels.qk_norm_rope import cuda
from jit_kernels.qk_norm_rope.contract import Call, Group, Request
from jit_kernels.qk_norm_rope.fit import Fit, alignment_problem
from tests.kernels.cases import cut, make_case

REQUEST = Request(
    device="cuda",
    dtype=torch.bfloat16,
    q_heads=6,
    kv_heads=1,
    head_dim=128,
    rotary_dim=64,
    cache_dtype=torch.bfloat16,
    group_size=8,
    capability=(9, 0),
)
CHANNEL: Any = SimpleNamespace(size=8)


def call_of(tokens: int = 5, *, group: Group | None = None, **options: Any) -> Call:
    """A call of rank 3 of TP8 that fits REQUEST."""
    layout = {name: options.pop(name) for name in ("offset", "spare_columns") if name in options}
    options.setdefault("cache_dtype", torch.bfloat16)
    rank = cut(make_case(tokens, **options), 8, 3, **layout)
    return rank.call(group or Group(8, channel=CHANNEL))


def problem_of(call: Call) -> str:
    return Fit(REQUEST).problem(call)


def test_request_that_fits_is_not_refused() -> None:
    assert cuda.refusal(REQUEST) is None
    assert cuda.refusal(replace(REQUEST, group_size=3, device="cuda:1")) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"device": "cpu"}, "device is cpu"),
        ({"capability": (7, 5)}, "needs 8.0"),
        ({"capability": None}, "needs 8.0"),
        ({"dtype": torch.float32}, "float32"),
        ({"cache_dtype": torch.float32}, "cache is torch.float32"),
        ({"cache_dtype": torch.float16}, "cache is torch.float16"),
        ({"head_dim": 96}, "head_dim is 96"),
        ({"rotary_dim": 40}, "40 rotated"),
        ({"rotary_dim": 144}, "144 rotated"),
        ({"kv_heads": 0}, "0 KV heads"),
        ({"group_size": 17}, "17 ranks"),
        ({"no_exchange": "the group spans domains"}, "^the group spans domains$"),
    ],
)
def test_request_is_refused_in_a_sentence(change: dict[str, Any], why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(cuda.refusal(replace(REQUEST, **change)))


def test_lone_rank_needs_no_exchange() -> None:
    assert cuda.refusal(replace(REQUEST, group_size=1, no_exchange="it spans domains")) is None


def test_call_that_fits_has_no_problem() -> None:
    assert problem_of(call_of()) == ""
    # One row has no stride that matters, whatever its tensor says.
    assert problem_of(call_of(1, spare_columns=3)) == ""


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"offset": 1}, "q starts at an address"),
        ({"offset": 4}, "q starts at an address"),
        ({"spare_columns": 4}, "rows of q lie"),
        ({"dtype": torch.float16, "cache_dtype": torch.float16}, "float16"),
        ({"heads": (48, 16)}, "wide"),
        ({"rotary_dim": 32}, "32 dimensions turn"),
        ({"rotary_dim": 0}, "0 dimensions turn"),
        ({"cache_dtype": None}, "the cache's dtype"),
        ({"cache_dtype": torch.float8_e5m2}, "the cache's dtype"),
        ({"group": Group(4, channel=CHANNEL)}, "4 ranks"),
        ({"group": Group(8)}, "no channel"),
        ({"group": Group(8, channel=SimpleNamespace(size=4))}, "channel has 4"),  # type: ignore[arg-type]
    ],
)
def test_call_that_does_not_fit_is_told(options: dict[str, Any], why: str) -> None:
    assert why in problem_of(call_of(**options))


def test_other_pointers_are_checked_too() -> None:
    call = call_of()
    assert call.rotation is not None
    assert call.cache is not None
    half = replace(call.rotation, cos_sin_cache=call.rotation.cos_sin_cache.half())
    assert "not float32" in problem_of(replace(call, rotation=half))
    table = torch.zeros(257 * 64 + 1)[1:].view(257, 64)
    shifted = replace(call.rotation, cos_sin_cache=table)
    assert "cos/sin cache starts" in problem_of(replace(call, rotation=shifted))
    weight = torch.zeros(6 * 128 + 1, dtype=torch.bfloat16)[1:]
    norm = replace(call.norm, q_weight=weight)
    assert "weight of q starts" in problem_of(replace(call, norm=norm))
    norm = replace(call.norm, k_weight=call.norm.k_weight.float())
    assert "weight of k is torch.float32" in problem_of(replace(call, norm=norm))
    for name in ("k_cache", "v_cache"):
        odd = torch.zeros(9, 132, dtype=torch.bfloat16)[:, :128].unflatten(1, (1, 128))
        cache = replace(call.cache, **{name: odd})
        assert "apart" in problem_of(replace(call, cache=cache))


def test_what_was_seen_to_fit_vouches_for_its_own_layout_only() -> None:
    """One row fits at any stride; more rows at that stride, or any other difference, do not."""
    fit = Fit(REQUEST)
    fit.check(call_of())
    fit.check(call_of(7))
    fit.check(call_of(1, spare_columns=3))
    for wrong in (
        call_of(5, spare_columns=3),
        call_of(5, offset=1),
        call_of(5, group=Group(8, channel=SimpleNamespace(size=4))),  # type: ignore[arg-type]
        call_of(5, group=Group(8)),
        call_of(5, rotary_dim=0),
        call_of(5, cache_dtype=None),
    ):
        with pytest.raises(ValueError, match=r"^qk_norm_rope_: "):
            fit.check(wrong)


def test_pages_that_are_not_aligned_are_told() -> None:
    call = call_of(page_size=16)
    assert call.cache is not None
    assert problem_of(call) == ""
    for strides in ((16 * 132, 132, 128, 1), (16 * 128 + 4, 128, 128, 1)):
        odd = torch.zeros(9 * 16 * 132, dtype=torch.bfloat16).as_strided((4, 16, 1, 128), strides)
        for name in ("k_cache", "v_cache"):
            assert "apart" in problem_of(replace(call, cache=replace(call.cache, **{name: odd})))


def test_no_tokens_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_Kernel", lambda request: None)  # has nothing to launch
    cuda.prepare(REQUEST)(call_of(0))


def test_rows_too_far_apart_for_the_kernels_stride_are_told() -> None:
    far = torch.empty(8, dtype=torch.bfloat16).as_strided((1, 8), (2**32, 1))
    twice = torch.empty(2, 8, dtype=torch.bfloat16, device="meta").as_strided((2, 8), (2**32, 1))
    assert alignment_problem([("q", far, 1)]) == ""
    assert "beyond" in alignment_problem([("q", twice, 1)])


def test_pieces_cover_every_token_once_and_share_memory() -> None:
    call = call_of(23)
    parts = list(cuda.pieces(call, 8))
    assert [part.tokens for part in parts] == [8, 8, 7]
    assert call.cache is not None
    assert call.rotation is not None
    for get in (
        lambda part: part.q,
        lambda part: part.k,
        lambda part: part.cache.v,
        lambda part: part.cache.slots,
        lambda part: part.rotation.positions,
    ):
        assert torch.equal(torch.cat([get(part) for part in parts]), get(call))
    parts[1].q.fill_(1)
    assert (call.q[8:16] == 1).all()
    assert [part.tokens for part in cuda.pieces(call_of(24), 8)] == [8, 8, 8]
    assert next(cuda.pieces(call, 23)) is call


def test_grid_is_even_and_fits() -> None:
    for tokens in (1, 2, 131, 263, 264, 265, 529, 8192):
        blocks = cuda.grid(tokens, 264)
        assert 1 <= blocks <= min(tokens, 264)
        # No more rounds than the full chip would need.
        assert -(-tokens // blocks) == -(-tokens // 264)


def test_stack_has_the_rank_first() -> None:
    packed = torch.arange(3 * 4 * 10.0).view(3, 4, 10)
    stacked = cuda._stacked([packed[rank, :, 2:5] for rank in range(3)])
    assert torch.equal(stacked, packed[:, :, 2:5])
    assert stacked.data_ptr() == packed[0, :, 2:].data_ptr()
    for wrong in ([packed[0], packed[2], packed[1]], [packed[0], packed[1].clone()]):
        with pytest.raises(ValueError, match="not evenly stacked"):
            cuda._stacked(wrong)
