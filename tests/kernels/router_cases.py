"""The tests of the router; `test_router` runs this file, pytest does not find it.

Triton decides when it is imported whether kernels are interpreted, and another test may have
imported it by then: so this file runs in a process of its own, with TRITON_INTERPRET=1 on the CPU,
without it on a GPU. A planted mistake is a replacement in the text of the kernels.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import MiniMaxM2Config
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter

from jit_kernels.router import op, triton_kernels
from jit_kernels.router import triton as ours
from jit_kernels.router.contract import Call, Request, Routing
from tests.kernels.router_truth import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    ODD,
    PUBLISHED,
    SMALL,
    UNIT,
    Serve,
    changed,
    disagreement,
    logit_bound,
    make_case,
    with_kernels,
    with_reference,
)

torch.set_default_device(DEVICE)

planted = pytest.mark.skipif(not INTERPRETED, reason="wrong kernels run interpreted only")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on NaN and infinity

SERVERS = {"reference": with_reference, "triton": with_kernels(triton_kernels)}


@pytest.fixture(params=SERVERS)
def serve(request: pytest.FixtureRequest) -> Serve:
    return SERVERS[request.param]


@pytest.mark.parametrize(
    ("tokens", "shape", "dtype"),
    [
        *((tokens, ODD, torch.bfloat16) for tokens in (1, 2, 17)),
        *((tokens, ODD, dtype) for tokens in (1, 33) for dtype in (torch.float16, torch.float32)),
        (1, SMALL, torch.float32),
        (17, SMALL, torch.float16),
        (70, SMALL, torch.bfloat16),
    ],
    ids=str,
)
def test_agrees_with_fp64(serve: Serve, tokens: int, shape, dtype):
    assert disagreement(make_case(tokens, shape, dtype), serve) == ""


def test_the_published_shape_agrees_with_fp64(serve: Serve):
    assert disagreement(make_case(7, PUBLISHED, torch.bfloat16), serve) == ""


@pytest.mark.parametrize("parts", [1, 3, 5])
def test_any_number_of_parts_gives_the_same_within_bounds(parts: int):
    def cut(plan: ours.Plan) -> ours.Plan:
        steps = -(-320 // plan.block_hidden // parts)
        return replace(plan, parts=-(-5 // steps), steps=steps)

    case = make_case(5, (24, 320, 4), torch.bfloat16)
    assert disagreement(case, with_kernels(triton_kernels, cut)) == ""


def test_many_tokens_take_blocks_of_rows():
    large = ours.plan(ours.MANY + 1, make_case(1, SMALL, torch.bfloat16).request())
    assert large.rows == ours.SELECTED_ROWS
    case = make_case(150, SMALL, torch.bfloat16)
    assert disagreement(case, with_kernels(triton_kernels, lambda _: large)) == ""


@pytest.mark.parametrize(("experts", "top_k"), [(256, 8), (8, 2), (5, 5)])
def test_agrees_with_transformers(serve: Serve, experts: int, top_k: int):
    case = make_case(9, (experts, 128, top_k), torch.float32)
    config = MiniMaxM2Config(num_experts_per_tok=top_k, num_local_experts=experts, hidden_size=128)
    theirs = MiniMaxM2TopKRouter(config)
    theirs.weight.data.copy_(case.weight)
    with torch.no_grad():
        logits, weights, ids = theirs(case.hidden, case.bias)
    seen = torch.empty_like(logits)
    found = serve(case, seen)
    off = logit_bound(case)
    assert ((seen - logits).abs() <= 2 * off).all()
    # They do not sort: compare as rows of weights over all experts. Seed 3 leaves no choice open.
    rows = torch.zeros(9, experts).scatter(1, ids, weights)
    mine = torch.zeros(9, experts).scatter(1, found.ids.long(), found.weights)
    limit = 2 * (1 + top_k) * (off.max() / 4 + 4 * UNIT) / weights.sum(-1).min()
    torch.testing.assert_close(mine, rows, rtol=0, atol=float(limit))


def test_a_weight_reaches_the_logit_bit_for_bit():
    """One activation of a power of two: the parts of each weight must add up to all of it."""
    case = make_case(16, ODD, torch.bfloat16)
    hidden = torch.zeros_like(case.hidden)
    hidden[range(16), range(16)] = torch.tensor([2.0**i for i in range(-8, 8)]).bfloat16()
    logits = torch.empty(16, ODD[0])
    SERVERS["triton"](replace(case, hidden=hidden), logits)
    # On a GPU the sum inside a tensor core may lose the last bit.
    torch.testing.assert_close(
        logits, hidden.float() @ case.weight.T, rtol=0 if INTERPRETED else 2 * UNIT, atol=0
    )


def test_equal_scores_go_to_the_lower_id(serve: Serve):
    case = make_case(3, SMALL, torch.bfloat16)
    weight = torch.zeros_like(case.weight)
    found = serve(replace(case, weight=weight, bias=torch.zeros_like(case.bias)), None)
    assert found.ids.tolist() == [list(range(8))] * 3
    bias = torch.tensor([0.25, 0.5] * 20)
    found = serve(replace(case, weight=weight, bias=bias), None)
    assert found.ids.tolist() == [list(range(1, 17, 2))] * 3
    assert torch.equal(found.weights, torch.full((3, 8), 0.125))


def test_ids_come_by_descending_biased_score(serve: Serve):
    case = make_case(4, SMALL, torch.float32)
    bias = torch.linspace(-40, 40, 40)  # dwarfs every score
    found = serve(replace(case, bias=bias), None)
    assert found.ids.tolist() == [list(range(39, 31, -1))] * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_finite_stay_to_themselves(serve: Serve, dtype):
    case = make_case(5, SMALL, dtype)
    hidden = case.hidden.clone()
    hidden[1, 7] = float("nan")
    hidden[3, 7] = float("inf")
    found, clean = serve(replace(case, hidden=hidden), None), serve(case, None)
    for row in (0, 2, 4):
        assert torch.equal(found.ids[row], clean.ids[row])
        assert torch.equal(found.weights[row], clean.weights[row])
    assert found.ids[1].tolist() == list(range(8))
    assert found.weights[1].isnan().all()
    # Scores are 0 or 1 there, by the sign of the weight that the infinity meets.
    biased = (case.weight[:, 7] > 0) + case.bias
    assert found.ids[3].tolist() == biased.argsort(descending=True, stable=True)[:8].tolist()
    want = (case.weight[found.ids[3].long(), 7] > 0).float()
    assert torch.equal(found.weights[3], want / want.sum())


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_bias_that_is_not_finite_leaves_ids_in_range(serve: Serve, value: float):
    case = make_case(3, ODD, torch.bfloat16)
    bias = case.bias.clone()
    bias[4] = value
    found = serve(replace(case, bias=bias), None)
    assert (found.ids == 4).any(-1).tolist() == [value != float("-inf")] * 3
    every = serve(replace(case, bias=torch.full_like(bias, value)), None)
    for ids in (*found.ids, *every.ids):
        assert len(set(ids.tolist())) == 3
        assert set(ids.tolist()) <= set(range(12))
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(3), rtol=0, atol=4 * UNIT)


def test_scores_that_underflow_give_zero_weights(serve: Serve):
    """As SGLang's kernel does, where transformers divides 0 by 0."""
    case = make_case(2, ODD, torch.bfloat16)
    weight = torch.full_like(case.weight, -10.0)
    found = serve(replace(case, hidden=torch.ones_like(case.hidden), weight=weight), None)
    assert torch.equal(found.weights, torch.zeros(2, 3))
    assert found.ids.tolist() == [case.bias.argsort(descending=True)[:3].tolist()] * 2


def test_rows_may_be_far_apart(serve: Serve):
    """Row 2 starts 2**31 elements after row 0; before row 0 there is as much that is not read."""
    size = 2 * (2**32 + 2**12)
    # Reserved (0x4000 is MAP_NORESERVE), not resident: pages that nobody writes read as zeros.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    buffer = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.bfloat16)
    if not INTERPRETED:
        buffer = torch.zeros(size // 2, dtype=torch.bfloat16)
    case = make_case(3, ODD, torch.bfloat16)
    hidden = buffer.as_strided((3, ODD[1]), (2**30, 1), 2**31)
    hidden.copy_(case.hidden)
    assert disagreement(replace(case, hidden=hidden), serve) == ""


def test_a_view_of_wider_rows(serve: Serve):
    case = make_case(4, ODD, torch.bfloat16)
    wide = torch.full((4, ODD[1] + 37), float("nan"), dtype=torch.bfloat16)
    wide[:, 5 : 5 + ODD[1]] = case.hidden
    assert disagreement(replace(case, hidden=wide[:, 5 : 5 + ODD[1]]), serve) == ""


def test_a_batch_invariant_plan_gives_a_token_the_same_bits_in_any_batch():
    case = make_case(37, ODD, torch.bfloat16)
    request = case.request(batch_invariant=True)
    assert len({ours.plan(tokens, request) for tokens in (1, 20, 64, 513, 16384)}) == 1
    how = ours.plan(1, request)
    whole = ours.serve(case.call(), how, triton_kernels)
    # NumPy's product treats rows of one block apart, a tensor core does not: so the interpreted
    # tokens keep their place in a block.
    for rows in (slice(0, 1), slice(16, 20), slice(32, 37)):
        part = replace(case, hidden=case.hidden[rows])
        alone = ours.serve(part.call(), how, triton_kernels)
        assert torch.equal(alone.weights, whole.weights[rows])
        assert torch.equal(alone.ids, whole.ids[rows])


PLANTED = {
    "bias in the weights": [("tl.where(taken, scores, 0.0)", "tl.where(taken, biased, 0.0)")],
    "renormalised over all": [
        (
            "tl.where(total == 0.0, 1.0, total)",
            "tl.sum(tl.where(known, scores, 0.0), axis=1)[:, None]",
        )
    ],
    "not renormalised": [("tl.where(total == 0.0, 1.0, total)", "1.0")],
    "bf16 weight": [
        ("    sums = tl.dot(high, third, sums)\n    sums = tl.dot(high, second, sums)\n", "")
    ],
    "softmax": [
        (
            "tl.sigmoid(logits)",
            "tl.exp(logits) / tl.sum(tl.where(known, tl.exp(logits), 0.0), axis=1)[:, None]",
        )
    ],
    "chosen without the bias": [("ordered(biased)", "ordered(scores)")],
    "padding is chosen": [("key = tl.where(known, key, last)", "key = key")],
    "one part": [("range(1, parts)", "range(1, 1)")],
    "the last block not masked": [
        ("mask=here & (h[None, :] < HIDDEN)", "mask=here"),
        ("mask=known & (h[:, None] < HIDDEN)", "mask=known"),
    ],
}


@planted
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_noticed(name: str):
    case = make_case(5, ODD, torch.bfloat16)
    # Rows end in a buffer, so that what is read past them is there to be read.
    wide = torch.full((6, ODD[1]), 3.0, dtype=torch.bfloat16)
    wide[:5] = case.hidden
    weight = torch.full((ODD[0] + 1, ODD[1]), 3.0)
    weight[:-1] = case.weight
    # A bias below every score's range lets padding, which has none, look better than an expert.
    case = replace(case, hidden=wide[:5], weight=weight[:-1], bias=case.bias - 1)
    assert disagreement(case, with_kernels(triton_kernels)) == ""
    assert disagreement(case, with_kernels(changed(*PLANTED[name]))) != ""


def special(check: Callable[..., None], *replacements: tuple[str, str], **arguments) -> None:
    """`check`, which passes with the kernels as they are, must not with the replacements."""
    check(SERVERS["triton"], **arguments)
    with pytest.raises(AssertionError):
        check(with_kernels(changed(*replacements)), **arguments)


@planted
def test_a_tie_to_the_higher_id_is_noticed():
    special(
        test_equal_scores_go_to_the_lower_id,
        ("(BLOCK_EXPERTS - 1 - e)[None, :].to", "e[None, :].to"),
        ("BLOCK_EXPERTS - 1 - (best &", "(best &"),
    )


@planted
def test_a_comparison_that_drops_nans_is_noticed():
    """Such a NaN equals nothing, so that nothing is taken out and one id comes again and again."""
    special(
        test_rows_that_are_not_finite_stay_to_themselves,
        ("taken = key == best", "taken = (key == best) & (biased == biased)"),
        dtype=torch.bfloat16,
    )


@planted
def test_parts_of_a_weight_that_meet_an_infinity_are_noticed():
    special(
        test_rows_that_are_not_finite_stay_to_themselves,
        (
            'finite = tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x.to(tl.float32), 0.0)',
            "finite = x.to(tl.float32)",
        ),
        dtype=torch.bfloat16,
    )


@planted
def test_zero_by_zero_is_noticed():
    special(
        test_scores_that_underflow_give_zero_weights,
        ("tl.where(total == 0.0, 1.0, total)", "total"),
    )


@planted
def test_offsets_of_32_bits_are_noticed():
    special(
        test_rows_may_be_far_apart,
        ("t.to(tl.int64)[:, None] * x_stride", "t[:, None] * x_stride"),
    )


def test_no_tokens_no_launch():
    case = make_case(0, ODD, torch.bfloat16)

    def run(call: Call) -> Routing:
        raise AssertionError("nothing to route")

    found = op.route(
        op.Choice("none", "", run), case.hidden, case.weight, case.bias, top_k=case.top_k
    )
    assert found.weights.shape == found.ids.shape == (0, 3)
    assert (found.weights.dtype, found.ids.dtype) == (torch.float32, torch.int32)


def test_malformed_calls_are_refused_in_one_sentence():
    case = make_case(4, ODD, torch.bfloat16)
    choice = op.choose(Request(DEVICE, torch.bfloat16, *ODD))
    good: dict[str, Any] = {
        "hidden": case.hidden,
        "weight": case.weight,
        "bias": case.bias,
        "top_k": 3,
    }
    op.route(choice, **good)
    for wrong, words in (
        ({"hidden": case.hidden[:, :-1]}, "do not fit"),
        ({"hidden": case.hidden.T.contiguous().T}, "inner stride"),
        ({"hidden": case.hidden.double()}, "not bf16, fp16 or fp32"),
        ({"weight": case.weight.bfloat16()}, "gate's weights"),
        ({"weight": case.weight.T.contiguous().T}, "not contiguous"),
        ({"bias": case.bias[:-1]}, "correction biases"),
        ({"logits": torch.empty(4, 11)}, "logits"),
        ({"top_k": 13}, "13 of 12 experts"),
    ):
        with pytest.raises(ValueError, match=words):
            op.route(choice, **{**good, **wrong})
