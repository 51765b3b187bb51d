"""The QK norm over simulated attention-TP groups, against fp64 and against transformers.

Ranks are simulated in one process: each holds its columns of one packed qkv matrix, and the
collective is a sum over the list of partial results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import MiniMaxM2Config
from transformers.models.minimax_m2.modeling_minimax_m2 import (
    MiniMaxM2RMSNorm,
    MiniMaxM2RotaryEmbedding,
    apply_rotary_pos_emb,
)

from jit_kernels.qk_norm_rope import op, reference
from jit_kernels.qk_norm_rope.contract import Call
from sglang_minimax.topology import AttentionShard, legal_attention_tp_sizes

HEAD_DIM = 32
HEADS = (16, 4)
EPS = 1e-6
SIZES = legal_attention_tp_sizes(*HEADS)  # 1, 2, 4, and with replicas 8 and 16

# fp32 sums of 512 squares in two orders, a square root and three products: a few units of 2**-23.
FP32 = {"rtol": 2e-6, "atol": 1e-7}
# One rounding to bf16 moves a value by at most 2**-8 of itself; two moved some by 1.9 times that.
ONE_BF16_ROUNDING = {"rtol": 2**-8 * 1.001, "atol": 0.0}


def shards(size: int) -> list[AttentionShard]:
    return [AttentionShard(size, rank, HEAD_DIM, *HEADS) for rank in range(size)]


@dataclass(frozen=True)
class Case:
    """Global q, k and weights: [tokens, heads * head_dim] and [heads * head_dim]."""

    q: torch.Tensor
    k: torch.Tensor
    q_weight: torch.Tensor
    k_weight: torch.Tensor

    def to(self, dtype: torch.dtype) -> Case:
        return Case(*(x.to(dtype) for x in (self.q, self.k, self.q_weight, self.k_weight)))


def make_case(tokens: int = 5, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Case:
    torch.manual_seed(7)
    q_width, k_width = (heads * HEAD_DIM for heads in HEADS)
    # Heads of different size make a mean over too few of them visible.
    spread = torch.linspace(0.2, 3.0, k_width)
    return Case(
        torch.randn(tokens, q_width) * torch.linspace(0.2, 3.0, q_width) * scale,
        torch.randn(tokens, k_width) * spread * scale,
        torch.rand(q_width) + 0.5,
        torch.rand(k_width) + 0.5,
    ).to(dtype)


def truth(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in fp64 on the unsplit projection."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x.double()
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()

    return norm(case.q, case.q_weight), norm(case.k, case.k_weight)


@dataclass
class Rank:
    """One rank's packed qkv, its views, and the constants of its norm."""

    shard: AttentionShard
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    norm: op.Norm


def cut(case: Case, shard: AttentionShard) -> Rank:
    rows = slice(shard.q_rows.start, shard.q_rows.stop)
    kv_rows = slice(shard.kv_rows.start, shard.kv_rows.stop)
    packed = torch.cat([case.q[:, rows], case.k[:, kv_rows], case.k[:, kv_rows]], dim=-1)
    q, k, v = packed.split([shard.q_width, shard.kv_width, shard.kv_width], dim=-1)
    norm = op.Norm(
        case.q_weight[rows], case.k_weight[kv_rows], shard.q_divisor, shard.k_divisor, EPS
    )
    return Rank(shard, q, k, v, norm)


def run_group(ranks: list[Rank], dtype: torch.dtype = torch.float32) -> None:
    """Both phases with the collective between them, in place."""
    total = sum(reference.square_sums(rank.q, rank.k, dtype=dtype) for rank in ranks)
    for rank in ranks:
        reference.apply_(Call(rank.q, rank.k, rank.norm), total)


def assemble(ranks: list[Rank]) -> tuple[torch.Tensor, torch.Tensor]:
    """The global q and k, after checking that replicas of a KV head agree bit for bit."""
    k = torch.full_like(ranks[0].k[:, :1], float("nan")).expand(-1, ranks[0].shard.kv_total)
    k = k.clone()
    for rank in ranks:
        rows = slice(rank.shard.kv_rows.start, rank.shard.kv_rows.stop)
        if not k[:, rows].isnan().any():
            assert torch.equal(k[:, rows], rank.k)
        k[:, rows] = rank.k
    return torch.cat([rank.q for rank in ranks], dim=-1), k


def normed(case: Case, size: int, alter: Callable[[Rank], Rank] = lambda rank: rank, **kw):
    ranks = [alter(cut(case, shard)) for shard in shards(size)]
    run_group(ranks, **kw)
    return assemble(ranks)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 30.0])
def test_every_group_size_gives_the_unsplit_norm(size, scale):
    # At scale 1e-4 the mean of squares is below eps, so a misplaced eps shows.
    case = make_case(scale=scale)
    for got, want in zip(normed(case, size), truth(case), strict=True):
        torch.testing.assert_close(got.double(), want, **FP32)


@pytest.mark.parametrize("size", SIZES)
def test_fp64_arithmetic_on_request(size):
    case = make_case(dtype=torch.float64)
    for got, want in zip(normed(case, size, dtype=torch.float64), truth(case), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("size", SIZES)
def test_bf16_rounds_once(size):
    case = make_case(dtype=torch.bfloat16)
    for got, want in zip(normed(case, size), truth(case), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, **ONE_BF16_ROUNDING)
        # Nearly all equal the fp64 result rounded once; a second rounding moves a quarter.
        assert (got == want.to(torch.bfloat16)).float().mean() > 0.999


@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_transformers(size):
    case = make_case()
    for got, x, weight in zip(
        normed(case, size), (case.q, case.k), (case.q_weight, case.k_weight), strict=True
    ):
        theirs = MiniMaxM2RMSNorm(x.shape[-1], eps=EPS)
        theirs.weight.data.copy_(weight)
        torch.testing.assert_close(got, theirs(x).detach(), **FP32)


def local_mean(rank: Rank) -> Rank:
    return replace(rank, norm=replace(rank.norm, q_divisor=rank.shard.q_width))


def eps_over_width(rank: Rank) -> Rank:
    return replace(rank, norm=replace(rank.norm, eps=EPS / rank.shard.q_total))


def replicas_not_counted(rank: Rank) -> Rank:
    return replace(rank, norm=replace(rank.norm, k_divisor=rank.shard.kv_total))


def weight_cut_by_group_size(rank: Rank) -> Rank:
    """The k weight cut as if every rank had its own rows: wrong as soon as heads are replicated."""
    weight = make_case(scale=1e-4).k_weight
    start = rank.shard.rank * rank.shard.kv_width % rank.shard.kv_total
    return replace(
        rank, norm=replace(rank.norm, k_weight=weight[start : start + rank.shard.kv_width])
    )


WRONG_VARIANTS = (local_mean, eps_over_width, replicas_not_counted, weight_cut_by_group_size)


@pytest.mark.parametrize("mutant", WRONG_VARIANTS, ids=lambda mutant: mutant.__name__)
def test_a_plausible_mistake_is_noticed(mutant):
    case = make_case(scale=1e-4)

    def agrees(size: int) -> bool:
        try:
            result = normed(case, size, alter=mutant)
        except AssertionError:  # replicas of one head differ
            return False
        pairs = zip(result, truth(case), strict=True)
        return all(torch.allclose(got.double(), want, **FP32) for got, want in pairs)

    assert all(normed(case, size)[0].isfinite().all() for size in SIZES)
    assert not all(agrees(size) for size in SIZES)


def test_eps_added_to_the_sum_is_noticed():
    case = make_case(scale=1e-4)
    sums = reference.square_sums(case.q, case.k)[:, 0]
    width = case.q.shape[-1]
    right = reference.normalized(case.q, sums, case.q_weight, divisor=width, eps=EPS)
    wrong = case.q * torch.rsqrt((sums + EPS) / width).unsqueeze(-1) * case.q_weight
    assert not torch.allclose(right, wrong, rtol=0.1)


@pytest.mark.parametrize("size", SIZES)
def test_works_through_views_and_leaves_v_alone(size):
    ranks = [cut(make_case(), shard) for shard in shards(size)]
    before = [rank.v.clone() for rank in ranks]
    pointers = [(rank.q.data_ptr(), rank.k.data_ptr()) for rank in ranks]
    assert all(not rank.q.is_contiguous() for rank in ranks)
    run_group(ranks)
    assert pointers == [(rank.q.data_ptr(), rank.k.data_ptr()) for rank in ranks]
    assert all(torch.equal(rank.v, v) for rank, v in zip(ranks, before, strict=True))


def test_one_collective_of_two_fp32_numbers_a_token():
    rank = cut(make_case(tokens=3, dtype=torch.bfloat16), shards(2)[0])
    seen = []

    def reduce(sums: torch.Tensor) -> torch.Tensor:
        seen.append((tuple(sums.shape), sums.dtype))
        return sums * 2

    choice = op.choose(request())
    op.qk_norm_rope_(choice, rank.q, rank.k, rank.norm, group=op.Group(2, reduce))
    assert seen == [((3, 2), torch.float32)]


def test_no_tokens_no_collective():
    rank = cut(make_case(tokens=0), shards(2)[0])

    def reduce(sums: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a group without tokens must not meet in a collective")

    group = op.Group(2, reduce)
    op.qk_norm_rope_(op.choose(request()), rank.q, rank.k, rank.norm, group=group)
    assert reference.square_sums(rank.q, rank.k).shape == (0, 2)


def test_a_zero_row_stays_zero():
    case = make_case(tokens=2, scale=0.0)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in normed(case, 8))


@pytest.mark.parametrize("rotary_dim", [16, 32])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_norm_and_rotation_agree_with_transformers(size, rotary_dim):
    case = make_case(tokens=6)
    positions = torch.tensor([0, 1, 2, 77, 1000, 3])
    config = MiniMaxM2Config(
        head_dim=HEAD_DIM,
        rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": rotary_dim / HEAD_DIM},
        max_position_embeddings=1024,
    )
    rope = MiniMaxM2RotaryEmbedding(config)
    q, k = (x.float().unflatten(-1, (-1, HEAD_DIM))[None] for x in truth(case))
    cos, sin = rope(q, positions[None])
    want = [x[0].flatten(1) for x in apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)]

    angles = torch.arange(1024)[:, None] * rope.inv_freq
    cache = torch.cat([angles.cos(), angles.sin()], dim=-1)
    rotation = reference.Rotation(positions, cache, HEAD_DIM)
    ranks = [cut(case, shard) for shard in shards(size)]
    total = sum(reference.square_sums(rank.q, rank.k) for rank in ranks)
    for rank in ranks:
        op.qk_norm_rope_(
            op.choose(request()),
            rank.q,
            rank.k,
            rank.norm,
            group=op.Group(size, lambda _: total),
            rotation=rotation,
        )
    for got, expected in zip(assemble(ranks), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_interleaved_pairs_would_be_noticed():
    x = torch.randn(2, HEAD_DIM)
    angles = torch.rand(4, 8)
    cache = torch.cat([angles.cos(), angles.sin()], dim=-1)
    positions = torch.tensor([1, 3])
    right = reference.rotated(x, reference.Rotation(positions, cache, HEAD_DIM))
    cos, sin = cache[positions].chunk(2, dim=-1)
    even, odd = x[:, 0:16:2], x[:, 1:16:2]
    wrong = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(1)
    assert not torch.allclose(right[:, :16], wrong)
    assert torch.equal(right[:, 16:], x[:, 16:])


def request(**changes) -> op.Request:
    base = op.Request("cpu", torch.float32, 8, 2, HEAD_DIM, group_size=2)
    return replace(base, **changes)


def test_the_reference_is_the_last_resort_and_says_why(monkeypatch):
    def prepare(wanted: op.Request) -> op.Run:
        if wanted.head_dim != HEAD_DIM:
            raise op.KernelUnavailable("nvcc: error: no such head")
        return print

    needs_cuda = {"cpu": "needs CUDA"}
    fast = op.Implementation("fast", lambda wanted: needs_cuda.get(wanted.device), prepare)
    assert op.choose(request()).name == "reference"
    monkeypatch.setattr(op, "IMPLEMENTATIONS", [fast, op.REFERENCE])
    assert op.choose(request(device="cuda")).name == "fast"
    for wanted, why in (
        (request(), "fast: needs CUDA"),
        (request(device="cuda", head_dim=64), "fast: nvcc: error: no such head"),
    ):
        fallback = op.choose(wanted)
        assert (fallback.name, fallback.why) == ("reference", why)
        with pytest.raises(op.KernelUnavailable, match=why.removeprefix("fast: ")):
            op.choose(wanted, prefer="fast")
    assert op.choose(request(device="cuda"), prefer="reference").why == "asked for"
    with pytest.raises(op.KernelUnavailable, match="known: fast, reference"):
        op.choose(request(), prefer="faster")
