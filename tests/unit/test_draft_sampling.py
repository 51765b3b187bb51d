"""Tokens drawn along draft trees have the target's distribution, and those of SGLang's sampler."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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

HERE = Path(__file__).parent
Case = dict[str, Any]
#: The largest draw below 1 that SGLang makes.
LAST = 1 - 2.0**-24


# --- sampling ------------------------------------------------------------------------------


def sample(
    walk: dict[str, Tensor],
    probs: Tensor,
    draws: Tensor,
    final: Tensor,
    depth: int,
    **thresholds: float,
) -> dict[str, Tensor]:
    """What `sample_by_target` writes. walk: candidates and links, [batch, nodes]."""
    batch, nodes = walk["candidates"].shape
    written = {
        "predicts": torch.zeros(batch * nodes, dtype=torch.int32),
        "accept_index": torch.full((batch, depth + 1), -1, dtype=torch.int32),
        "accept_token_num": torch.empty(batch, dtype=torch.int32),
    }
    links = {name.replace("retrieve", "retrive"): walk[name] for name in walk}
    trees.sample_by_target(
        **written,
        **links,
        uniform_samples=draws,
        uniform_samples_for_final_sampling=final,
        target_probs=probs,
        draft_probs=torch.zeros_like(probs),
        **thresholds,
    )
    return written


def said(written: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """For each request the accepted nodes, and the token after each of them."""
    batch = len(written["accept_index"])
    nodes = len(written["predicts"]) // batch
    predicts = written["predicts"].tolist()
    return [
        ([row % nodes for row in path if row >= 0], [predicts[row] for row in path if row >= 0])
        for path in written["accept_index"].tolist()
    ]


def tree_of(tokens: list[int], parents: list[int]) -> dict[str, Tensor]:
    """A batch of one tree. tokens: of all nodes; parents: of all but the root."""
    child, sibling = torch.full((2, len(tokens)), trees.NONE)
    trees._link(parents, child, sibling)
    return {
        "candidates": torch.tensor([tokens]),
        "retrieve_index": torch.arange(len(tokens)).unsqueeze(0),
        "retrieve_next_token": child.unsqueeze(0),
        "retrieve_next_sibling": sibling.unsqueeze(0),
    }


#: A target of five tokens: the distribution at first, and after each token.
FIRST = torch.tensor([0.35, 0.25, 0.2, 0.2, 0.0])
AFTER = torch.tensor(
    [
        [0.1, 0.4, 0.3, 0.2, 0.0],
        [0.25, 0.05, 0.6, 0.0, 0.1],
        [0.3, 0.3, 0.1, 0.1, 0.2],
        [0.2, 0.2, 0.2, 0.2, 0.2],
        [0.5, 0.1, 0.1, 0.1, 0.2],
    ]
)
#: (tokens of the nodes, parents): a token is drafted at a node once. 9 is the request's last token.
CHAIN = ([9, 0, 1, 2], [0, 1, 2])
#: Two or three children a node, and not the most probable first.
TREE = ([9, 1, 0, 2, 2, 3, 0, 3, 1, 0], [0, 0, 0, 1, 1, 2, 2, 4, 5])
DEPTH = 3


def worst_fit(shape: tuple[list[int], list[int]], walks: int) -> float:
    """The smallest p-value of what was said after each node, against the target's distribution.

    Tokens behind the first are compared among the walks that got there, which is how they are
    drawn: each walk that accepts a child says one more token.
    """
    torch.manual_seed(1)
    tokens, parents = shape
    nodes = len(tokens)
    probs = torch.stack([FIRST, *(AFTER[token] for token in tokens[1:])])
    tree = tree_of(tokens, parents)
    many = {name: tensor.expand(walks, -1).contiguous() for name, tensor in tree.items()}
    many["retrieve_index"] = torch.arange(walks * nodes).view(walks, nodes)
    many_probs = probs.expand(walks, -1, -1)
    found = sample(many, many_probs, torch.rand(walks, nodes), torch.rand(walks), DEPTH)
    counts = torch.zeros(nodes, probs.shape[1])
    for path, words in said(found):
        for node, word in zip(path, words, strict=True):
            counts[node, word] += 1
    return min(_p_value(c, p) for c, p in zip(counts, probs, strict=True) if c.sum() > 200)


def _p_value(counts: Tensor, probs: Tensor) -> float:
    """Pearson's chi-square test; 0 for a token that the target never says."""
    possible = probs > 0
    if counts[~possible].any():
        return 0.0
    expected = probs[possible] * counts.sum()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor((int(possible.sum()) - 1) / 2)
    return float(torch.special.gammaincc(freedom.double(), statistic.double() / 2))


SHAPES = {"chain": CHAIN, "tree": TREE}


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_the_targets(shape: str) -> None:
    """The seed is fixed. With another one, right code falls below 1e-4 in a run of a thousand, as
    ten nodes are compared; the mistakes below fall under 1e-12 with fewer walks."""
    assert worst_fit(SHAPES[shape], walks=10_000) > 1e-4


#: What is replaced in `sample_by_target`, and the shapes that notice.
WRONG_SAMPLES = {
    "rejected drafts drawn again": (
        "path[-1]], rejected, final",
        "path[-1]], [], final",
        ["chain", "tree"],
    ),
    "each child against the whole draw": ("seen += own", "seen = own", ["tree"]),
    "drafts accepted for being drafted": ("draw * threshold_acc < seen", "True", ["chain", "tree"]),
    "one draw for both": (
        "uniform_samples_for_final_sampling[request]",
        "uniform_samples[request, path[-1]]",
        ["chain", "tree"],
    ),
    "the root's distribution at every node": (
        "target_probs[request, node],",
        "target_probs[request, 0],",
        ["chain", "tree"],
    ),
    "rejected drafts of the node before removed": (
        "            rejected = []\n            for",
        "            for",
        ["tree"],
    ),
}


@pytest.mark.parametrize("wrong", WRONG_SAMPLES)
def test_wrong_tokens_are_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, change, noticing = WRONG_SAMPLES[wrong]
    function = mistaken(trees.sample_by_target, right, change)
    monkeypatch.setattr(trees, "sample_by_target", function)
    for shape in noticing:
        assert worst_fit(SHAPES[shape], walks=2_500) < 1e-12


def first_accepted(draw: float, tokens: list[int], **thresholds: float) -> int | None:
    """The token of the child of the root that is accepted, of siblings in this order."""
    walk = tree_of([9, *tokens], [0] * len(tokens))
    probs = FIRST.expand(1, len(tokens) + 1, -1)
    draws = torch.full((1, len(tokens) + 1), draw)
    found = sample(walk, probs, draws, torch.tensor([0.5]), DEPTH, **thresholds)
    return tokens[int(found["accept_index"][0, 1]) - 1] if found["accept_token_num"][0] else None


def test_thresholds_below_one() -> None:
    """FIRST gives token 0 0.35, token 1 0.25 and token 4 nothing."""
    assert first_accepted(0.6, [0, 1]) is None
    assert first_accepted(0.6, [0, 1], threshold_acc=0.59) == 1
    assert first_accepted(0.6, [0, 1], threshold_acc=0.5) == 0
    assert first_accepted(0.6, [0, 1], threshold_acc=0.0) == 0
    assert first_accepted(0.9, [1, 0], threshold_single=0.3) == 0
    assert first_accepted(0.9, [1, 0], threshold_single=0.25) == 1
    assert first_accepted(0.9, [1, 0], threshold_single=0.36) is None
    # As SGLang's kernel: nothing accepts a token that the target never says.
    assert first_accepted(0.0, [4, 1], threshold_single=0.0) == 1
    assert first_accepted(0.0, [4], threshold_single=0.0, threshold_acc=0.0) is None


@st.composite
def targets(draw: st.DrawFn) -> tuple[list[list[float]], list[float], list[float], float]:
    """Distributions with zeros after six nodes, draws at the ends and between, a threshold."""
    weights = st.lists(st.sampled_from([0, 0, 1, 3, 1000]), min_size=5, max_size=5).filter(any)
    rows = [[w / sum(row) for w in row] for row in draw(st.tuples(*[weights] * 6))]
    uniform = st.sampled_from([0.0, 0.3, 0.5, LAST])
    return (
        rows,
        draw(st.lists(uniform, min_size=6, max_size=6)),
        draw(st.lists(uniform, min_size=1, max_size=1)),
        draw(st.sampled_from([0.0, 0.3, 1.0])),
    )


def only_possible_tokens(
    example: tuple[list[list[float]], list[float], list[float], float],
) -> None:
    rows, draws, final, single = example
    probs = torch.tensor([rows])
    walk = tree_of([9, 0, 1, 2, 3, 4], [0, 0, 1, 1, 2])
    found = sample(
        walk, probs, torch.tensor([draws]), torch.tensor(final), DEPTH, threshold_single=single
    )
    ((path, words),) = said(found)
    assert all(probs[0, node, word] > 0 for node, word in zip(path, words, strict=True))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(example=targets())
def test_impossible_tokens_are_never_said(
    example: tuple[list[list[float]], list[float], list[float], float],
) -> None:
    only_possible_tokens(example)


@pytest.mark.parametrize(
    ("name", "right", "wrong", "example"),
    [
        (
            "drawn",
            "right=True",
            "right=False",
            ([[0.0, 0, 0, 0, 1]] * 6, [LAST] * 6, [0.0], 1.0),
        ),
        (
            "sample_by_target",
            "own > 0 and",
            "True and",
            ([[0.0, 0, 0, 0, 1]] * 6, [0.5] * 6, [0.5], 0.0),
        ),
        # In fp32 the two add up to less than the draw.
        (
            "drawn",
            "return int(probs.argmax())",
            "return len(probs) - 1",
            ([[0.5, 0.49999994, 0, 0, 0]] * 6, [LAST] * 6, [0.5], 1.0),
        ),
    ],
)
def test_an_impossible_token_is_noticed(
    name: str,
    right: str,
    wrong: str,
    example: tuple[list[list[float]], list[float], list[float], float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only_possible_tokens(example)
    monkeypatch.setattr(trees, name, mistaken(getattr(trees, name), right, wrong))
    with pytest.raises(AssertionError):
        only_possible_tokens(example)


# --- what is left of a distribution --------------------------------------------------------


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
