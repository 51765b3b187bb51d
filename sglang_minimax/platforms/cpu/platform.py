"""SGLang's engine on a machine without an accelerator, with PyTorch alone.

An out-of-tree platform rather than SGLang's own CPU engine, which needs a build of
`sgl-kernel` that no registry carries. Device type is "cpu", collectives are gloo, attention
is SGLang's `torch_native` backend, and fused operators take their `forward_native` path.

What SGLang's own CPU branches get wrong for us is listed in `upstream.py` beside this file.
"""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from sglang_minimax.drafts.config import EAGLE3

logger = logging.getLogger(__name__)

#: Share of the free memory that one engine plans with. It is host memory: the operating
#: system, the tokenizer and the user's other programs live in it too.
MEMORY_FRACTION = 0.5
#: KV slots that are planned for unless the user says otherwise: a few full contexts. A pool as
#: large as memory allows would make each release of slots copy a free list of millions.
MIN_KV_TOKENS = 131_072
CONTEXTS_IN_KV = 4
#: Elements of one expert's or layer's matrix below which a second thread does not pay.
SMALL_MATRIX = 1 << 20


class MinimaxCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """The platform behind the entry point `minimax_cpu`."""

    _enum = PlatformEnum.OOT
    device_name = "minimax_cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def get_device(self, device_id: int | None = 0) -> str:
        # SGLang compares the answer with the string "cpu".
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_group_coordinator_device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def get_quantization_config(self, quantization: str) -> Any:
        """SGLang's config class with our arithmetic; None for a format that we do not know."""
        from sglang_minimax.platforms.cpu.support import QUANTIZATIONS

        if quantization not in QUANTIZATIONS:
            return None
        from sglang_minimax.platforms.cpu.quantised.intercept import config_class

        return config_class(quantization)

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm == EAGLE3

    def supports_speculative_draft_attention_backend(self, algorithm: str, backend: str) -> bool:
        return algorithm == EAGLE3 and backend == "torch_native"

    def get_speculative_worker_cls(self, algorithm: str) -> type | None:
        if algorithm != EAGLE3:
            return None
        from sglang_minimax.platforms.cpu.speculation.worker import CpuEagleWorker

        return CpuEagleWorker

    def get_speculative_cache_locs_fn(self) -> Any:
        from sglang_minimax.platforms.cpu.speculation.slots import slots_between

        return slots_between

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill in what the user left open; what they set stays.

        SGLang captures every assignment made here as a declaration of this platform.
        """
        if server_args.attention_backend is None:
            server_args.attention_backend = "torch_native"
        if server_args.sampling_backend is None:
            server_args.sampling_backend = "pytorch"
        if server_args.mem_fraction_static is None:
            server_args.mem_fraction_static = MEMORY_FRACTION
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = max(
                MIN_KV_TOKENS, CONTEXTS_IN_KV * (server_args.context_length or 0)
            )
        # An idle rank would otherwise poll its sockets without pause and take a core each.
        server_args.sleep_on_idle = True
        server_args.disable_overlap_schedule = True
        server_args.disable_cuda_graph = True

    def post_load_model(self, model: torch.nn.Module) -> None:
        """Called in the worker after its weights are loaded: one thread for a small model.

        The matrices of a small model are faster on one core than split, and where cores are
        shared every OpenMP barrier waits for a thread that was descheduled: measured with
        another two-thread process on two cores, 350 ms a decode step of tiny-m2 instead of 5.
        """
        largest = max((matrix_elements(p) for p in model.parameters()), default=0)
        if largest < SMALL_MATRIX and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)


def matrix_elements(parameter: torch.Tensor) -> int:
    """Elements of one matrix in a parameter: [rows, columns], or [experts, rows, columns]."""
    return math.prod(parameter.shape[-2:])
