"""The harness's own judgement: each kind of difference has to be noticed, and nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from sglang_minimax.config import Architecture
from sglang_minimax.moe_exchange.paths import Movement, Path, Rows
from sglang_minimax.moe_exchange.payload import Payload
from sglang_minimax.topology import Topology, rank_shares
from sglang_minimax.validation import expectations, ledger, observations, tolerance, workloads
from sglang_minimax.validation.judge import judge
from sglang_minimax.validation.observations import Collective, Forward, RankRecord, Window
from sglang_minimax.validation.shapes import SMALL
from sglang_minimax.validation.workloads import Request, Step

VOCABULARY = 12
ARCH = Architecture.from_config({**SMALL, "vocab_size": VOCABULARY})
FP32 = torch.float32


class Oracle:
    """Stands in for a Subject: a distribution that depends on the last token alone."""

    arch = ARCH

    def __init__(self, margin: float = 1.0) -> None:
        self.margin = margin
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randn(VOCABULARY, VOCABULARY, generator=generator).log_softmax(-1)

    def log_probabilities(self, tokens: Any) -> torch.Tensor:
        return self.rows[list(tokens)]

    def routing_margins(self, tokens: Any) -> torch.Tensor:
        return torch.full((len(tokens),), self.margin)

    def reply(self, request: Request, error: float = 0.0) -> dict[str, Any]:
        """What an engine would answer that is off by `error` in one log-probability."""
        tokens = list(request.prompt)
        for _ in range(request.steps):
            tokens.append(int(self.rows[tokens[-1]].argmax()))
        found = self.rows[tokens[:-1]].clone()
        found[-1, 3] += error
        rows = [[(float(v), i, None) for i, v in enumerate(row)] for row in found]
        start = len(request.prompt) - 1
        return {
            "output_ids": tokens[start + 1 :],
            "meta_info": {
                "cached_tokens": request.cached or 0,
                "output_top_logprobs": rows[start:],
                "input_top_logprobs": [None, *rows[:start]],
            },
        }


ALONE = Request("a", (9, 8, 10), 4, from_start=True)
AGAIN = Request("a again", (9, 8, 10), 4, cached=2)


def verdict_of(oracle: Oracle, alone: dict[str, Any], again: dict[str, Any]) -> Any:
    steps = [(Step("first", (ALONE,)), [alone]), (Step("batch", (AGAIN,)), [again])]
    return judge(oracle, steps, FP32)  # type: ignore[arg-type]


def test_what_agrees_is_judged_so() -> None:
    oracle = Oracle()
    found = verdict_of(oracle, oracle.reply(ALONE), oracle.reply(AGAIN))
    assert found.shortcomings == []
    assert found.tokens_equal
    assert found.distributions == 2 + 4 + 4  # the prompt's after its first token, and each step
    assert found.max_error < 1e-6


def test_an_error_beyond_the_tolerance_is_a_shortcoming() -> None:
    oracle = Oracle()
    found = verdict_of(oracle, oracle.reply(ALONE, error=1e-3), oracle.reply(AGAIN))
    assert found.max_error == pytest.approx(1e-3, rel=1e-2)
    assert any("request 'a' of step 'first' is off by" in each for each in found.shortcomings)
    assert any("differs from itself alone" in each for each in found.shortcomings)


def test_a_few_errors_after_a_near_tie_in_routing_are_set_aside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of ten distributions one would be more than the cap.
    monkeypatch.setattr("sglang_minimax.validation.judge.NEAR_TIES", 0.2)
    oracle = Oracle(margin=0.0)
    found = verdict_of(oracle, oracle.reply(ALONE, error=1e-3), oracle.reply(AGAIN, error=1e-3))
    assert found.near_ties == 2
    assert found.shortcomings == []


def test_more_than_a_few_are_a_shortcoming() -> None:
    oracle = Oracle(margin=0.0)
    found = verdict_of(oracle, oracle.reply(ALONE, error=1e-3), oracle.reply(AGAIN))
    assert found.near_ties == 1
    assert any("1 of 10 distributions" in each for each in found.shortcomings)


def test_other_tokens_after_a_near_tie_are_counted_too() -> None:
    oracle = Oracle(margin=0.0)
    silent = Request("silent", (9, 8, 10), 4, logprobs=False)
    reply = oracle.reply(silent)
    reply["output_ids"][2] = (reply["output_ids"][2] + 1) % VOCABULARY
    found = judge(oracle, [(Step("mixed", (silent,)), [reply])], FP32)  # type: ignore[arg-type]
    assert found.near_ties > 0
    assert found.shortcomings


def test_near_ties_everywhere_compare_nothing() -> None:
    oracle = Oracle(margin=0.0)
    other = Oracle()
    other.rows = other.rows.roll(1, 0)
    found = verdict_of(oracle, other.reply(ALONE), other.reply(AGAIN))
    assert any("too many" in each for each in found.shortcomings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda reply: reply["output_ids"].__setitem__(1, 11), "likelier by"),
        (lambda reply: reply["output_ids"].pop(), "distributions"),
        (lambda reply: reply["meta_info"].update(cached_tokens=0), "in the radix cache, not 2"),
        (lambda reply: reply["meta_info"]["output_top_logprobs"][1].pop(), "is off by nan"),
    ],
    ids=["another token", "a token short", "no radix hit", "a log-probability short"],
)
def test_a_wrong_reply_is_a_shortcoming(change: Any, words: str) -> None:
    oracle = Oracle()
    again = oracle.reply(AGAIN)
    change(again)
    found = verdict_of(oracle, oracle.reply(ALONE), again)
    assert any(words in each for each in found.shortcomings), found.shortcomings


def test_the_tolerance_grows_with_depth_width_and_logits() -> None:
    base = tolerance.log_probability(ARCH, 100, FP32, spread=10)
    assert tolerance.log_probability(ARCH, 100, FP32, spread=20) == pytest.approx(2 * base)
    deeper = replace(ARCH, num_layers=4 * ARCH.num_layers)
    assert 1.8 < tolerance.log_probability(deeper, 100, FP32, spread=10) / base < 2
    wider = replace(ARCH, hidden_size=4 * 512)
    assert tolerance.log_probability(wider, 100, FP32, spread=10) == pytest.approx(2 * base)
    assert tolerance.log_probability(ARCH, 100, torch.bfloat16, spread=10) > 1000 * base


# --- inside the ranks ---

TOPOLOGY = Topology(tp=4, dp=2)
SHARES = rank_shares(ARCH, TOPOLOGY)
EXCHANGE = ledger.Exchange(
    TOPOLOGY, Path(Movement.GATHER), Payload(Rows.PLAIN, ARCH.hidden_size, ARCH.top_k)
)


def forward(mode: str = "DECODE", tokens: int = 1, began: float = 0.5, **changes: Any) -> Forward:
    """What rank 0 of TOPOLOGY records where all is well."""
    rows = max(tokens, 2)
    found = Forward(began, mode, tokens, rows, (rows, rows), (), "MAX_LEN", 0, (), ())
    given = Counter(
        {
            (move.site, move.operation, SHARES[0].groups[move.kind]): move.given
            for move in EXCHANGE.all_moves(SHARES[0], found)
        }
    )
    collectives = tuple(
        Collective(*key, calls, given[key] * ARCH.num_layers)
        for key, calls in ledger.calls_of_layers(EXCHANGE, SHARES[0], found).items()
    )
    return replace(found, **{"collectives": collectives, **changes})


def complaints(*forwards: Forward) -> list[str]:
    return list(ledger.collectives(EXCHANGE, SHARES[0], forwards, dp_lm_head=False))


def test_the_right_collectives_are_not_complained_about() -> None:
    assert complaints(forward(), forward("IDLE", 0)) == []


def test_an_idle_rank_has_no_norm_to_reduce() -> None:
    norm = Collective("qk_norm", "all_reduce", (0, 1), ARCH.num_layers, 0)
    idle = forward("IDLE", 0)
    found = complaints(replace(idle, collectives=(*idle.collectives, norm)))
    assert found == [
        "rank 0, idle of 0 tokens (MAX_LEN, 2 rows): too many: 4 all_reduce at qk_norm over [0, 1] "
        "in 4 layers"
    ]


@pytest.mark.parametrize("wrong", range(5))
def test_each_collective_is_missed_and_each_other_group_noticed(wrong: int) -> None:
    right = forward().collectives
    assert len(right) == 5  # norm; rows onto their ranks, to all, back to their ranks, to the group
    without = (*right[:wrong], *right[wrong + 1 :])
    assert "missing" in complaints(forward(collectives=without))[0]
    elsewhere = replace(right[wrong], ranks=(0, 2))
    assert "over [0, 2]" in complaints(forward(collectives=(*without, elsewhere)))[0]


@pytest.mark.parametrize("wrong", range(4))
def test_a_byte_more_or_less_is_noticed(wrong: int) -> None:
    right = forward().collectives
    for change in (-1, 1):
        one = replace(right[wrong], bytes=right[wrong].bytes + change)
        changed = (*right[:wrong], one, *right[wrong + 1 :])
        assert (
            f"{one.bytes} bytes to {one.operation}" in complaints(forward(collectives=changed))[0]
        )


def test_what_is_captured_between_layers_is_gathered_again() -> None:
    """Before layers 1 and 2; the first layer's input and the last one's output are whole anyway."""
    plain = forward()
    captured = forward(captured=(0, 1, 2, ARCH.num_layers))
    assert "missing: 2 all_gather_into_tensor at boundary over [0, 1]" in complaints(captured)[0]
    again = plain.collectives[-2]
    assert (again.operation, again.ranks) == ("all_gather_into_tensor", (0, 1))
    share = again.bytes // again.calls
    more = replace(again, calls=again.calls + 2, bytes=again.bytes + 2 * share)
    others = tuple(each for each in plain.collectives if each is not again)
    assert complaints(replace(captured, collectives=(*others, more))) == []


def test_a_head_that_leaves_its_group_is_noticed() -> None:
    gather = Collective("model", "all_gather", (0, 1, 2, 3), 1, 0)
    one = forward()
    one = replace(one, collectives=(*one.collectives, gather))
    assert complaints(one) == []
    found = list(ledger.collectives(EXCHANGE, SHARES[0], [one], dp_lm_head=True))
    assert "embedding or head used all_gather over ranks [0, 1, 2, 3]" in found[0]


def record(rank: int, *forwards: Forward, **changes: Any) -> RankRecord:
    share = SHARES[rank]
    found = RankRecord(
        rank, dict(share.groups), share.layers, len(share.layers), {"wrong": []}, "gather", forwards
    )
    return replace(found, **changes)


STEP = Step("second", (Request("second", (9,) * 40, 2, group=1),))
TIMED = [(STEP, Window("second", 0, 1))]


def test_tokens_on_the_wrong_ranks_are_noticed() -> None:
    idle, busy = forward("IDLE", 0), forward("DECODE", 1)
    right = [record(0, idle), record(1, idle), record(2, busy), record(3, busy)]
    assert list(expectations.zero_tokens(SHARES, right, TIMED)) == []
    assert expectations.idle_ranks(right, TIMED) == {"second": [0, 1]}
    wrong = [record(0, busy), record(1, idle), record(2, idle), record(3)]
    assert list(expectations.zero_tokens(SHARES, wrong, TIMED)) == [
        "rank 0 got 1 tokens in step 'second', whose requests went to attention-DP group 1",
        "rank 2 got no tokens in step 'second'",
        "rank 3 ran nothing in step 'second'",
    ]


def test_chunks_are_counted() -> None:
    whole = record(2, forward("EXTEND", 40))
    cut = record(2, forward("EXTEND", workloads.CHUNK), forward("EXTEND", 40 - workloads.CHUNK))
    assert list(expectations.chunks(SHARES, [cut], TIMED)) == []
    assert "was cut into [40], not [32, 8]" in next(expectations.chunks(SHARES, [whole], TIMED))


def test_the_combine_is_counted_with_the_rows_that_make_it_special() -> None:
    def way_back(operation: str, **changes: Any) -> Forward:
        return forward(collectives=(Collective("boundary", operation, (0, 1), 4, 0),), **changes)

    def combine(operation: str, one: Forward) -> list[str]:
        return list(expectations.combine(operation, [record(0, one)]))

    uneven = way_back("reduce_scatterv", sizes=((1, 0),))
    assert combine("reduce_scatterv", uneven) == []
    assert "never used" in combine("reduce_scatter_tensor", uneven)[0]
    even = way_back("reduce_scatterv", sizes=((1, 1),))
    assert "equal sizes only" in combine("reduce_scatterv", even)[0]
    padded = way_back("reduce_scatter_tensor")
    assert combine("reduce_scatter_tensor", padded) == []
    full = way_back("reduce_scatter_tensor", rows=1)
    assert "never with padded rows" in combine("reduce_scatter_tensor", full)[0]


def test_stages_talk_within_their_group() -> None:
    shares = rank_shares(ARCH, Topology(tp=2, pp=2))

    def step(ranks: tuple[int, ...], *operations: str) -> Forward:
        between = tuple(Collective("scheduler", name, ranks, 1, 0) for name in operations)
        return forward(between=between)

    both = ("send_tensor_dict", "recv_tensor_dict")
    assert list(expectations.stages(shares[0], [step((0, 2), *both)])) == []
    (sentence,) = expectations.stages(shares[0], [step((0, 2), both[0])])
    assert "recv_tensor_dict over [], not over its PP group [0, 2] alone" in sentence
    assert len(list(expectations.stages(shares[0], [step((0, 1), *both)]))) == 2


def test_ranks_out_of_place_are_noticed() -> None:
    right = [record(rank) for rank in range(4)]
    assert list(observations.misplaced(right, SHARES)) == []
    groups = {**SHARES[0].groups, "attention_tp": (0, 1, 2, 3)}
    wrong = [
        record(0, groups=groups),
        record(1, kv_layers=62),
        record(2, weights={"wrong": ["rank 2 holds lm_head.weight, which it does not own"]}),
    ]
    found = list(observations.misplaced(wrong, SHARES))
    assert "its attention_tp group is [0, 1, 2, 3], but the topology says [0, 1]" in found[0]
    assert found[1:] == [
        "rank 1 has layers 0 to 3 and KV cache for 62, but its stage is 0 to 3",
        "rank 2 holds lm_head.weight, which it does not own",
        "rank 3 reported nothing",
    ]


# --- the workload ---


def test_every_prompt_is_the_same_for_every_number_of_groups() -> None:
    def prompts(groups: int) -> list[tuple[int, ...]]:
        steps = workloads.plan(VOCABULARY, groups)
        return [request.prompt for step in steps for request in step.requests]

    assert prompts(1) == prompts(4)


def test_groups_get_different_numbers_of_requests_and_some_none() -> None:
    (batch,) = [step for step in workloads.plan(VOCABULARY, 4) if step.name == "batch"]
    sizes = [sum(request.group == group for request in batch.requests) for group in range(4)]
    assert sizes == [2, 0, 0, 4]


def test_the_longest_request_is_within_the_stated_context() -> None:
    requests = [r for step in workloads.plan(VOCABULARY, 1) for r in step.requests]
    assert max(len(r.prompt) + r.steps for r in requests) <= workloads.LONGEST
    assert all(r.steps >= workloads.STEPS for r in requests if r.logprobs)


CAPTURED = Request("captured", (9, 8, 10), 1, logprobs=False, hidden=True)


class CapturingOracle(Oracle):
    """With residual streams: layer i's is i + 1 everywhere."""

    def layer_outputs(self, tokens: Any) -> list[torch.Tensor]:
        return [torch.full((len(tokens), ARCH.hidden_size), i + 1.0) for i in range(4)]

    def captured(self, *layers: int, error: float = 0.0) -> list[str]:
        """Shortcomings where the model captured `layers`, off by `error`, and 1 and 3 were due."""
        outputs = torch.cat([self.layer_outputs(CAPTURED.prompt)[i] for i in layers], -1) + error
        reply = self.reply(CAPTURED)
        reply["meta_info"]["hidden_states"] = [outputs.tolist()]
        return judge(self, [(Step("captured", (CAPTURED,)), [reply])], FP32, (1, 3)).shortcomings  # type: ignore[arg-type]


def test_captured_layers_are_compared() -> None:
    oracle = CapturingOracle()
    assert oracle.captured(1, 3) == []
    assert oracle.captured(1, 3, error=1e-6) == []
    (one, other) = oracle.captured(1, 3, error=1e-3)
    assert "captured of layer 1 is off by 0.001" in one
    assert "captured of layer 3 is off by 0.001" in other
    (missing,) = oracle.captured(1)
    assert "captured [3, 128] numbers instead of the outputs of layers [1, 3]" in missing
    (swapped, _) = oracle.captured(3, 1)
    assert "captured of layer 1 is off by 2" in swapped
