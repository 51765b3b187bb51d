"""Requests with top-k and top-p, as MiniMax recommends them, beside drafted tokens.

SGLang's sampler keeps the tokens that pass both filters, each on the whole distribution (`joint`
in srt/layers/sampler.py). Its verification of drafted tokens, `eagle_sample`, scales what top-k has
left to 1 and applies top-p to that: fewer tokens pass than without a draft. For our model top-p
sees the whole distribution there, too. How the filters of a platform cut, and how they treat ties,
is left to them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from sglang_minimax import ARCHITECTURE

Filter = Callable[[Tensor, Tensor], Tensor]

_verifying_ours: ContextVar[bool] = ContextVar("verifying_ours", default=False)
# Where a filtered distribution keeps the one it was made of.
_WHOLE = "_sglang_minimax_whole"


@contextmanager
def joined() -> Iterator[None]:
    """Apply the two filters jointly meanwhile."""
    token = _verifying_ours.set(True)
    try:
        yield
    finally:
        _verifying_ours.reset(token)


def join_for_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `eagle_sample(verify_input, batch, ...)`."""

    @functools.wraps(original)
    def eagle_sample(verify_input: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if not (_is_ours(batch) and _has_both(batch.sampling_info)):
            return original(verify_input, batch, *args, **kwargs)
        with joined():
            return original(verify_input, batch, *args, **kwargs)

    return eagle_sample


def _is_ours(batch: Any) -> bool:
    return ARCHITECTURE in (batch.model_config.hf_config.architectures or [])


def _has_both(sampling: Any) -> bool:
    # The idle rank of a DP group may have none.
    return bool(sampling and sampling.need_top_k_sampling and sampling.need_top_p_sampling)


def remember_the_whole(original: Filter | None) -> Filter | None:
    """Wrap `top_k_renorm_prob(probs, top_ks)`, which is None where a platform has none."""
    if original is None:
        return None

    def top_k_renorm_prob(probs: Tensor, top_ks: Tensor) -> Tensor:
        kept = original(probs, top_ks)
        if _verifying_ours.get() and kept is not probs:
            setattr(kept, _WHOLE, probs)
        return kept

    return top_k_renorm_prob


def filter_the_whole(original: Filter | None) -> Filter | None:
    """Wrap `top_p_renorm_prob(probs, top_ps)`, which is None where a platform has none.

    Of what top-k has left, a token stays if top-p keeps it in the whole distribution. The most
    likely token passes both, so the sum is never 0. Each of the tensors is as large as the logits:
    what top-k has left is filtered in place, and the whole is let go.
    """
    if original is None:
        return None

    def top_p_renorm_prob(probs: Tensor, top_ps: Tensor) -> Tensor:
        whole = vars(probs).pop(_WHOLE, None)
        if whole is None:
            return original(probs, top_ps)
        probs.masked_fill_(original(whole, top_ps) <= 0, 0)
        return probs.div_(probs.sum(dim=-1, keepdim=True))

    return top_p_renorm_prob
