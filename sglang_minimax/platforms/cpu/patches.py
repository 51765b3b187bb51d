"""Replacements for SGLang code that assumes its own CPU engine, or a GPU."""

from __future__ import annotations

import functools
import gc
import importlib
import logging
import multiprocessing
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


def fork_children(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `_set_envs_and_config(server_args)`: children are forked after the imports.

    Importing SGLang costs about ten seconds a process, paid in series under `spawn`. Forking is
    safe here because nothing has started a thread or touched a device yet: SGLang makes its
    tokenizer, its sockets and its event loop after the children.
    """

    method = os.environ.get(START_METHOD, "fork")
    if method not in ("fork", "spawn"):
        raise SystemExit(f"sglang-minimax: {START_METHOD} is {method!r}; use fork or spawn.")

    @functools.wraps(original)
    def _set_envs_and_config(server_args: Any) -> None:
        original(server_args)
        if method == "fork":
            multiprocessing.set_start_method("fork", force=True)
            import_what_children_need()

    return _set_envs_and_config


#: Environment variable: "fork" (the default on the CPU platform) or "spawn", as on a GPU.
START_METHOD = "SGLANG_MINIMAX_START_METHOD"

#: Imported by every scheduler process after it has started.
CHILD_MODULES = (
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.tp_worker",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.models.registry",
    "sglang.srt.layers.attention.torch_native_backend",
    "sglang_minimax.models.minimax_m2",
)


def import_what_children_need() -> None:
    """Pay for imports once, then take the objects out of the garbage collector's sight.

    A collection in a child would write to each object's header and so copy every page.
    """
    for name in CHILD_MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
