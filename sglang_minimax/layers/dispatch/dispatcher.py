"""What our dispatchers have in common: how rows are wrapped to travel, and unwrapped on arrival."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher.base import BaseDispatcher
from sglang.srt.layers.moe.token_dispatcher.standard import (
    StandardDispatcher,
    StandardDispatchOutput,
)
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.runtime_context import get_parallel

from sglang_minimax.layers.dispatch.codecs import Codec
from sglang_minimax.layers.dispatch.packing import Parcel, pack, unpack
from sglang_minimax.moe_exchange.payload import Payload


class RowDispatcher(BaseDispatcher):
    """SGLang's dispatcher interface, short of what moves the rows."""

    def __init__(self, payload: Payload, codec: Codec, standard: StandardDispatcher) -> None:
        """standard: SGLang's, which turns global ids into those of this rank's experts."""
        super().__init__()
        self._payload = payload
        self._codec = codec
        self._standard = standard
        self.runner_backend = standard.runner_backend

    # Quantisation methods read these two of their layer's dispatcher (Marlin's, for instance).

    @property
    def num_experts(self) -> int:
        """Of all ranks."""
        return self._standard.num_experts

    @property
    def local_expert_mapping(self) -> torch.Tensor | None:
        """Global id -> id on this rank or -1, [num_experts] int32; made by the first dispatch."""
        return self._standard.local_expert_mapping

    def wrap(self, hidden_states: torch.Tensor, topk_output: Any) -> torch.Tensor:
        """[rows, hidden] and SGLang's choices for them -> [rows, payload.bytes] uint8."""
        values, scales = self._codec.encode(hidden_states)
        parcel = Parcel(values, scales, topk_output.topk_ids, topk_output.topk_weights)
        return pack(self._payload, parcel)

    def unwrap(self, packed: torch.Tensor) -> StandardDispatchOutput:
        """Rows that have arrived, as the runner wants them, with ids of this rank's experts."""
        values, scales, ids, weights = unpack(self._payload, packed, self._codec.types)
        if get_parallel().moe_ep_size == 1:
            # SGLang marks padding with id -1, which runners expect only where experts are
            # elsewhere.
            weights = weights.masked_fill(ids < 0, 0.0)
            ids = ids.clamp_min(0)
        hidden_states, more = self._codec.hand_over(values, scales)
        logits = weights.new_empty((0,))  # routing is done
        chosen = StandardTopKOutput(weights, ids, logits)
        return self._standard.dispatch(hidden_states, chosen)._replace(**more)
