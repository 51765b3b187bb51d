"""What SGLang's own fast communication asks for, and which launches would die of lacking it.

Two things: its dispatchers for --moe-a2a-backend (DeepEP and its like, `supported`), and the
all-reduce that is fused with what follows it. Sources are files under sglang/srt of 0.5.23.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from sglang_minimax.moe_exchange import rules, rules_runner
from sglang_minimax.moe_exchange.paths import SGLANG
from sglang_minimax.moe_exchange.rules_runner import AUTO, DEEP_GEMM
from sglang_minimax.moe_exchange.supported import (
    FP8,
    FP8_BLOCKS,
    GROUP,
    LOW_LATENCY,
    MOST_SLOTS,
    NORMAL,
    NVFP4,
    PACKAGES,
    PLAIN,
    SLOTS,
    SUPPORTED,
    TITLES,
    UNKNOWN,
    Facts,
    Way,
)

if TYPE_CHECKING:
    from sglang_minimax.config import Architecture
    from sglang_minimax.support import Launch

# Backends whose kernels move rows and compute experts at once. megamoe is called from the layers of
# other models (models/qwen3_moe.py, _forward_mega_moe): SGLang's general layer would compute the
# local experts of local rows alone, and say nothing. flashinfer_megamoe has a list of models
# (arg_groups/moe_hook.py, validate_flashinfer_megamoe_model).
_OTHER_MODELS = ("megamoe", "flashinfer_megamoe")
# All of SGLang's (arg_groups/fields/exec_.py), but for none.
_BACKENDS = (*rules.SPANNING, "ascend_tp")


def kind_of(arch: Architecture, launch: Launch) -> str:
    """The experts' format as SGLang's dispatchers tell them apart, others by their recipe."""
    method = arch.recipe.method
    if rules_runner.expert_format(arch).name == "plain":
        return FP8 if method is None and launch.quantization == "fp8" else PLAIN
    if method == "fp8":
        return FP8_BLOCKS if rules_runner.has_fp8_blocks(arch) else FP8
    return NVFP4 if rules_runner.has_fp4_inputs(arch) else arch.recipe.name


def refusals(arch: Architecture, launch: Launch, facts: Facts = UNKNOWN) -> Iterator[str]:
    """Why SGLang's communication would fail this launch, at load or later: one sentence each."""
    yield from _fusion_refusals(launch)
    backend = launch.moe_a2a_backend
    deep_gemm = launch.moe_runner_backend == rules_runner.runner_of(arch, launch).name == DEEP_GEMM
    if backend in rules.FREE and deep_gemm and facts.deep_gemm is False:
        yield f"--moe-runner-backend {DEEP_GEMM} {_WITHOUT_DEEP_GEMM} use auto."
    if backend in rules.FREE or launch.hardware in (None, rules_runner.CPU, "ascend"):
        return
    reason = _unusable(launch, facts)
    if reason:
        yield reason
        return
    ways = [way for way in SUPPORTED if (way.backend, way.hardware) == (backend, launch.hardware)]
    reason = _combination(arch, launch, ways) or _machine(launch, ways, facts)
    if reason:
        yield reason
    else:
        yield from _form_of_rows(arch, launch, facts)
        yield from _capacity(launch, facts)
    yield from _groups(launch)


_WITHOUT_DEEP_GEMM = (
    "needs DeepGEMM, which SGLang does not find here; install sgl-deep-gemm, set "
    "SGLANG_ENABLE_JIT_DEEPGEMM=1, or"
)

# --- whether SGLang has the combination ---


def _option(launch: Launch) -> str:
    return f"--moe-a2a-backend {launch.moe_a2a_backend}"


def _unusable(launch: Launch, facts: Facts) -> str:
    """Why the backend is none for this model or machine, empty where it is one."""
    backend, hardware = launch.moe_a2a_backend, launch.hardware
    if backend in _OTHER_MODELS:
        return (
            f"SGLang has {_option(launch)} for other models, not for MiniMax-M2; use another "
            "backend, or start without that option."
        )
    homes = sorted({way.hardware for way in SUPPORTED if way.backend == backend})
    if backend not in _BACKENDS:
        return (
            f"SGLang has no {_option(launch)}; use {', '.join(PACKAGES)}, or start without that "
            "option."
        )
    if hardware not in homes:
        where = " and ".join(homes) or "ascend"
        return f"{_option(launch)} runs on {where}, not on {hardware}; start without that option."
    if backend in facts.missing:
        return (
            f"{_option(launch)} needs the Python package {PACKAGES[backend]}, which is not "
            "installed; install it, or start without that option."
        )
    return ""


def _combination(arch: Architecture, launch: Launch, ways: list[Way]) -> str:
    """What of format, runner, GPU and mode does not go together, empty where all does."""
    if launch.hardware == "rocm":
        return _mode(launch, ways)
    kind = kind_of(arch, launch)
    formats = [way for way in ways if kind in way.formats]
    if not formats:
        known = dict.fromkeys(TITLES[each] for way in ways for each in way.formats)
        title = rules_runner.expert_format(arch).title
        return (
            f"{_option(launch)} takes experts that are {_or(known)}, not {title}; start without "
            "that option, or use a checkpoint in such a format."
        )
    fitting = [way for way in formats if _runs_on(way, launch.capability)]
    if not fitting:
        here = (launch.capability or 0) / 10
        return (
            f"{_option(launch)} with {TITLES[kind]} experts needs compute capability "
            f"{_or(dict.fromkeys(map(_capabilities, formats)))}, and this GPU has {here:.1f}; "
            "start without that option."
        )
    runner = rules_runner.runner_of(arch, launch).name
    running = [way for way in fitting if runner in way.runners]
    if not running:
        names = dict.fromkeys(name for way in fitting for name in way.runners)
        return (
            f"{_option(launch)} brings {TITLES[kind]} experts rows in a layout that the {runner} "
            f"kernels do not read; use --moe-runner-backend {_or(names)}."
        )
    return _mode(launch, running)


def _runs_on(way: Way, capability: int | None) -> bool:
    return capability is None or way.since <= capability <= way.until


def _capabilities(way: Way) -> str:
    """As a sentence has it: "9.0 and later", "10.x"."""
    return f"{way.since / 10:.1f} and later" if way.until == 999 else f"{way.since // 10}.x"


def _mode(launch: Launch, ways: list[Way]) -> str:
    modes = dict.fromkeys(mode for way in ways for mode in way.modes)
    if not modes or launch.deepep_mode in modes:
        return ""
    return (
        f"{_option(launch)} does not have --deepep-mode {launch.deepep_mode} here; use "
        f"--deepep-mode {_or(modes)}."
    )


def _machine(launch: Launch, ways: list[Way], facts: Facts) -> str:
    """What the combination needs and the machine lacks, empty where nothing."""
    if launch.hardware == "rocm":
        if facts.aiter is False:
            return (
                f"{_option(launch)} feeds AITER's expert kernels on ROCm; set SGLANG_USE_AITER=1, "
                "or start without that option."
            )
        return ""
    only_deep_gemm = {name for way in ways for name in way.runners} == {DEEP_GEMM}
    if facts.deep_gemm is False and (
        only_deep_gemm or launch.moe_runner_backend in (AUTO, DEEP_GEMM)
    ):
        return f"{_option(launch)} {_WITHOUT_DEEP_GEMM} start without that option."
    return ""


def _or(names: Iterable[str]) -> str:
    return " or ".join(names)


# --- rows: their type, their width, their number ---


def _low_latency(launch: Launch) -> bool:
    """Whether decode, or everything, goes through the low-latency kernels."""
    return launch.moe_a2a_backend in SLOTS and launch.deepep_mode != NORMAL


def _form_of_rows(arch: Architecture, launch: Launch, facts: Facts) -> Iterator[str]:
    backend = launch.moe_a2a_backend
    if facts.bf16 is False and backend != "mori":
        yield f"{_option(launch)} carries bfloat16 activations only; use --dtype bfloat16."
    if arch.hidden_size % GROUP:
        yield (
            f"{_option(launch)} quantises rows in groups of {GROUP} columns, which do not divide "
            f"hidden size {arch.hidden_size}; start without that option."
        )
    sizes = facts.low_latency_sizes
    if backend == "deepep" and _low_latency(launch) and sizes and arch.hidden_size not in sizes:
        yield (
            f"the installed DeepEP has low-latency kernels for hidden sizes "
            f"{', '.join(map(str, sorted(sizes)))}, not for {arch.hidden_size}; use --deepep-mode "
            "normal, or the sgl-deep-ep wheel that SGLang asks for."
        )
    # Each DeepGEMM kernel reads one type, and takes what was dispatched as it came.
    wanted = {PLAIN: "bf16", FP8: "fp8", FP8_BLOCKS: "fp8"}.get(kind_of(arch, launch))
    asked = launch.deepep_dispatcher_output_dtype
    dispatches = backend in ("deepep", "pplx", "deepep_v2") and launch.hardware == "cuda"
    if dispatches and wanted and asked not in (AUTO, wanted):
        yield (
            f"--deepep-dispatcher-output-dtype {asked} brings rows that the experts' kernels do "
            f"not read; use {wanted}, or start without that option."
        )


def _capacity(launch: Launch, facts: Facts) -> Iterator[str]:
    """Rows that come to one rank's slots: a decode graph's, and prefill's without normal mode."""
    backend = launch.moe_a2a_backend
    slots = facts.slots.get(backend)
    if slots is None or backend not in SLOTS:
        return
    variable = SLOTS[backend]
    if slots > MOST_SLOTS:
        yield f"{variable}={slots} is more than the kernels can count; use at most {MOST_SLOTS}."
        return
    ranks = launch.tp // (launch.dp * launch.attention_cp)
    decode = -(-(launch.decode_graph_rows or 0) // ranks)
    if _low_latency(launch) and launch.disaggregation_mode != "prefill" and decode > slots:
        yield (
            f"the largest decode graph sends {decode} rows from each rank, and {_option(launch)} "
            f"holds {slots}; use --cuda-graph-max-bs-decode "
            f"{max(1, slots * ranks // launch.rows_a_request)}{_more(variable, decode)}."
        )
    prefill = launch.chunked_prefill_size
    if (
        launch.deepep_mode != LOW_LATENCY
        or launch.disaggregation_mode == "decode"
        or prefill is None
    ):
        return
    rows = -(-prefill // ranks)
    if prefill <= 0 or rows > slots:
        what = f"{rows} rows" if prefill > 0 else "any number of rows"
        # The option counts the tokens of all attention-DP groups.
        chunk = slots * ranks * launch.dp
        yield (
            f"without normal mode a prefill chunk sends {what} from each rank through buffers of "
            f"{slots}; use --chunked-prefill-size {chunk}{_more(variable, rows)}."
        )


def _more(variable: str, rows: int) -> str:
    return f", or {variable}={rows}" if 0 < rows <= MOST_SLOTS else ""


def _groups(launch: Launch) -> Iterator[str]:
    backend = launch.moe_a2a_backend
    if backend == "flashinfer" and launch.dp != launch.tp:
        yield (
            f"{_option(launch)} needs one rank for each attention-DP group; use "
            f"--attn-dp-size {launch.tp}, or start without that option."
        )
    if backend == "pplx" and launch.dp < 2:
        yield f"{_option(launch)} needs attention-DP groups; use --attn-dp-size {launch.tp}."
    if backend == "pplx" and launch.pp > 1:
        yield f"{_option(launch)} spans all ranks of a server; use --pp-size 1."


# --- the fused all-reduce ---

# Major compute capabilities.
_HOPPER, _BLACKWELL = 9, 10


def _generation(launch: Launch) -> int | None:
    """9 for Hopper, 10 for Blackwell of data centres, None for all others and for unknown."""
    if launch.hardware != "cuda" or launch.capability is None:
        return None
    major, _ = divmod(launch.capability, 10)
    return major if major in (_HOPPER, _BLACKWELL) else None


def fusion(launch: Launch) -> tuple[bool, str]:
    """Whether SGLang fuses all-reduce, residual add and norm in this launch, and why.

    The conditions are those of overrides._flashinfer_allreduce_fusion_auto_enable. Each batch has
    further ones (residual/add_norm.flashinfer_ar_fusion_applies): at most 2048 rows, and a
    workspace that all ranks could build. Nobody has measured it for this model yet.
    """
    generation, asked = _generation(launch), launch.allreduce_fusion
    if launch.no_allreduce_fusion:
        return False, "it is switched off"
    if launch.tp == 1:
        return False, "one rank has nothing to sum"
    if generation is None:
        return False, "FlashInfer has the kernel for compute capability 9.x and 10.x"
    if launch.dp > 1:
        return False, "with attention DP sums are scattered"
    if launch.moe_a2a_backend != "none" or rules.forced(launch) not in (None, SGLANG.name):
        return False, "rows are dispatched to the experts, and their sums come back complete"
    if launch.nodes > 1 and generation == _HOPPER:
        return False, "between nodes FlashInfer has the kernel for compute capability 10.x"
    apart = _apart_after_experts(launch)
    where = f"after attention; {apart}" if apart else "after attention and after the experts"
    who = f", --flashinfer-allreduce-fusion-backend {asked}" if asked not in (None, AUTO) else ""
    return True, where + who


def fusion_after_experts(launch: Launch) -> tuple[bool, str]:
    """`fusion`, for the sum of the experts' outputs alone."""
    fused, why = fusion(launch)
    apart = _apart_after_experts(launch)
    return (fused, why) if not fused or not apart else (False, apart)


def _apart_after_experts(launch: Launch) -> str:
    """Why the experts' exit completes its sum itself where attention's is fused, empty where not.

    Source: layer_boundary/exit.py (exit_facts) with moe/utils.post_experts_sum_is_one_all_reduce.
    """
    if launch.moe_dp > 1:
        return f"--moe-dp-size {launch.moe_dp} sums experts over a part of the ranks"
    if 1 < launch.ep < launch.tp:
        return f"--ep-size {launch.ep} shares experts among ranks, whose sums are completed at once"
    if launch.attention_cp > 1:
        return f"--attn-cp-size {launch.attention_cp} moves rows in between"
    return ""


def _fusion_refusals(launch: Launch) -> Iterator[str]:
    """What SGLang says of a fusion that was asked for only after the model is loaded."""
    asked, generation = launch.allreduce_fusion, _generation(launch)
    if asked is None or launch.no_allreduce_fusion or launch.hardware in (None, rules_runner.CPU):
        return
    option = f"--flashinfer-allreduce-fusion-backend {asked}"
    if generation is None and launch.hardware == "cuda" and launch.capability is None:
        return
    if generation is None:
        yield f"{option} needs a GPU of compute capability 9.x or 10.x; start without it."
    elif asked == "cutedsl":
        # fusions/cutedsl.prepare_cutedsl_fusion looks for a service that models install.
        yield f"{option} is for models that bring its service; use auto, or start without it."
    elif launch.nodes > 1 and (asked == "trtllm" or generation == _HOPPER):
        other = "use mnnvl, or start" if generation == _BLACKWELL else "start"
        yield f"{option} does not reach over --nnodes {launch.nodes}; {other} without it."
