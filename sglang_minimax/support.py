"""What is refused at launch, decided from plain values: one sentence each, with what works instead.

Asked while arguments are checked, before a process is started or a byte of the checkpoint is read.
Whether the model can be divided over the ranks is `legality`'s answer; here is what we do not
support for other reasons. No SGLang, no torch: the caller reads its arguments into a `Launch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sglang_minimax import expert_placement, legality
from sglang_minimax.config import Architecture
from sglang_minimax.drafts.config import EAGLE3, REJECTION
from sglang_minimax.loading.formats.base import Recipe
from sglang_minimax.moe_exchange import backends, rules
from sglang_minimax.moe_exchange.supported import UNKNOWN, Facts
from sglang_minimax.topology import expert_cut

# What SGLang may do with plain weights while they are loaded.
ONLINE = (None, "fp8")
# SGLang's name for how a checkpoint is stored -> its further names for the same, by kernel. What it
# would make of one on the way, as nvfp4_online of FP8 blocks, is not loaded by us.
ALSO_CALLED = {
    "awq": ("awq_marlin", "moe_wna16"),
    "gptq": ("gptq_marlin", "moe_wna16"),
    "compressed-tensors": ("compressed_tensors", "w8a8_int8", "w8a8_fp8"),
    "modelopt_fp8": ("modelopt",),
    "modelopt_fp4": ("modelopt",),
    "quark": ("quark_mxfp4",),
}
# Routes by a softmax over the logits inside SGLang's TopK, without sigmoid, bias or our router.
SOFTMAX_RUNNER = "triton_kernel"
# Draft algorithms that read residuals captured on one pipeline stage.
CAPTURING_ALGORITHMS = (EAGLE3, "DFLASH", "DSPARK")


@dataclass(frozen=True, slots=True)
class Launch(legality.Sizes):
    """The arguments that bear on what is supported: the sizes, and what goes with them."""

    enable_two_batch_overlap: bool = False
    enable_single_batch_overlap: bool = False
    # In capitals, as SGLang has its names.
    speculative_algorithm: str | None = None
    # Further options of speculation, as the user wrote them, that change its algorithm.
    speculative_options: tuple[str, ...] = ()
    # Steps, branches and verified tokens of a draft tree; None without one.
    speculative_tree: tuple[int, int, int] | None = None
    # For drafted tokens, one by one and along a path; 1 keeps the model's distribution.
    accept_threshold_single: float = 1.0
    accept_threshold_acc: float = 1.0
    # Whether SGLang has a kernel here that verifies drafted tokens of sampled requests.
    verifies_sampled: bool = True
    quantization: str | None = None
    moe_a2a_backend: str = "none"
    moe_runner_backend: str = "auto"
    # The path to the experts that SGLANG_MINIMAX_MOE asks for; None where it names none.
    moe_exchange: str | None = None
    enable_return_hidden_states: bool = False
    enable_eplb: bool = False
    init_expert_location: str = expert_placement.TRIVIAL
    # Where it would run: `cuda`, `rocm`, `ascend`, `cpu` for our CPU platform, None for unknown.
    hardware: str | None = None
    # Compute capability times ten, of CUDA devices.
    capability: int | None = None
    # Bytes of a number in the model's dtype.
    item_bytes: int = 2
    deepep_mode: str = "auto"
    deepep_dispatcher_output_dtype: str = "auto"
    # Tokens of a prefill chunk, None where it is not known, not above 0 where there are no chunks.
    chunked_prefill_size: int | None = None
    # Rows of the largest decode graph, None where there is none, and of each request in it: more
    # than one where speculation verifies several tokens at once.
    decode_graph_rows: int | None = None
    rows_a_request: int = 1
    disaggregation_mode: str = "null"
    prefill_graphs: bool = False
    allreduce_fusion: str | None = None
    # Whether the user, or determinism, keeps the all-reduce apart from what follows it.
    no_allreduce_fusion: bool = False
    no_fp4_allgather: bool = False
    # Whether NVFP4 experts quantise each row by a scale of its own (rules.BY_TOKEN).
    fp4_by_token: bool = False
    enable_lora: bool = False
    enable_return_routed_experts: bool = False
    # Further options, as the user wrote them, that need SGLang's own way to the experts.
    needs_sglang: tuple[str, ...] = ()
    # What the machine has for SGLang's backends.
    facts: Facts = field(default=UNKNOWN, hash=False)


Check = Callable[[Architecture, Launch], Iterator[str]]


def refusals(arch: Architecture, launch: Launch) -> list[str]:
    """Every reason not to start, in the order of the checks below; empty when there is none."""
    return [sentence for check in CHECKS for sentence in check(arch, launch)]


def notes(arch: Architecture, launch: Launch) -> list[str]:
    """What works at a price, to be said once at start-up: one sentence each."""
    return [*_padding(arch, launch), *_loose_verification(launch)]


def _padding(arch: Architecture, launch: Launch) -> Iterator[str]:
    ranks = launch.tp // (launch.ep * launch.moe_dp)
    cut = expert_cut(arch.expert_width, ranks, 0, arch.expert_unit)
    if not cut.is_padded:
        return
    more = 100 * (cut.over - cut.total) / cut.total
    whole = f"; --ep-size {launch.tp // launch.moe_dp} needs no padding" if ranks > 1 else ""
    yield (
        f"expert width {cut.total} over {ranks} ranks would cut blocks of {arch.expert_unit}, so "
        f"whole blocks are dealt and padded to {cut.width} rows a rank: +{more:.1f} % expert "
        f"memory{whole}."
    )


def _loose_verification(launch: Launch) -> Iterator[str]:
    thresholds = {"single": launch.accept_threshold_single, "acc": launch.accept_threshold_acc}
    loose = [
        f"--speculative-accept-threshold-{name} {value:g}"
        for name, value in thresholds.items()
        if value < 1
    ]
    if launch.speculative_algorithm and loose:
        yield (
            f"with {' and '.join(loose)}, drafted tokens are taken that the model would not have "
            "sampled; replies with a temperature are no longer the model's own."
        )


def _sizes(arch: Architecture, launch: Launch) -> Iterator[str]:
    yield from legality.refusals(arch, launch)


def _context(arch: Architecture, launch: Launch) -> Iterator[str]:
    if launch.moe_dp > 1 and launch.moe_dp != launch.attention_cp:
        yield (
            f"--moe-dp-size {launch.moe_dp} needs as many context-parallel attention groups, and "
            f"--attn-cp-size is {launch.attention_cp}; use the same number for both, or "
            "--moe-dp-size 1."
        )


def _speculation(arch: Architecture, launch: Launch) -> Iterator[str]:
    algorithm = launch.speculative_algorithm
    if launch.pp > 1 and algorithm in CAPTURING_ALGORITHMS:
        yield (
            f"{algorithm} reads the outputs of layers that --pp-size {launch.pp} puts on several "
            "stages; use --pp-size 1."
        )
    if algorithm == EAGLE3:
        yield from _sampled_requests(launch)
    if launch.speculative_tree is not None:
        steps, topk, tokens = launch.speculative_tree
        # The root, its children, and topk each of the topk that every later step goes on from
        # (eagle_utils.organize_draft_results takes the best of them).
        drafted = 1 + topk + (steps - 1) * topk * topk
        if topk > 1 and tokens > drafted:
            yield (
                f"--speculative-num-draft-tokens {tokens} is more than the {drafted} that "
                f"--speculative-num-steps {steps} with --speculative-eagle-topk {topk} drafts, and "
                f"would end the server at the first request; use {drafted} or fewer."
            )


def _sampled_requests(launch: Launch) -> Iterator[str]:
    # eagle_utils._verify_uses_greedy of SGLang 0.5.23, which switches it on for EAGLE alone.
    if launch.hardware == "rocm" and REJECTION not in launch.speculative_options:
        yield (
            f"on ROCm, SGLang would answer every request greedily with {EAGLE3}, whatever its "
            f"temperature; start with {REJECTION}, which needs --speculative-eagle-topk 1 and a "
            "draft that knows the whole vocabulary, or without --speculative-algorithm."
        )
    if not launch.verifies_sampled:
        yield (
            f"the sgl_kernel_npu of this machine cannot verify drafted tokens of {EAGLE3} for "
            "requests with a temperature, so that the first one would end the server; install one "
            "that has sample.tree_speculative_sampling_target_only, or start without "
            "--speculative-algorithm."
        )


def _hidden_states(arch: Architecture, launch: Launch) -> Iterator[str]:
    # The first stage looks for them in a result that it does not have, which ends the scheduler.
    if launch.enable_return_hidden_states and launch.pp > 1:
        yield (
            f"--enable-return-hidden-states does not work with --pp-size {launch.pp}: the first "
            "request for hidden states would end the server; start without one of them."
        )


def _overlap(arch: Architecture, launch: Launch) -> Iterator[str]:
    if launch.enable_two_batch_overlap:
        yield (
            "two-batch overlap is not supported for MiniMax-M2 yet; "
            "start without --enable-two-batch-overlap."
        )
    if launch.enable_single_batch_overlap:
        yield (
            "single-batch overlap is not supported for MiniMax-M2 yet; "
            "start without --enable-single-batch-overlap."
        )


def _routing(arch: Architecture, launch: Launch) -> Iterator[str]:
    if launch.moe_runner_backend == SOFTMAX_RUNNER:
        yield (
            f"--moe-runner-backend {SOFTMAX_RUNNER} chooses experts by a softmax without their "
            "bias, which is not this model; use --moe-runner-backend auto or triton."
        )


def _placement(arch: Architecture, launch: Launch) -> Iterator[str]:
    if launch.enable_eplb and launch.ep == 1:
        remedy = f"use --ep-size {launch.tp} or " if launch.tp > 1 else ""
        yield (
            "--enable-eplb moves experts between expert-parallel ranks, and --ep-size is 1; "
            f"{remedy}start without it."
        )
    yield from expert_placement.refusals(
        launch.init_expert_location,
        layers=arch.num_layers,
        experts=arch.num_experts,
        redundant=launch.ep_redundant,
    )


def _kernels(recipe: Recipe, launch: Launch, hardware: str) -> Iterator[str]:
    """Whether SGLang has an expert kernel for the format on this hardware, and would choose it."""
    title = recipe.quantised.title
    fitting = [kernel for kernel in recipe.kernels if kernel.runs_on(hardware, launch.capability)]
    if not fitting:
        there = ", ".join(dict.fromkeys(map(str, recipe.kernels))) or "no hardware"
        here = hardware
        if launch.capability:
            here += f" with compute capability {launch.capability / 10:.1f}"
        yield (
            f"SGLang has no expert kernel for {title} on {here}, only on {there}; use a checkpoint "
            "in another format, such as a BF16 one."
        )
    elif all(kernel.method not in (None, launch.quantization) for kernel in fitting):
        yield (
            f"SGLang finds its expert kernel for {title} on {hardware} only under another name; "
            f"start with --quantization {fitting[0].method}."
        )


def _format(arch: Architecture, launch: Launch) -> Iterator[str]:
    recipe = arch.recipe
    if recipe.method is None:
        if launch.quantization not in ONLINE:
            yield (
                f"--quantization {launch.quantization} would quantise a plain checkpoint while it "
                "is loaded, which is not supported for MiniMax-M2; use fp8 or a checkpoint that is "
                "quantised already."
            )
        return
    title = recipe.quantised.title
    known = (recipe.method, *(kernel.method for kernel in recipe.kernels))
    if launch.quantization not in (None, *known, *ALSO_CALLED.get(recipe.method, ())):
        yield (
            f"--quantization {launch.quantization} is for other checkpoints than one in {title}; "
            "start without that option."
        )
        return
    # The CPU platform dequantises, and says itself what it cannot.
    if launch.hardware not in (None, rules.CPU):
        yield from _kernels(recipe, launch, launch.hardware)
    if recipe.cut_experts and launch.tp != launch.ep * launch.moe_dp:
        yield (
            f"the experts of {title} cannot be shared by "
            f"{launch.tp // (launch.ep * launch.moe_dp)} ranks: {recipe.cut_experts}; use "
            f"--ep-size {launch.tp // launch.moe_dp} for whole experts."
        )


def _exchange(arch: Architecture, launch: Launch) -> Iterator[str]:
    # What the plan says of sizes that cannot be would only be noise.
    if not legality.refusals(arch, launch):
        yield from rules.refusals(arch, launch)
        yield from backends.refusals(arch, launch, launch.facts)


CHECKS: tuple[Check, ...] = (
    _sizes,
    _context,
    _speculation,
    _hidden_states,
    _overlap,
    _routing,
    _placement,
    _format,
    _exchange,
)
