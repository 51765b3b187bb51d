"""Replacements for SGLang code that assumes its own CPU engine, or a GPU."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def keep_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `adjust_config_with_unaligned_cpu_tp(model_config, load_config, tp_size)`."""

    @functools.wraps(original)
    def adjust_config_with_unaligned_cpu_tp(
        model_config: Any, load_config: Any, tp_size: int
    ) -> Any:
        return model_config

    return adjust_config_with_unaligned_cpu_tp


def share_cores(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_bind_threads_if_cpu(device=...)`: an equal share of cores, no pinning."""

    @functools.wraps(original)
    def _bind_threads_if_cpu(*, device: str) -> None:
        import torch
        from sglang.srt.runtime_context import get_parallel

        parallel = get_parallel()
        ranks = parallel.dp_size * parallel.tp_size * parallel.pp_size
        local_ranks = max(1, ranks // max(1, parallel.nnodes))
        cores = len(os.sched_getaffinity(0))
        threads = max(1, cores // local_ranks)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads)
        logger.info("%d of %d cores for this rank", threads, cores)

    return _bind_threads_if_cpu


def skip_thread_env(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_init_cpu_threads_env`, which calls into the CPU build of sgl-kernel."""

    @functools.wraps(original)
    def _init_cpu_threads_env(**_: Any) -> None:
        return None

    return _init_cpu_threads_env
