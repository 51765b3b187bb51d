"""Draft trees in plain PyTorch: built, and walked by what the target says.

References for SGLang's kernels of the same names, which have builds for GPUs and for its own CPU
engine only. A tree has `nodes` nodes in an order in which parents come before their children:
node 0 is the last token of the request, the others are drafted. Links are as SGLang's: each node
knows its first child and its next sibling, both as node numbers, -1 for none.

Where the layout comes from: EAGLE-2 (arXiv 2406.16858), and SGLang's spec_tree.py. Sampling is
SpecInfer's walk (arXiv 2305.09781) for drafts that are taken as certain, which keeps the target's
distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor

NONE = -1


def parents_of(parent_list: Tensor, chosen: Tensor, topk: int) -> Tensor:
    """The parent of each drafted node, [batch, nodes - 1] int64: 0 for the root, -1 for no parent.

    chosen: [batch, nodes - 1], for each drafted node its index among all that were drafted, in
    ascending order. parent_list: [batch, ...], for each group of `topk` drafted together the
    index of what they continue; the group 0 continues the root.
    """
    batch, drafted = chosen.shape
    group = torch.div(chosen, topk, rounding_mode="floor")
    if parent_list.shape[-1] == 0:
        return torch.zeros(batch, drafted, dtype=torch.int64)
    continued = parent_list.long().gather(1, group.clamp(max=parent_list.shape[-1] - 1))
    match = chosen.unsqueeze(1) == continued.unsqueeze(2)  # [batch, node, candidate parent]
    position = match.int().argmax(dim=2) + 1
    # A continued node that was not chosen leaves its children without a parent. Scores never rise
    # along a path, so it takes a tie, which drafts that are certain make: 1.0 times 1.0.
    position = torch.where(match.any(dim=2), position, NONE)
    return torch.where(group > 0, position, 0)


def ancestry(parents: Tensor) -> tuple[Tensor, Tensor]:
    """(mask, depth) of trees: who attends whom, [batch, nodes, nodes] bool, and [batch, nodes].

    A node attends itself and the nodes on its way to the root. One without a parent attends the
    root, as SGLang's kernel has it.
    """
    batch, drafted = parents.shape
    parents = parents.clamp(min=0)
    nodes = drafted + 1
    mask = torch.eye(nodes, dtype=torch.bool).repeat(batch, 1, 1)
    rows = torch.arange(batch)
    for node in range(1, nodes):  # parents come first
        mask[:, node] |= mask[rows, parents[:, node - 1]]
    return mask, mask.sum(dim=2) - 1


def build_tree(
    parent_list: Tensor,
    top_scores_index: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: int,
) -> None:
    """Fill the five tensors of `build_tree_kernel_efficient_func`, in place.

    parent_list, top_scores_index: `parent_list` and `chosen` of `parents_of`.
    seq_lens: [batch], tokens before the tree. tree_mask: flat bool; for each request [nodes,
    seq_len + nodes] (mode 0), of which the columns before the tree are left as they are, or
    [nodes, nodes] (mode 1). positions: [batch * nodes] int64. The three links: [batch, nodes]
    int64, filled with -1. Raises NotImplementedError for the bit-packed mode.
    """
    if int(tree_mask_mode) not in (0, 1):
        raise NotImplementedError("bit-packed tree masks are not used on the CPU platform")
    nodes = num_verify_tokens
    parents = parents_of(parent_list, top_scores_index, topk)
    mask, depth = ancestry(parents)
    batch = len(seq_lens)
    positions.copy_((seq_lens.long().unsqueeze(1) + depth).flatten())
    retrieve_index.copy_(torch.arange(batch * nodes).view(batch, nodes))
    for request in range(batch):
        _link(
            parents[request].tolist(), retrieve_next_token[request], retrieve_next_sibling[request]
        )
    if int(tree_mask_mode) == 1:
        tree_mask[: mask.numel()] = mask.flatten()
        return
    start = 0
    for request, length in enumerate(seq_lens.tolist()):
        size = nodes * (length + nodes)
        tree_mask[start : start + size].view(nodes, length + nodes)[:, length:] = mask[request]
        start += size


def _link(parents: list[int], first_child: Tensor, next_sibling: Tensor) -> None:
    """Chain the children of each node of one tree; the earliest drafted comes first.

    A node without a parent is nobody's child, so that no walk reaches it: next to the root's
    children it could repeat one's token, which sampling would then count twice.
    """
    child, sibling = first_child.tolist(), next_sibling.tolist()
    for node in range(len(parents), 0, -1):
        parent = parents[node - 1]
        if parent != NONE:
            sibling[node], child[parent] = child[parent], node
    first_child.copy_(torch.tensor(child))
    next_sibling.copy_(torch.tensor(sibling))


def children(node: int, first_child: list[int], next_sibling: list[int]) -> list[int]:
    """The children of a node, in the order in which they are tried."""
    found, child = [], first_child[node]
    while child != NONE:
        found.append(child)
        child = next_sibling[child]
    return found


def verify_greedy(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    target_predict: Tensor,
    topk: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk each tree along the target's own tokens, as `verify_tree_greedy_func`.

    candidates, target_predict and the links: [batch, nodes]; target_predict is the token that the
    target puts after each node. Written in place: predicts [batch * nodes], the target's token at
    each accepted node; accept_index [batch, depth + 1], the accepted nodes as rows of predicts;
    accept_token_num [batch], accepted drafts without the root. Returns the three.
    """
    for request, (first_child, next_sibling, tokens, wanted) in enumerate(
        zip(
            retrieve_next_token.tolist(),
            retrieve_next_sibling.tolist(),
            candidates.tolist(),
            target_predict.tolist(),
            strict=True,
        )
    ):
        path = [0]
        while len(path) < accept_index.shape[1]:
            node = path[-1]
            after = children(node, first_child, next_sibling)
            match = [child for child in after if tokens[child] == wanted[node]]
            if not match:
                break
            path.append(match[0])
        said = [wanted[node] for node in path]
        _accept(retrieve_index[request, path], said, predicts, accept_index[request])
        accept_token_num[request] = len(path) - 1
    return predicts, accept_index, accept_token_num


def _accept(rows: Tensor, tokens: list[int], predicts: Tensor, accept_index: Tensor) -> None:
    accept_index[: len(rows)] = rows
    predicts[rows] = torch.tensor(tokens, dtype=predicts.dtype)


def sample_by_target(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """Sample along each tree from the target, as `tree_speculative_sampling_target_only`.

    target_probs: [batch, nodes, vocabulary] fp32, the target's distribution after each node.
    uniform_samples [batch, nodes] and uniform_samples_for_final_sampling [batch]: in [0, 1). One
    draw decides among the children of a node: child by child, their probabilities are added up
    until the sum exceeds it. If no child is taken, the token comes from what is left of the
    distribution without them. With both thresholds at 1 that is the target's distribution. A
    threshold below 1 accepts a child whose own probability reaches `threshold_single`, or a sum
    that exceeds `threshold_acc` times the draw, but never one without any. Writes what
    `verify_greedy` writes.
    """
    for request, (first_child, next_sibling, tokens) in enumerate(
        zip(
            retrive_next_token.tolist(),
            retrive_next_sibling.tolist(),
            candidates.tolist(),
            strict=True,
        )
    ):
        path, said = [0], []
        rejected: list[int] = []
        while len(path) < accept_index.shape[1]:
            node, seen, taken = path[-1], 0.0, NONE
            probs, draw = target_probs[request, node], float(uniform_samples[request, node])
            rejected = []
            for child in children(node, first_child, next_sibling):
                own = float(probs[tokens[child]])
                seen += own
                if own > 0 and (draw * threshold_acc < seen or own >= threshold_single):
                    taken = child
                    break
                rejected.append(tokens[child])
            if taken == NONE:
                break
            path.append(taken)
            said.append(tokens[taken])
        else:
            rejected = []  # at the last node nothing was tried
        final = float(uniform_samples_for_final_sampling[request])
        said.append(drawn(target_probs[request, path[-1]], rejected, final))
        _accept(retrive_index[request, path], said, predicts, accept_index[request])
        accept_token_num[request] = len(path) - 1


def drawn(probs: Tensor, rejected: list[int], uniform: float) -> int:
    """A token of [vocabulary] `probs` without the rejected ones, by a draw in [0, 1)."""
    left = probs.double()
    if rejected:
        left = left.clone()
        left[rejected] = 0
    summed = left.cumsum(0)
    if float(summed[-1]) <= 0:  # rounding took everything: the children held all of it
        return int(probs.argmax())
    token = int(torch.searchsorted(summed, uniform * summed[-1], right=True))
    return min(token, int(left.nonzero()[-1]))


def keep_top_k(probs: Tensor, top_ks: Tensor) -> Tensor:
    """[rows, vocabulary] probabilities of which each row keeps its `top_ks` largest, summing to 1.

    Exactly as many, the first of equal ones, as SGLang's sampler in PyTorch: a request at
    temperature 0 comes as top-k 1 and must get the argmax.
    """
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    dropped = torch.arange(probs.shape[-1]) >= top_ks.long().unsqueeze(-1)
    return _scaled(torch.zeros_like(probs).scatter(-1, index, ordered.masked_fill(dropped, 0)))


def keep_top_p(probs: Tensor, top_ps: Tensor) -> Tensor:
    """[rows, vocabulary] probabilities of which each row keeps the largest, summing to 1.

    A token stays where those before it sum to at most `top_ps`, as in SGLang's sampler in PyTorch.
    What becomes of a request with both options is in `patches/joint_filters.py`.
    """
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    dropped = ordered.cumsum(dim=-1) - ordered > top_ps.unsqueeze(-1)
    return _scaled(torch.zeros_like(probs).scatter(-1, index, ordered.masked_fill(dropped, 0)))


def _scaled(probs: Tensor) -> Tensor:
    return probs / probs.sum(dim=-1, keepdim=True)
