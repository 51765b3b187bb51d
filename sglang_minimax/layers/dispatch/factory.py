"""Which dispatcher a layer of experts gets behind SGLang's `customized` backend."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher.base import BaseDispatcher
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher

from sglang_minimax.layers.dispatch.all_to_all import AllToAllDispatcher
from sglang_minimax.layers.dispatch.codecs import codec_for
from sglang_minimax.layers.dispatch.gather import GatherDispatcher
from sglang_minimax.moe_exchange.paths import Movement, Path
from sglang_minimax.moe_exchange.payload import Payload


def dispatcher_for(path: Path, config: Any) -> BaseDispatcher:
    """The dispatcher of one layer. config: SGLang's MoeRunnerConfig of its experts."""
    dtype: torch.dtype = config.params_dtype or torch.get_default_dtype()
    payload = Payload(path.rows, config.hidden_size, config.top_k, item_bytes=dtype.itemsize)
    codec = codec_for(path.rows, dtype, config.layer)
    kind = AllToAllDispatcher if path.movement is Movement.ALL_TO_ALL else GatherDispatcher
    return kind(payload, codec, StandardDispatcher(config))
