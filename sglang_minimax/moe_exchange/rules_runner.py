"""Which of SGLang's expert kernels will run, worked out before there is a layer.

SGLang decides when a layer is built, in the quantisation method's create_moe_runner: its own
argument where the method knows it, otherwise what the method takes by itself. Sources, all under
srt/layers/quantization: fp8.py (Fp8MoEMethod), unquant.py (UnquantizedFusedMoEMethod),
modelopt_quant.py (ModelOptFp8MoEMethod, ModelOptNvFp4FusedMoEMethod), compressed_tensors/schemes;
and srt/arg_groups/model_overrides/minimax_m2.py and overrides.py
(_moe_runner_backend_quant_constraints), which resolve NVFP4 on Blackwell before. What a format runs
by itself is also what its recipe lists first for the hardware.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from sglang_minimax.loading.formats.base import COLUMNS, PLAIN, ROWS
from sglang_minimax.moe_exchange.paths import Rows
from sglang_minimax.moe_exchange.payload import FP8_GROUP

if TYPE_CHECKING:
    from sglang_minimax.config import Architecture
    from sglang_minimax.loading.formats.base import Format
    from sglang_minimax.support import Launch

#: Hardware: our CPU platform, and the name of the PyTorch functions that compute experts on it.
CPU = "cpu"
TORCH = "torch"

AUTO = "auto"
TRITON, DEEP_GEMM, AITER, MARLIN, CUTLASS = "triton", "deep_gemm", "aiter", "marlin", "cutlass"
FI_CUTLASS, FI_CUTEDSL = "flashinfer_cutlass", "flashinfer_cutedsl"
TRTLLM, TRTLLM_ROUTED, HPC_OPS = "flashinfer_trtllm", "flashinfer_trtllm_routed", "hpc_ops"

#: Form of the rows -> runners that take them from a dispatcher, with ids and weights made before.
#: The triton one reads FP8 rows through StandardDispatchOutput.hidden_states_pre_quant
#: (moe_runner/triton.py), FlashInfer's FP4 ones through hidden_states_scale
#: (moe_runner/flashinfer_cutlass.py, flashinfer_trtllm.py). flashinfer_trtllm routes in its kernel
#: only for routers that it knows; TopK chooses for this one (topk._can_bypass_trtllm_routing: a
#: bias without groups), and chosen experts take the routed kernel, as with flashinfer_trtllm_routed
#: (fused_experts_none_to_flashinfer_trtllm_*, materialized_topk). flashinfer_cutedsl lays its
#: weights out by the a2a backend.
READERS: Mapping[Rows, tuple[str, ...]] = MappingProxyType(
    {
        Rows.PLAIN: (TORCH, TRITON, DEEP_GEMM, MARLIN, FI_CUTLASS, TRTLLM_ROUTED, TRTLLM),
        Rows.FP8: (TORCH, TRITON),
        Rows.FP4: (TORCH, FI_CUTLASS, TRTLLM_ROUTED, TRTLLM),
    }
)

# Family of formats -> values of --moe-runner-backend that its method follows.
_FOLLOWED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "plain": (DEEP_GEMM, FI_CUTLASS, TRTLLM, TRTLLM_ROUTED, TRITON),
        "fp8": (TRITON, DEEP_GEMM, AITER, TRTLLM, TRTLLM_ROUTED, HPC_OPS, CUTLASS),
        "ct-fp8": (TRITON, AITER, TRTLLM, TRTLLM_ROUTED),
        # flashinfer_trtllm needs a routing method that our TopK does not declare.
        "modelopt-fp8": (TRITON, FI_CUTLASS),
        "nvfp4": (TRTLLM_ROUTED, FI_CUTLASS, MARLIN, TRTLLM, FI_CUTEDSL),
    }
)
# Families whose methods have no kernels left where the value is another one; the others run what
# they take by themselves.
_STRICT = ("fp8", "ct-fp8", "nvfp4")
# Of these, runners that have FP8 kernels for blocks alone: an assertion in Fp8MoEMethod.__init__
# for cutlass; for TensorRT-LLM's the scales of whole matrices that only ModelOpt's method makes
# (flashinfer_trtllm._run_fp8_per_tensor_scale_moe), or a TypeError, both at the first token.
_FP8_BLOCKS_ONLY = (CUTLASS, TRTLLM, TRTLLM_ROUTED)
# What moe_hook.handle_moe_kernel_config asserts, for every method, and MoeRunner.__init__ of
# hpc_ops: runner -> families.
_ASSERTED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        FI_CUTLASS: ("plain", "modelopt-fp8", "nvfp4"),
        FI_CUTEDSL: ("nvfp4",),
        TRTLLM: ("plain", "fp8", "ct-fp8", "ct", "modelopt-fp8", "nvfp4"),
        TRTLLM_ROUTED: ("plain", "fp8", "nvfp4"),
        HPC_OPS: ("fp8",),
    }
)
# And of these that an expert is whole, or cut over all ranks.
_WHOLE_OR_CUT = (FI_CUTLASS, FI_CUTEDSL)
# Runner -> compute capabilities times ten, both included, of the GPUs that it has kernels for; 89
# is where FlashInfer's own list begins (fused_moe/core.py, get_cutlass_fused_moe_module).
_GPUS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        DEEP_GEMM: (90, 999),
        CUTLASS: (90, 999),
        FI_CUTLASS: (89, 999),
        HPC_OPS: (90, 99),
        TRTLLM: (100, 109),
        TRTLLM_ROUTED: (100, 109),
        FI_CUTEDSL: (100, 109),
    }
)
# What has kernels for AMD's GPUs, of which the first is AMD's own.
_ROCM = (AITER, TRITON)
# NVFP4 needs Blackwell, but for Marlin (ModelOptNvFp4FusedMoEMethod.__init__).
_BLACKWELL = 100
# Backends with which FP8 experts run DeepGEMM (Fp8MoEMethod.is_deepgemm_moe_runner_backend_enabled)
# and backends that take no other runner (moe_hook.handle_a2a_moe).
_DEEP_GEMM_FOR_FP8 = ("deepep", "mooncake", "nixl")
_DEEP_GEMM_ALONE = ("pplx", "deepep_v2")


class Runner(NamedTuple):
    """SGLang's name of the kernels, and why those."""

    name: str
    why: str


def expert_format(arch: Architecture) -> Format:
    """How the experts' matrices are stored."""
    return arch.recipe.format_of("model.layers.0.block_sparse_moe.experts")


def has_fp8_blocks(arch: Architecture) -> bool:
    """Whether the experts are FP8 in blocks, so that their inputs are quantised in groups."""
    form = expert_format(arch)
    return form.name == "fp8-blocks" and form.unit(ROWS) == form.unit(COLUMNS) == FP8_GROUP


def has_fp4_inputs(arch: Architecture) -> bool:
    """Whether the experts are NVFP4 with a scale for their inputs, which W4A16 has not."""
    form = expert_format(arch)
    scale = form.tensor("input_scale")
    return form.name == "nvfp4" and scale is not None and not scale.optional


def _family(arch: Architecture, launch: Launch) -> str:
    """The formats that one method of SGLang's serves; "other" for those whose runner is fixed."""
    form, method = expert_format(arch), arch.recipe.method
    if form is PLAIN:
        return "fp8" if method is None and launch.quantization == "fp8" else "plain"
    if method == "compressed-tensors":
        return "ct-fp8" if "fp8" in form.name else "ct"
    return {"fp8": "fp8", "modelopt_fp8": "modelopt-fp8", "modelopt_fp4": "nvfp4"}.get(
        method or "", "other"
    )


def runner_of(arch: Architecture, launch: Launch) -> Runner:
    """The kernels that the experts of a launch will run."""
    if launch.hardware == CPU:
        return Runner(TORCH, "the CPU platform computes experts in PyTorch")
    asked, family = launch.moe_runner_backend, _family(arch, launch)
    if asked != AUTO and _follows(arch, family, asked):
        return Runner(asked, f"--moe-runner-backend {asked}")
    own = _own(arch, launch, family)
    if asked in (AUTO, own.name):
        return own
    return Runner(own.name, f"--moe-runner-backend {asked} does nothing for {_title(arch)}")


def _follows(arch: Architecture, family: str, asked: str) -> bool:
    """Whether a method runs what --moe-runner-backend names."""
    if family == "ct" and asked == TRITON:
        return _is_int4_of_triton(arch)
    return asked in _FOLLOWED.get(family, ())


def _is_int4_of_triton(arch: Architecture) -> bool:
    """compressed_tensors._is_wna16_triton_moe_supported, short of actorder "static"."""
    form = expert_format(arch)
    return form.name == "int4" and form.unit(COLUMNS) in (32, 128)


def _own(arch: Architecture, launch: Launch, family: str) -> Runner:
    """What the quantisation method takes by itself."""
    backend = launch.moe_a2a_backend
    for_fp8 = family == "fp8" and backend in _DEEP_GEMM_FOR_FP8 and launch.hardware != "rocm"
    if for_fp8 or backend in _DEEP_GEMM_ALONE:
        return Runner(DEEP_GEMM, f"--moe-a2a-backend {backend} brings rows in its layout")
    why = f"SGLang's choice for {_title(arch)}"
    if launch.hardware == "rocm" and family in ("plain", "fp8", "ct-fp8"):
        return Runner(TRITON, f"{why}, or aiter where SGLANG_USE_AITER is set")
    if launch.hardware == "ascend":
        return Runner("ascend", why)
    if launch.quantization == "moe_wna16":
        return Runner(TRITON, why)
    by_itself = launch.moe_runner_backend == AUTO
    if family == "ct" and by_itself and _is_blackwell(launch) and _is_int4_of_triton(arch):
        return Runner(TRITON, why)
    hardware, capability = launch.hardware or "cuda", launch.capability
    fitting = (each.name for each in arch.recipe.kernels if each.runs_on(hardware, capability))
    fixed = TRITON if family in ("plain", "fp8") else next(fitting, TRITON)
    return Runner(fixed, why)


def _title(arch: Architecture) -> str:
    return expert_format(arch).title


def refusals(arch: Architecture, launch: Launch) -> Iterator[str]:
    """Why --moe-runner-backend cannot be, at most one sentence."""
    reason = _against(arch, launch)
    if reason is not None:
        yield f"--moe-runner-backend {launch.moe_runner_backend} {reason}."


def _against(arch: Architecture, launch: Launch) -> str | None:
    asked, family = launch.moe_runner_backend, _family(arch, launch)
    if asked == AUTO:
        # SGLang resolves some formats on some GPUs before it asserts how experts are divided.
        return _divided(arch, launch, runner_of(arch, launch).name)
    if family not in _ASSERTED.get(asked, (family,)) or not _has_kernels(arch, launch, family):
        return f"has no kernels for {_title(arch)}; use {_remedy(arch, launch)}"
    if _follows(arch, family, asked) and not _runs_on(launch, asked, family):
        return f"has no kernels for {_place(launch)}; use {_remedy(arch, launch)}"
    if asked == CUTLASS and family == "fp8" and launch.ep > 1:
        return (
            f"takes FP8 experts only where all ranks have all of them, and --ep-size is "
            f"{launch.ep}; use {_remedy(arch, launch)}"
        )
    return _divided(arch, launch, asked)


def _has_kernels(arch: Architecture, launch: Launch, family: str) -> bool:
    """Whether a method has code for the experts with the runner that was asked for."""
    asked = launch.moe_runner_backend
    if launch.hardware == CPU:
        return True
    if family in ("fp8", "ct-fp8") and asked in _FP8_BLOCKS_ONLY:
        return has_fp8_blocks(arch) and asked in _FOLLOWED[family]
    if family == "ct" and asked == TRITON and launch.hardware == "cuda":
        return _is_int4_of_triton(arch)  # CompressedTensorsConfig.get_moe_scheme refuses others
    if family == "ct" and asked == TRTLLM and _is_int4_of_triton(arch):
        # In groups of 32 they get a kernel that routes by a method that our TopK does not declare
        # (compressed_tensors_w4a4_mxint4_moe.py, apply_weights).
        return expert_format(arch).unit(COLUMNS) != 32
    return family not in _STRICT or asked in _FOLLOWED[family]


def _place(launch: Launch) -> str:
    if launch.hardware != "cuda" or not launch.capability or launch.moe_runner_backend == AITER:
        return str(launch.hardware)
    return f"compute capability {launch.capability / 10:.1f}"


def _is_blackwell(launch: Launch) -> bool:
    """Whether it is one of data centres."""
    return launch.hardware == "cuda" and _BLACKWELL <= (launch.capability or 0) < _BLACKWELL + 10


def _runs_on(launch: Launch, runner: str, family: str) -> bool:
    """Whether a runner has kernels for the GPU; an unknown one is given the benefit of doubt."""
    if launch.hardware == "rocm":
        return runner in _ROCM
    if launch.hardware != "cuda":
        return True
    if runner == AITER:
        return False
    if launch.capability is None:
        return True
    since, until = _GPUS.get(runner, (0, 999))
    if family == "nvfp4" and runner != MARLIN:
        since = max(since, _BLACKWELL)
    return since <= launch.capability <= until


def _divided(arch: Architecture, launch: Launch, runner: str) -> str | None:
    """Why a runner does not take the experts as they are divided over ranks."""
    if runner not in _WHOLE_OR_CUT or launch.ep in (1, launch.tp):
        return None
    means = "" if launch.moe_runner_backend == runner else f"means {runner}, which "
    physical = arch.num_experts + launch.ep_redundant
    fits = 1 if physical % launch.tp else launch.tp
    return (
        f"{means}takes whole experts or experts cut over all ranks, and --ep-size {launch.ep} is "
        f"neither; use --ep-size {fits}"
    )


def _remedy(arch: Architecture, launch: Launch) -> str:
    own = runner_of(arch, replace(launch, moe_runner_backend=AUTO)).name
    means = f"--moe-runner-backend {AUTO}, which means {own} here"
    whole = _against(arch, replace(launch, moe_runner_backend=AUTO)) is not None
    return f"--ep-size {launch.tp} with {means}" if whole else means


def proposals(arch: Architecture, launch: Launch, rows: Rows) -> Iterator[str]:
    """Values of --moe-runner-backend with which such rows could be read."""
    for name in READERS[rows]:
        asked = replace(launch, moe_runner_backend=name)
        if runner_of(arch, asked).name == name and _against(arch, asked) is None:
            yield name
