"""Tokens drawn along draft trees have the target's distribution, and those of SGLang's sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sglang_minimax.platforms.cpu.speculation import trees
from tests.unit.draft_mistakes import mistaken

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
