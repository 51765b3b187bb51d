"""Fork the ranks after the imports, where that is safe; SGLang spawns them.

Importing SGLang costs about ten seconds a process, and under `spawn` every rank pays it again. A
fork is safe as long as the parent has not computed on several threads: OpenMP's threads do not
exist in a forked child, which then waits for them forever. SGLang's server has not computed
anything when it starts its children (its tokenizer, sockets and event loop come later), but a
program that uses `sglang.Engine` as a library may have. So it is tried first, in a child.
"""

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


def fork_children(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `_set_envs_and_config(server_args)`, which sets the start method to `spawn`."""
    method = os.environ.get(START_METHOD, "fork")
    if method not in ("fork", "spawn"):
        raise SystemExit(f"sglang-minimax: {START_METHOD} is {method!r}; use fork or spawn.")

    @functools.wraps(original)
    def _set_envs_and_config(server_args: Any) -> None:
        original(server_args)
        if method == "spawn":
            return
        if not fork_is_safe():
            logger.warning(
                "the ranks are spawned, which takes longer than forking them: this process has "
                "computed on several threads; call torch.set_num_threads(1) first to avoid it"
            )
            return
        multiprocessing.set_start_method("fork", force=True)
        import_what_children_need()

    return _set_envs_and_config


def fork_is_safe(timeout: float = 5.0) -> bool:
    """Whether a forked child of this process can compute on several threads.

    timeout: seconds after which a child that should take milliseconds counts as stuck.
    """
    if os.environ.get("OMP_NUM_THREADS") == "1":
        return True  # no rank will ask for a second thread
    child = multiprocessing.get_context("fork").Process(target=_compute_on_two_threads)
    child.start()
    child.join(timeout)
    if child.is_alive():
        child.kill()
        child.join()
        return False
    return child.exitcode == 0


def _compute_on_two_threads() -> None:
    import torch

    torch.set_num_threads(2)
    torch.ones(1 << 20).add_(1)


def import_what_children_need() -> None:
    """Pay for imports once, then take the objects out of the garbage collector's sight.

    A collection in a child would write to each object's header and so copy every page.
    """
    for name in CHILD_MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
