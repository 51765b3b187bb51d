"""Where SGLang asks which device it runs on, the answer is the CPU."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch


def on_the_cpu(original: bool) -> bool:
    """Replace a module's `_is_cpu`, which is False on a platform that SGLang does not know."""
    return True


def copy_rows(original: Callable[..., None]) -> Callable[..., None]:
    """Replace `memcpy_func`, a Triton kernel here, by SGLang's own function for CPU tensors."""
    from sglang.srt.layers.dp_attention import memcpy_cpu

    return memcpy_cpu


def teach_padding() -> None:
    """Give the attention backend the length of a padded request: one token, which is dropped."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    def get_cpu_graph_seq_len_fill_value(self: Any) -> int:
        return 1

    TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = get_cpu_graph_seq_len_fill_value


class CpuDeviceModule:
    """`torch.cpu` with the functions that accelerators have and a CPU has no need of."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    @staticmethod
    def empty_cache() -> None:
        """Nothing is cached."""

    @staticmethod
    def is_current_stream_capturing() -> bool:
        """Nothing is captured."""
        return False


def answer_for_the_cpu() -> None:
    """Make `torch.get_device_module()` answer the CPU when no device is named.

    A PyTorch built for CUDA answers CUDA, with a GPU or without.
    """
    original = torch.get_device_module
    if getattr(original, "answers_for_the_cpu", False):
        return
    cpu = CpuDeviceModule()

    @functools.wraps(original)
    def get_device_module(device: torch.device | str | None = None) -> Any:
        return cpu if device is None else original(device)

    get_device_module.answers_for_the_cpu = True  # type: ignore[attr-defined]
    torch.get_device_module = get_device_module  # type: ignore[assignment]


def share_utilisation(original: Callable[..., float | None]) -> Callable[..., float | None]:
    """Wrap `_StatAccumulator._get_global_average_utilization_rate`, which names "cuda"."""

    @functools.wraps(original)
    def _get_global_average_utilization_rate(self: Any) -> float | None:
        from sglang.srt.runtime_context import get_exec

        threshold = get_exec().moe.eplb_min_rebalancing_utilization_threshold
        if not self._enable or math.isclose(threshold, 1.0):
            return None
        rate = torch.zeros(1)
        if self._rank == 0:
            with contextlib.suppress(KeyError):
                rate[0] = self._history.mean()[self.window_sizes[-1]]
        torch.distributed.broadcast(rate, src=0)
        return rate.item()

    return _get_global_average_utilization_rate
