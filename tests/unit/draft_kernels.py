"""Draft trees and their slots by SGLang's Triton kernels; `test_draft_trees` runs this file.

Triton decides when it is imported whether kernels are interpreted, so this is a process of its own.
Called with the file that is written: for each kernel a list of cases, each a dictionary of what it
was called with and what it made. Our replacements wrap SGLang's functions; they are unwrapped here.
"""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Any

import torch
from sglang.kernels.ops.speculative import cache_locs, eagle, spec_tree
from sglang.srt.mem_cache import allocation
from sglang.srt.speculative import spec_utils
from sglang.srt.speculative.eagle_utils import organize_draft_results
from torch import Tensor

Case = dict[str, Any]

#: (topk, steps, nodes, batch); the last has fewer nodes than its depth.
SHAPES = [
    (1, 1, 2, 1),
    (1, 3, 4, 3),
    (2, 1, 3, 2),
    (2, 2, 5, 1),
    (2, 3, 8, 4),
    (3, 2, 9, 2),
    (3, 4, 7, 2),
    (4, 2, 10, 2),
    (4, 3, 6, 3),
    (2, 5, 4, 2),
]
VOCABULARY = 6


def drafted(topk: int, steps: int, nodes: int, batch: int, certain: bool) -> tuple[Tensor, ...]:
    """What SGLang's draft worker hands over: (parent_list, chosen, tokens).

    certain: the first draft of each node has probability 1, so that a child ties with its parent.
    """
    score_list, token_list, parents_list, scores = [], [], [], None
    for step in range(steps):
        rows = batch * (topk if step else 1)
        probs = torch.rand(rows, VOCABULARY).softmax(dim=-1).topk(topk, dim=-1).values
        if certain:
            probs = torch.eye(1, topk).repeat(rows, 1)
        tokens = torch.rand(rows, VOCABULARY).argsort(dim=-1)[:, :topk].contiguous()
        hidden = torch.zeros(rows, 1)
        _, _, scores, tree = spec_utils.select_top_k_tokens(
            step, probs, tokens, hidden, scores, topk
        )
        for part, found in zip((score_list, token_list, parents_list), tree, strict=True):
            part.append(found)
    return organize_draft_results(score_list, token_list, parents_list, nodes)


def wanted(
    candidates: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
) -> Tensor:
    """The target's token after each node: mostly that of one of its children, or any."""
    target = torch.randint(VOCABULARY, candidates.shape)
    for request, row in enumerate(retrieve_next_token.tolist()):
        for node, child in enumerate(row):
            while child != -1 and torch.rand(()) < 0.9:
                target[request, node] = candidates[request, child]
                further = int(retrieve_next_sibling[request, child])
                child = further if further != -1 and torch.rand(()) < 0.5 else -1
    return target


def tree(shape: tuple[int, int, int, int], mode: int, certain: bool) -> Case:
    """`sgl_build_tree_kernel_triton`, then `verify_tree_greedy_triton` on what it made."""
    topk, steps, nodes, batch = shape
    parent_list, chosen, tokens = drafted(topk, steps, nodes, batch, certain)
    seq_lens = torch.randint(1, 9, (batch,))
    size = int(seq_lens.sum()) * nodes if mode == 0 else 0
    made = {
        "tree_mask": torch.ones(size + batch * nodes * nodes, dtype=torch.bool),
        "positions": torch.empty(batch * nodes, dtype=torch.int64),
        "retrieve_index": torch.full((batch, nodes), -1),
        "retrieve_next_token": torch.full((batch, nodes), -1),
        "retrieve_next_sibling": torch.full((batch, nodes), -1),
    }
    given = {"parent_list": parent_list, "top_scores_index": chosen, "seq_lens": seq_lens}
    plain = {"topk": topk, "tree_mask_mode": mode}
    spec_tree.sgl_build_tree_kernel_triton(
        *given.values(), *made.values(), topk, steps, nodes, spec_tree.TreeMaskMode(mode)
    )
    given |= plain | {"spec_steps": steps, "num_verify_tokens": nodes}
    bonus = torch.randint(VOCABULARY, (batch, 1))
    links = {name: made[name] for name in made if name.startswith("retrieve")}
    candidates = torch.cat((bonus, tokens), dim=1)
    walked = {"candidates": candidates, **links, "target_predict": wanted(candidates, **links)}
    written = {
        "predicts": torch.zeros(batch * nodes, dtype=torch.int32),
        "accept_index": torch.full((batch, steps + 1), -1, dtype=torch.int32),
        "accept_token_num": torch.empty(batch, dtype=torch.int32),
    }
    spec_tree.verify_tree_greedy_triton(**written, **walked)
    return {"given": given, "made": made, "walked": walked, "written": written}


def table(batch: int) -> tuple[Tensor, Tensor]:
    """(rows of requests, a slot table in which each slot appears once)."""
    slots = torch.randperm(6 * 200).view(6, 200).int()
    return torch.randperm(6)[:batch], slots


def between(batch: int, width: int) -> Case:
    """`assign_extend_cache_locs`, the kernel of which the platform gives its own."""
    rows, slots = table(batch)
    start = torch.randint(1, 40, (batch,))
    made = torch.empty(batch * width, dtype=torch.int64)
    cache_locs.assign_extend_cache_locs[(batch,)](
        rows, slots, start, start + width, made, slots.shape[1], 4
    )
    given = (rows, slots, start, start + width, batch, width, "cpu")
    return {"given": given, "made": made}


def drafts(batch: int, topk: int, steps: int) -> Case:
    """`assign_draft_cache_locs_contiguous_func`."""
    rows, slots = table(batch)
    lengths, made = torch.randint(1, 40, (batch,)), torch.empty(batch * topk * steps).long()
    assign = inspect.unwrap(cache_locs.assign_draft_cache_locs_contiguous_func)
    assign(rows, slots, lengths, made, topk, steps)
    return {"given": (rows, slots, lengths, torch.zeros_like(made), topk, steps), "made": made}


def recorded(batch: int) -> Case:
    """`assign_req_to_token_pool_func`, for requests that get none, some and many slots."""
    rows, slots = table(batch)
    start = torch.randint(1, 40, (batch,))
    end = start + torch.tensor([0, 3, 37, 1])[:batch]
    new = torch.randperm(int((end - start).sum())) + 1000
    given = (rows, slots.clone(), start, end, new, batch)
    inspect.unwrap(allocation.assign_req_to_token_pool_func)(rows, slots, start, end, new, batch)
    return {"given": given, "made": slots}


def bonus(batch: int, width: int) -> Case:
    """`fill_bonus_tokens_func`."""
    tokens = torch.randperm(batch * width).int()
    lengths = torch.randint(1, width + 1, (batch,)).int()
    made = torch.empty(batch, dtype=torch.int32)
    inspect.unwrap(eagle.fill_bonus_tokens_func)(tokens, lengths, made, width, batch)
    return {"given": (tokens, lengths, torch.zeros_like(made), width, batch), "made": made}


def moved(batch: int, nodes: int, width: int) -> Case:
    """`move_accept_tokens_to_target_kvcache`, on a cache that holds each slot's number.

    Paths of ascending nodes, as in a tree. The kernel also moves slot 0 to itself, which is
    SGLang's slot for padding.
    """
    window = torch.randperm(200)[: batch * nodes] + 1
    index = torch.full((batch, width), -1, dtype=torch.int32)
    for request in range(batch):
        length = 1 + (request + 2) % min(width, nodes)
        path = torch.randperm(nodes - 1)[: length - 1].sort().values + 1
        index[request, :length] = torch.cat((torch.zeros(1).long(), path)) + request * nodes
    correct = (index >= 0).sum(dim=1).int() - 1
    cache = torch.arange(201)

    def move(target: Tensor, source: Tensor) -> None:
        cache[target] = cache[source]

    pool = SimpleNamespace(get_kvcache=lambda: SimpleNamespace(move_kv_cache=move))
    batch_of = SimpleNamespace(seq_lens=torch.zeros(batch), out_cache_loc=window)
    move_accepted = inspect.unwrap(spec_utils.move_accept_tokens_to_target_kvcache)
    move_accepted(batch_of, index, correct, pool)
    return {"given": (window, index, correct), "made": cache}


def main(path: str) -> None:
    torch.manual_seed(0)
    trees = [
        tree(shape, mode, certain)
        for shape in SHAPES
        for mode in (0, 1)
        for certain in (False, True)
    ]
    found = {
        "trees": trees,
        "between": [between(3, 5), between(1, 40), between(4, 1)],
        "drafts": [drafts(3, 1, 3), drafts(2, 4, 5), drafts(1, 4, 40)],
        "recorded": [recorded(2), recorded(4)],
        "bonus": [bonus(1, 4), bonus(4, 3)],
        "moved": [moved(1, 4, 4), moved(4, 12, 4), moved(3, 3, 6)],
    }
    torch.save(found, path)


if __name__ == "__main__":
    main(sys.argv[1])
