"""Which dispatcher a layer of experts gets behind SGLang's `customized` backend."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher.base import BaseDispatcher
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher

from sglang_minimax.errors import PathError
from sglang_minimax.layers.dispatch.all_to_all import AllToAllDispatcher
from sglang_minimax.layers.dispatch.codecs import codec_for
from sglang_minimax.layers.dispatch.gather import GatherDispatcher
from sglang_minimax.moe_exchange.paths import Movement, Path, Rows
from sglang_minimax.moe_exchange.payload import Payload
from sglang_minimax.moe_exchange.rules import VARIABLE
from sglang_minimax.moe_exchange.rules_runner import READERS, TORCH


def dispatcher_for(path: Path, config: Any) -> BaseDispatcher:
    """The dispatcher of one layer. config: SGLang's MoeRunnerConfig of its experts.

    Raises PathError where SGLang took kernels for the layer that do not read such rows.
    """
    dtype: torch.dtype = config.params_dtype or torch.get_default_dtype()
    # The path was planned for the model; a draft's experts have a format of their own.
    rows = Rows.PLAIN if config.layer.is_draft else path.rows
    _check_reader(rows, config.runner_backend)
    payload = Payload(rows, config.hidden_size, config.top_k, item_bytes=dtype.itemsize)
    codec = codec_for(rows, dtype, config.layer)
    kind = AllToAllDispatcher if path.movement is Movement.ALL_TO_ALL else GatherDispatcher
    return kind(payload, codec, StandardDispatcher(config))


def _check_reader(rows: Rows, backend: Any) -> None:
    """backend: SGLang's MoeRunnerBackend, None on the CPU platform.

    A runner that does not know of quantised rows would compute with what lies beside them.
    """
    name = TORCH if backend is None else backend.value
    if rows is not Rows.PLAIN and name not in READERS[rows]:
        plain = Path(Movement.GATHER).name
        raise PathError(
            f"the experts' {name} kernels do not read {rows.upper()} rows; start with "
            f"{VARIABLE}={plain}."
        )
