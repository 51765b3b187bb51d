"""What top-k and top-p leave of a distribution beside drafted tokens is what the sampler leaves."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sglang_minimax import ARCHITECTURE
from sglang_minimax.patches.joint_filters import (
    filter_the_whole,
    join_for_ours,
    joined,
    remember_the_whole,
)
from sglang_minimax.platforms.cpu.speculation import trees
from tests.unit.draft_mistakes import mistaken


def filtered_by_sglang(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """What SGLang's sampler in PyTorch draws from, scaled to 1."""
    from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch

    _, weights, index, _ = top_k_top_p_min_p_sampling_from_probs_torch(
        probs.clone(),
        torch.full((len(probs),), top_k, dtype=torch.int32),
        torch.full((len(probs),), top_p),
        torch.zeros(len(probs)),
        need_min_p_sampling=False,
        sampling_seed=None,
        positions=torch.zeros(len(probs), dtype=torch.int64),
        return_filtered_probs=True,
    )
    kept = torch.zeros_like(probs).scatter(1, index.long(), weights)
    return kept / kept.sum(dim=1, keepdim=True)


def filtered_in_turn(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """What is left by the two functions that `eagle_sample` calls, one after the other."""
    from sglang.srt.speculative import eagle_utils

    left = eagle_utils.top_k_renorm_prob(probs, torch.full((len(probs),), top_k))
    return eagle_utils.top_p_renorm_prob(left, torch.full((len(probs),), top_p))


def test_both_filters_in_one_request_keep_what_sglangs_sampler_keeps() -> None:
    """0.5 of 0.8 exceeds 0.6, so that one after the other drops the second; 0.5 of all does not."""
    probs = torch.tensor([[0.5, 0.3, 0.2]])
    assert filtered_by_sglang(probs, 2, 0.6).tolist() == [pytest.approx([0.625, 0.375, 0])]
    with joined():
        assert filtered_in_turn(probs, 2, 0.6).tolist() == [pytest.approx([0.625, 0.375, 0])]
    # Another model gets what SGLang gives it.
    assert filtered_in_turn(probs, 2, 0.6).tolist() == [[1, 0, 0]]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    top_k=st.integers(1, 9),
    top_p=st.floats(0.05, 1.0, allow_subnormal=False),
)
def test_filters_are_joined_as_in_sglangs_sampler(seed: int, top_k: int, top_p: float) -> None:
    """Without ties; to a rounding of the last division, which the sampler leaves to multinomial."""
    logits = 2 * torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    probs = logits.softmax(dim=-1)
    with joined():
        left = filtered_in_turn(probs, top_k, top_p)
    torch.testing.assert_close(left, filtered_by_sglang(probs, top_k, top_p), rtol=1e-6, atol=0)


def test_eagle_sample_filters_by_k_and_then_by_p() -> None:
    """What top-k leaves goes to top-p as it is: the whole distribution is found beside it."""
    from sglang.srt.speculative import eagle_utils

    source = inspect.getsource(inspect.unwrap(eagle_utils.eagle_sample))
    by_k, by_p = (source.index(f"target_probs = top_{each}_renorm_prob(") for each in "kp")
    between = source[by_k:by_p].replace("target_probs = top_k_renorm_prob(", "")
    assert 0 < by_k < by_p
    assert "target_probs =" not in between


def verified(architecture: str, sampling: SimpleNamespace | None) -> Tensor:
    """What a batch's verification leaves of 0.5, 0.3, 0.2 by top-k 2 and top-p 0.6."""
    config = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))
    batch = SimpleNamespace(model_config=config, sampling_info=sampling)

    def eagle_sample(verify_input: object, batch: object, *rest: object, mask: object) -> Tensor:
        assert (verify_input, rest, mask) == ("input", ("output",), "mask")
        return filtered_in_turn(torch.tensor([[0.5, 0.3, 0.2]]), 2, 0.6)

    return join_for_ours(eagle_sample)("input", batch, "output", mask="mask")


def test_filters_are_joined_for_our_model_alone() -> None:
    both = SimpleNamespace(need_top_k_sampling=True, need_top_p_sampling=True)
    assert (verified(ARCHITECTURE, both) > 0).sum() == 2
    assert (verified("LlamaForCausalLM", both) > 0).sum() == 1
    verified(ARCHITECTURE, None)  # idle


def test_the_whole_is_kept_only_as_long_as_it_is_needed() -> None:
    """It is as large as the logits, so that a launch would have less room than it was given."""
    from sglang.srt.speculative import eagle_utils

    probs = torch.tensor([[0.5, 0.3, 0.2]])
    with joined():
        left = eagle_utils.top_k_renorm_prob(probs, torch.tensor([2]))
        assert any(each is probs for each in vars(left).values())
        assert vars(eagle_utils.top_p_renorm_prob(left, torch.tensor([0.6]))) == {}
    only_k = SimpleNamespace(need_top_k_sampling=True, need_top_p_sampling=False)
    with_k: list[Tensor] = []

    def eagle_sample(verify_input: object, batch: object) -> None:
        with_k.append(eagle_utils.top_k_renorm_prob(probs, torch.tensor([2])))

    config = SimpleNamespace(hf_config=SimpleNamespace(architectures=[ARCHITECTURE]))
    join_for_ours(eagle_sample)(None, SimpleNamespace(model_config=config, sampling_info=only_k))
    assert vars(with_k[0]) == {}


def test_a_platform_without_filters_gets_none() -> None:
    assert remember_the_whole(None) is None
    assert filter_the_whole(None) is None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    weights=st.lists(st.integers(0, 4), min_size=2, max_size=8).filter(any),
    top_k=st.integers(1, 9),
    top_p=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]),
)
def test_kept_are_those_of_sglangs_sampler(weights: list[int], top_k: int, top_p: float) -> None:
    """Ties among the weights are frequent; which of equal ones stays is nobody's promise."""
    probs = torch.tensor([weights, weights[::-1]], dtype=torch.float32)
    probs /= probs.sum(dim=1, keepdim=True)
    pairs = [
        (trees.keep_top_k(probs, torch.full((2,), top_k)), filtered_by_sglang(probs, top_k, 1.0)),
        (trees.keep_top_p(probs, torch.full((2,), top_p)), filtered_by_sglang(probs, 99, top_p)),
    ]
    for ours, theirs in pairs:
        assert torch.equal(ours.sort(dim=1).values, theirs.sort(dim=1).values)
        assert ((ours > 0) <= (probs > 0)).all()
        kept, dropped = probs.where(ours > 0, torch.inf), probs.where(ours == 0, -torch.inf)
        assert (kept.amin(dim=1) >= dropped.amax(dim=1)).all()


def test_each_row_has_its_own_limit() -> None:
    probs = torch.tensor([[0.1, 0.5, 0.4]]).expand(3, -1)
    kept = trees.keep_top_k(probs, torch.tensor([1, 2, 1 << 30], dtype=torch.int32))
    assert (kept > 0).sum(dim=1).tolist() == [1, 2, 3]
    kept = trees.keep_top_p(probs, torch.tensor([0.4, 0.6, 1.0]))
    assert (kept > 0).sum(dim=1).tolist() == [1, 2, 3]


def test_one_of_equal_ones_is_the_argmax() -> None:
    """A request at temperature 0 among others comes as top-k 1."""
    probs = torch.tensor([[0.2, 0.4, 0.4], [0.25, 0.5, 0.25]])
    kept = trees.keep_top_k(probs, torch.tensor([1, 1]))
    assert kept.argmax(dim=1).tolist() == probs.argmax(dim=1).tolist()
    assert kept.sum(dim=1).tolist() == [1, 1]
    assert (kept > 0).sum(dim=1).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("keep_top_k", ">= top_ks", "> top_ks"),
        ("keep_top_k", "torch.arange(probs.shape[-1]) >= ", "ordered < ordered.gather(-1, -1 + "),
        ("keep_top_p", " - ordered > ", " > "),
        ("keep_top_p", "> top_ps", ">= top_ps"),
        ("_scaled", "probs / probs.sum(dim=-1, keepdim=True)", "probs"),
    ],
    ids=["one too many", "all equal ones", "one too few", "up to, not through", "not scaled"],
)
def test_another_rule_is_noticed(
    name: str, right: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong.endswith("-1 + "):
        wrong, right = (
            "ordered < ordered.gather(-1, top_ks.long().unsqueeze(-1) - 1)",
            "torch.arange(probs.shape[-1]) >= top_ks.long().unsqueeze(-1)",
        )
    monkeypatch.setattr(trees, name, mistaken(getattr(trees, name), right, wrong))
    probs = torch.tensor([[0.25, 0.125, 0.25, 0.25, 0.125]])
    same = [
        torch.equal(
            trees.keep_top_k(probs, torch.tensor([2])).sort().values,
            filtered_by_sglang(probs, 2, 1.0).sort().values,
        ),
        torch.equal(
            trees.keep_top_p(probs, torch.tensor([0.5])).sort().values,
            filtered_by_sglang(probs, 99, 0.5).sort().values,
        ),
    ]
    assert not all(same)
