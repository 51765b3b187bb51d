"""The combinations that SGLang 0.5.23 has code for behind --moe-a2a-backend, and their sources.

What is not listed ends at load or at the first token, in an assertion or a missing function.
Sources are files under sglang/srt, read and not run: none of it has been tried on GPUs by us.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from sglang_minimax.moe_exchange.rules_runner import (
    AITER,
    AUTO,
    DEEP_GEMM,
    FI_CUTEDSL,
    FI_CUTLASS,
    TRTLLM,
    TRTLLM_ROUTED,
)

# Values of --deepep-mode, beside AUTO.
NORMAL, LOW_LATENCY = "normal", "low_latency"

# Expert formats as SGLang's dispatchers tell them apart.
PLAIN, FP8, FP8_BLOCKS, NVFP4 = "plain", "fp8", "fp8-blocks", "nvfp4"
TITLES = {
    PLAIN: "unquantised",
    FP8: "FP8",
    FP8_BLOCKS: "FP8 in 128x128 blocks",
    NVFP4: "NVFP4",
}

#: Slots for rows from one rank must be fewer than a tag that DeepEP's kernels use
#: (layers/moe/token_dispatcher/deepep.py, mooncake.py and nixl.py assert it).
MOST_SLOTS = 1024
#: Backend -> environment variable with its number of slots. SGLang checks pplx's and v2's itself.
SLOTS = MappingProxyType(
    {
        "deepep": "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK",
        "mooncake": "SGLANG_MOONCAKE_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK",
        "nixl": "SGLANG_NIXL_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK",
    }
)
#: Backend -> the Python package that its dispatcher imports while the model is built.
PACKAGES = MappingProxyType(
    {
        "deepep": "deep_ep",
        "deepep_v2": "deep_ep",
        "mooncake": "mooncake",
        "nixl": "nixl_ep",
        "mori": "mori",
        "pplx": "pplx_kernels",
        "flashinfer": "flashinfer",
    }
)
#: Columns that share a scale in what DeepEP and its like carry in FP8.
GROUP = 128


@dataclass(frozen=True, slots=True)
class Facts:
    """What the machine decides. None: not known, and then nothing is refused for it.

    low_latency_sizes: hidden sizes that the installed DeepEP has low-latency kernels for.
    deep_gemm: whether SGLang would find DeepGEMM. aiter: whether SGLANG_USE_AITER is on.
    missing: backends without their package. bf16: whether the model computes in bfloat16.
    slots: backend -> rows a rank that its buffers hold.
    """

    low_latency_sizes: frozenset[int] | None = None
    deep_gemm: bool | None = None
    aiter: bool | None = None
    missing: frozenset[str] = frozenset()
    bf16: bool | None = None
    slots: Mapping[str, int] = field(default_factory=dict)


UNKNOWN = Facts()


class Way(NamedTuple):
    """A combination that SGLang has code for.

    formats: of experts, empty where the runner takes all that SGLang runs on the hardware. modes:
    values of --deepep-mode, empty where the backend does not look at it. since, until: compute
    capability times ten, both included. source: where SGLang's code says so.
    """

    backend: str
    formats: tuple[str, ...]
    runners: tuple[str, ...]
    source: str
    modes: tuple[str, ...] = ()
    since: int = 90
    until: int = 999
    hardware: str = "cuda"


_LAYER = "layers/moe/ep_moe/layer.py (DeepEPMoE.__init__, run_moe_core)"
_RUNNERS = "layers/moe/moe_runner"
_HOOK = "arg_groups/moe_hook.py"
_ANY_MODE = (AUTO, NORMAL, LOW_LATENCY)
_FP8S = (FP8, FP8_BLOCKS)

# FlashInfer's kernels of TensorRT-LLM and of CuTe DSL are for data-centre Blackwell.
_BLACKWELL = (100, 109)

SUPPORTED: tuple[Way, ...] = (
    Way("deepep", (PLAIN, *_FP8S), (DEEP_GEMM,), _LAYER, _ANY_MODE),
    Way("deepep", (NVFP4,), (FI_CUTEDSL,), _HOOK, (AUTO, LOW_LATENCY), *_BLACKWELL),
    Way("mooncake", _FP8S, (DEEP_GEMM,), "layers/moe/token_dispatcher/mooncake.py", (LOW_LATENCY,)),
    Way("nixl", _FP8S, (DEEP_GEMM,), "layers/moe/token_dispatcher/nixl.py", (LOW_LATENCY,)),
    Way("pplx", (PLAIN, *_FP8S), (DEEP_GEMM,), _HOOK, (AUTO, LOW_LATENCY)),
    Way(
        "deepep_v2",
        (PLAIN, FP8_BLOCKS),
        (DEEP_GEMM,),
        "layers/moe/fused_moe_triton/layer.py (_validate_deepep_v2_quant_method)",
    ),
    Way("flashinfer", (FP8_BLOCKS,), (DEEP_GEMM,), f"{_RUNNERS}/deep_gemm.py"),
    Way(
        "flashinfer",
        (PLAIN, FP8_BLOCKS, NVFP4),
        (TRTLLM_ROUTED, TRTLLM),
        f"{_RUNNERS}/flashinfer_trtllm.py",
        (),
        *_BLACKWELL,
    ),
    Way("flashinfer", (PLAIN,), (FI_CUTLASS,), f"{_RUNNERS}/flashinfer_cutlass.py"),
    Way("flashinfer", (NVFP4,), (FI_CUTLASS,), f"{_RUNNERS}/flashinfer_cutlass.py", since=100),
    Way(
        *("flashinfer", (NVFP4,), (FI_CUTEDSL,), f"{_RUNNERS}/flashinfer_cutedsl.py"),
        *((), *_BLACKWELL),
    ),
    *(
        Way(backend, (), (AITER,), _LAYER, modes, since=0, hardware="rocm")
        for backend, modes in (
            ("deepep", _ANY_MODE),
            ("mori", _ANY_MODE),
            ("mooncake", (LOW_LATENCY,)),
            ("nixl", (LOW_LATENCY,)),
        )
    ),
)
