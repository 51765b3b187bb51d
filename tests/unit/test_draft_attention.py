"""Attention over draft trees, against a softmax over each row's own tokens, one row at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_minimax.platforms.cpu.speculation import attention, trees
from sglang_minimax.platforms.cpu.speculation.attention import DraftSteps, Reads, attend
from tests.unit.draft_mistakes import mistaken

HEADS, KV_HEADS, DIM, SLOTS = 6, 2, 4, 100
#: Not 1 / sqrt(DIM), which PyTorch takes when it is told nothing.
SCALING = 0.3
#: fp32; observed 3e-7.
CLOSE = 2e-6


class Cache:
    """Keys and values of random slots, a slot table of three requests in a random order."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.keys, self.values = torch.randn(2, SLOTS, KV_HEADS, DIM)
        self.table = torch.randperm(SLOTS)[:90].view(3, 30).int()
        self.rows = torch.tensor([2, 0, 1])
        self.lengths = torch.tensor([5, 1, 9])


def one_row(query: Tensor, cache: Cache, slots: list[int]) -> Tensor:
    """[heads, head_dim] attention of one row over the tokens in `slots`, head by head."""
    out = torch.empty(HEADS, DIM)
    for head in range(HEADS):
        keys, values = (
            rows[slots, head // (HEADS // KV_HEADS)] for rows in (cache.keys, cache.values)
        )
        out[head] = (keys @ query[head] * SCALING).softmax(dim=0) @ values
    return out


def agrees(cache: Cache, reads: list[Reads], expected: list[list[int]], padding: int = 2) -> bool:
    """Whether each row's output is that over the slots it should read, and padding is zero."""
    query = torch.randn(len(expected) + padding, HEADS, DIM)
    query[len(expected) :] = torch.nan
    output = torch.full_like(query, torch.nan)
    found = attend(query, cache.keys, cache.values, reads, output, SCALING)
    wanted = torch.stack([one_row(query[i], cache, slots) for i, slots in enumerate(expected)])
    return (
        found is output
        and bool((found[len(expected) :] == 0).all())
        and torch.allclose(found[: len(expected)], wanted, rtol=0, atol=CLOSE)
    )


# --- verify --------------------------------------------------------------------------------

#: The parent of each node but the root.
SHAPES = {"chain": [0, 1, 2, 3], "tree": [0, 0, 1, 2, 2, 4, 1], "root alone": []}


def verified(cache: Cache, parents: list[int], padded: int = 0) -> tuple[Any, list[list[int]]]:
    """A batch with the mask that `build_tree` makes, and the slots that each node should read.

    padded: more requests behind those that have a tree, as DP attention adds them.
    """
    nodes, batch = len(parents) + 1, len(cache.rows)
    mask = torch.ones(int(cache.lengths.sum() + batch * nodes) * nodes, dtype=torch.bool)
    tree, _ = trees.ancestry(torch.tensor([parents] * batch, dtype=torch.int64))
    start = 0
    expected = []
    for row, length, one in zip(cache.rows.tolist(), cache.lengths.tolist(), tree, strict=True):
        size = nodes * (length + nodes)
        mask[start : start + size].view(nodes, -1)[:, length:] = one
        start += size
        before = list(range(length))
        for node in range(nodes):
            path, at = [node], node
            while at:
                at = parents[at - 1]
                path.append(at)
            places = before + [length + each for each in path]
            expected.append(cache.table[row, places].tolist())
    info = SimpleNamespace(
        draft_token_num=nodes, draft_token=torch.zeros(batch * nodes), custom_mask=mask
    )
    more = torch.zeros(padded, dtype=torch.int64)
    made = SimpleNamespace(
        spec_info=info,
        req_pool_indices=torch.cat((cache.rows, more)),
        seq_lens=torch.cat((cache.lengths, more + 1)),
    )
    return made, expected


def verify_agrees(parents: list[int], padded: int = 0) -> bool:
    cache = Cache(len(parents))
    batch, expected = verified(cache, parents, padded)
    reads = attention.verify_reads(batch, cache.table)
    return agrees(cache, reads, expected, padding=padded * (len(parents) + 1))


@pytest.mark.parametrize("padded", [0, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_verified_nodes_read_their_ancestors(shape: str, padded: int) -> None:
    assert verify_agrees(SHAPES[shape], padded)


WRONG_MASKS = {
    "transposed": lambda read: replace(
        read, mask=torch.cat((read.mask[:, : -read.rows], read.mask[:, -read.rows :].t()), dim=1)
    ),
    "the prefix masked": lambda read: replace(
        read,
        mask=torch.cat(
            (torch.zeros_like(read.mask[:, : -read.rows]), read.mask[:, -read.rows :]), dim=1
        ),
    ),
    "the first token masked": lambda read: replace(
        read, mask=read.mask & (torch.arange(read.mask.shape[1]) > 0)
    ),
    "none": lambda read: replace(read, mask=None),
    "causal among all nodes": lambda read: replace(
        read, mask=torch.ones_like(read.mask).tril(read.mask.shape[1] - read.rows)
    ),
}


@pytest.mark.parametrize("wrong", WRONG_MASKS)
def test_a_wrong_mask_is_noticed(wrong: str) -> None:
    cache = Cache(1)
    batch, expected = verified(cache, SHAPES["tree"])
    reads = attention.verify_reads(batch, cache.table)
    assert agrees(cache, reads, expected)
    assert not agrees(cache, [WRONG_MASKS[wrong](read) for read in reads], expected)


# --- draft extend --------------------------------------------------------------------------


def extend_agrees() -> bool:
    """Requests that extend by other numbers of tokens, one of them from nothing."""
    cache = Cache(7)
    lengths, rows = cache.lengths + 4, torch.tensor([4, 5, 2])
    batch = SimpleNamespace(req_pool_indices=cache.rows, seq_lens=lengths, extend_seq_lens=rows)
    expected = [
        cache.table[row, : position + 1].tolist()
        for row, length, count in zip(
            cache.rows.tolist(), lengths.tolist(), rows.tolist(), strict=True
        )
        for position in range(length - count, length)
    ]
    return agrees(cache, attention.extend_reads(batch, cache.table), expected)


def test_extended_tokens_read_all_before_them() -> None:
    assert extend_agrees()


# --- draft decode --------------------------------------------------------------------------


def steps_agree(topk: int, steps: int) -> bool:
    """Each branch reads its request's tokens and its own slots up to this step."""
    cache = Cache(topk)
    free = torch.tensor(sorted({*range(SLOTS)} - {*cache.table[:, :10].flatten().tolist()}))
    own = free[torch.randperm(len(free))][: 3 * topk * steps]
    runner: Any = SimpleNamespace(
        device="cpu",
        req_to_token_pool=SimpleNamespace(req_to_token=cache.table),
        token_to_kv_pool=None,
    )
    backend = DraftSteps(runner, topk, steps)
    batch: Any = SimpleNamespace(
        out_cache_loc=own, req_pool_indices=cache.rows, seq_lens=cache.lengths
    )
    backend.init_forward_metadata(batch)
    assert len(backend.attn_backends) == steps - 1
    requests = list(zip(cache.rows.tolist(), cache.lengths.tolist(), strict=True))
    return all(
        agrees(
            cache,
            one.reads,
            [
                cache.table[row, :length].tolist()
                + [int(own[(i * topk + branch) * steps + before]) for before in range(step + 1)]
                for i, (row, length) in enumerate(requests)
                for branch in range(topk)
            ],
        )
        for step, one in enumerate(backend.attn_backends)
    )


@pytest.mark.parametrize(("topk", "steps"), [(1, 2), (1, 4), (3, 3), (2, 1)])
def test_branches_read_their_own_tokens(topk: int, steps: int) -> None:
    assert steps_agree(topk, steps)


# --- mistakes in each of them --------------------------------------------------------------

MISTAKES: dict[str, tuple[Callable[[], bool], str, str, str]] = {
    "the next request's mask": (
        lambda: verify_agrees(SHAPES["tree"]),
        "verify_reads",
        "start += nodes * width",
        "start += nodes * nodes",
    ),
    "slots of the table's first row": (
        lambda: verify_agrees(SHAPES["chain"]),
        "verify_reads",
        "req_to_token[row, :width]",
        "req_to_token[0, :width]",
    ),
    "padding verified": (
        lambda: verify_agrees(SHAPES["chain"], padded=1),
        "verify_reads",
        "[: len(info.draft_token) // nodes]",
        "[:]",
    ),
    "extended tokens see the later ones": (
        extend_agrees,
        "extend_reads",
        ".tril(length - rows)",
        ".tril(length)",
    ),
    "extended tokens see one token less": (
        extend_agrees,
        "extend_reads",
        ".tril(length - rows)",
        ".tril(length - rows - 1)",
    ),
    "heads not in groups": (
        lambda: verify_agrees(SHAPES["chain"]),
        "attend",
        "key.transpose(0, 1).unsqueeze(0)",
        "key.transpose(0, 1).unsqueeze(0).roll(1, 1)",
    ),
    "PyTorch's own scaling": (
        lambda: verify_agrees(SHAPES["chain"]),
        "attend",
        "scale=scaling",
        "scale=None",
    ),
    "padding left as it is": (
        lambda: verify_agrees(SHAPES["chain"], padded=1),
        "attend",
        "output[start:] = 0",
        "pass",
    ),
    "rows of the request before": (
        lambda: verify_agrees(SHAPES["chain"]),
        "attend",
        "start += read.rows",
        "start += 0",
    ),
    "slots of another branch": (
        lambda: steps_agree(3, 3),
        "init_forward_metadata",
        "own[request, branch",
        "own[request, branch - 1",
    ),
    "slots by step, then branch": (
        lambda: steps_agree(3, 3),
        "init_forward_metadata",
        "view(-1, self.topk, self.steps)",
        "view(-1, self.steps, self.topk).transpose(1, 2)",
    ),
    "a branch does not see itself": (
        lambda: steps_agree(1, 2),
        "init_forward_metadata",
        ": step + 1",
        ": step",
    ),
}


@pytest.mark.parametrize("wrong", MISTAKES)
def test_a_mistake_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agreement, name, *change = MISTAKES[wrong]
    home: Any = DraftSteps if name == "init_forward_metadata" else attention
    changed = mistaken(getattr(home, name), *change)
    monkeypatch.setattr(home, name, changed)
    monkeypatch.setitem(globals(), name, changed)
    try:
        same = agreement()
    except (RuntimeError, IndexError):
        same = False
    assert not same


# --- the backends --------------------------------------------------------------------------


def mode(name: str) -> Any:
    return SimpleNamespace(
        is_target_verify=lambda: name == "verify", is_draft_extend_v2=lambda: name == "extend"
    )


def test_a_plain_batch_is_left_to_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of the batch before must not be used for a prompt."""
    cache = Cache(1)
    runner: Any = SimpleNamespace(
        device="cpu",
        req_to_token_pool=SimpleNamespace(req_to_token=cache.table),
        token_to_kv_pool=None,
    )
    backend = attention.TreeAttention(runner)
    calls = []

    def plain(self: Any, *given: Any, **named: Any) -> None:
        calls.append((given, named))

    monkeypatch.setattr(attention.TorchNativeAttnBackend, "_run_sdpa_forward_extend", plain)
    batch, expected = verified(cache, SHAPES["tree"])
    batch.forward_mode, batch.out_cache_loc = mode("verify"), None
    backend.init_forward_metadata(batch)
    query = torch.randn(len(expected), HEADS, DIM)
    output = torch.empty_like(query)
    named = {"scaling": SCALING, "enable_gqa": True, "causal": True}
    given = (query, output, cache.keys, cache.values, cache.table)
    backend._run_sdpa_forward_extend(*given, **named)
    assert not calls
    assert torch.allclose(output[0], one_row(query[0], cache, expected[0]), rtol=0, atol=CLOSE)
    batch.forward_mode = mode("prompt")
    backend.init_forward_metadata(batch)
    backend._run_sdpa_forward_extend(*given, **named)
    assert calls == [(given, named)]


def test_the_container_of_steps_computes_nothing() -> None:
    runner: Any = SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None)
    backend = DraftSteps(runner, 1, 3)
    unused: Any = None
    with pytest.raises(NotImplementedError):
        backend.forward_decode()
    with pytest.raises(NotImplementedError):
        backend.forward_extend(unused, unused, unused, unused, unused)
