"""SGLang's rotary module as a table of angles for our own rotation."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

from jit_kernels.qk_norm_rope.contract import Rotation
from sglang_minimax.layers.fusion import ROTATION_RULES, RotationFacts, first_reason

# Every way in which SGLang may call a rotary module; a class that replaces one computes its own.
_FORWARDS = ("forward", "forward_native", "forward_cuda", "forward_cpu", "forward_xpu")


def facts_of(rotary: Any, *, head_dim: int, implementation: str, device: str) -> RotationFacts:
    """What decides whether our rotation equals the module's."""
    name = type(rotary).__name__
    plain = isinstance(rotary, RotaryEmbedding)
    own = not plain or any(
        getattr(type(rotary), forward) is not getattr(RotaryEmbedding, forward)
        for forward in _FORWARDS
    )
    return RotationFacts(
        module=name,
        own_forward=own or hasattr(rotary, "sin_cos_cache"),
        neox=plain and rotary.is_neox_style,
        native=plain and rotary._force_native,
        head_size=rotary.head_size if plain else 0,
        rotary_dim=rotary.rotary_dim if plain else 0,
        cache_shape=tuple(rotary.cos_sin_cache.shape) if plain else (),
        cache_dtype=rotary.cos_sin_cache.dtype if plain else torch.float32,
        head_dim=head_dim,
        implementation=implementation,
        device=device,
    )


def why_not(rotary: Any, *, head_dim: int, implementation: str, device: str) -> str:
    """Why SGLang's module rotates after our norm; empty where our call rotates."""
    facts = facts_of(rotary, head_dim=head_dim, implementation=implementation, device=device)
    return first_reason(ROTATION_RULES, facts)


def rotation(rotary: Any, positions: torch.Tensor, head_dim: int) -> Rotation:
    """positions: [tokens]. The table is read from the module each time: SGLang may replace it."""
    return Rotation(positions, rotary.cos_sin_cache, head_dim)
