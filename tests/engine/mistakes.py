"""Plausible mistakes, each with the smallest shape of the list that shows it.

A mistake is a function that patches our model, SGLang or the CPU platform; it runs in an engine's
process before the ranks are forked, so that SGLang computes with it for real. Run as a module this
prints which shape catches which mistake, and by what:

    python -m tests.engine.mistakes [NAME ...]
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from sglang_minimax.validation.run import ShapeResult, run_shape
from sglang_minimax.validation.session import Session
from sglang_minimax.validation.shapes import catalogue
from tests.engine import mistakes_in_exchange as exchange

#: Seconds for an engine to start or answer: a mistake may leave ranks waiting for each other.
PATIENCE = 120.0


def local_variance_only() -> None:
    """Each rank normalises with its own shard's mean of squares: no reduction."""
    from sglang_minimax.layers.prologue import Prologue

    original = Prologue.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        size = self._group.size
        self._group = dataclasses.replace(self._group, reduce=lambda sums: sums * size)

    Prologue.__init__ = __init__  # type: ignore[method-assign]


def k_norm_cut_like_q() -> None:
    """The K-norm weight is cut at rank * (full // tp), although replicas share a head."""
    from sglang.srt.runtime_context import get_parallel

    from sglang_minimax.layers import qk_norm

    def load(self: Any, parameter: torch.nn.Parameter, full: torch.Tensor) -> None:
        parallel = get_parallel()
        start = parallel.attn_tp_rank * (len(full) // parallel.attn_tp_size)
        parameter.data.copy_(full.roll(-start)[: len(parameter)])

    qk_norm.ShardedNormWeight.load = load  # type: ignore[method-assign]


def k_sum_counts_replicas() -> None:
    """The reduced K sum is divided by the width alone, although replicas were added too."""
    from sglang_minimax.topology import AttentionShard

    true = AttentionShard.k_divisor.fget  # type: ignore[attr-defined]
    AttentionShard.k_divisor = property(  # type: ignore[assignment,method-assign]
        lambda self: true(self) // self.kv_replicas
    )


def model_tp_group_in_the_norm() -> None:
    """The QK norm sums over the model-TP group where attention-TP belongs."""
    from sglang.srt.runtime_context import get_parallel

    from sglang_minimax.layers import prologue

    prologue.attn_tp_all_reduce = lambda sums: get_parallel().tp_group.all_reduce(sums)


def norm_weights_of_the_model_tp_rank() -> None:
    """The norm weights are cut by size and rank of the model-TP group."""
    from sglang.srt.runtime_context import get_parallel

    from sglang_minimax.layers import qk_norm

    def load(self: Any, parameter: torch.nn.Parameter, full: torch.Tensor) -> None:
        parallel = get_parallel()
        start = parallel.tp_rank * (len(full) // parallel.tp_size)
        parameter.data.copy_(full.roll(-start)[: len(parameter)])

    qk_norm.ShardedNormWeight.load = load  # type: ignore[method-assign]


def k_norm_of_the_next_head() -> None:
    """K is scaled with the rows of another head."""
    from sglang_minimax.layers import qk_norm

    original = qk_norm.ShardedNormWeight.load

    def load(self: Any, parameter: torch.nn.Parameter, full: torch.Tensor) -> None:
        original(self, parameter, full.roll(32))

    qk_norm.ShardedNormWeight.load = load  # type: ignore[method-assign]


def eps_divided_by_the_width() -> None:
    """eps is added to the sum of squares, so that it acts divided by the width."""
    from sglang_minimax.layers.prologue import Prologue

    original = Prologue.__init__

    def __init__(self: Any, q: Any, k: Any, shard: Any, *args: Any, eps: float) -> None:
        original(self, q, k, shard, *args, eps=eps / shard.q_total)

    Prologue.__init__ = __init__  # type: ignore[assignment,method-assign]


def usual_eps() -> None:
    """1e-6 in the QK norm, whatever the config says."""
    from sglang_minimax.layers.prologue import Prologue

    original = Prologue.__init__

    def __init__(self: Any, *args: Any, eps: float, **kwargs: Any) -> None:
        original(self, *args, eps=1e-6, **kwargs)

    Prologue.__init__ = __init__  # type: ignore[method-assign]


def bf16_sum_of_squares() -> None:
    """The sum of squares is accumulated in bf16."""
    from jit_kernels.qk_norm_rope import reference

    def square_sums(q: torch.Tensor, k: torch.Tensor, **kw: Any) -> torch.Tensor:
        return torch.stack([x.bfloat16().square().sum(-1) for x in (q, k)], -1).float()

    reference.square_sums = square_sums


def full_rotary() -> None:
    """All of a head is rotated instead of the first half."""
    from sglang_minimax.layers import attention

    original = attention.get_rope

    def get_rope(head_dim: int, rotary_dim: int, **kwargs: Any) -> Any:
        return original(head_dim, rotary_dim=head_dim, **kwargs)

    attention.get_rope = get_rope


def _weigh(weights_of: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Replace the routing weights: (moe, router logits, chosen ids) -> weights."""
    from sglang_minimax.layers import moe

    original = moe.MiniMaxM2MoE.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        choose = self.topk.forward

        def forward(hidden: torch.Tensor, logits: torch.Tensor, *rest: Any, **kw: Any) -> Any:
            chosen = choose(hidden, logits, *rest, **kw)
            weights = weights_of(self, logits, chosen.topk_ids.long())
            return chosen._replace(topk_weights=weights.to(chosen.topk_weights.dtype))

        self.topk.forward = forward

    moe.MiniMaxM2MoE.__init__ = __init__  # type: ignore[method-assign]


def bias_in_the_weights() -> None:
    """The correction bias, which is for choosing, is added to the weights too."""

    def weights_of(moe: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        scores = (logits.sigmoid() + moe.e_score_correction_bias).gather(1, ids)
        return scores / scores.sum(-1, keepdim=True)

    _weigh(weights_of)


def no_renormalisation() -> None:
    """The scores of the chosen experts do not sum to one."""
    _weigh(lambda moe, logits, ids: logits.sigmoid().gather(1, ids))


def no_correction_bias() -> None:
    """Experts are chosen by their scores alone."""
    from sglang_minimax.layers import moe

    original = moe.MiniMaxM2MoE.forward

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        self.e_score_correction_bias.data.zero_()
        return original(self, hidden_states)

    moe.MiniMaxM2MoE.forward = forward  # type: ignore[method-assign]


def no_sum_over_moe_tp() -> None:
    """Experts are summed over EP, but not over the ranks that share an expert's width."""
    from sglang.srt.layers.moe import utils

    original = utils._post_experts_sum

    def _post_experts_sum(hidden: torch.Tensor, *, reduce_ep: bool, reduce_tp: bool) -> Any:
        return original(hidden, reduce_ep=reduce_ep, reduce_tp=False)

    utils._post_experts_sum = _post_experts_sum


def padding_leaks() -> None:
    """Rows that pad a decode write their K and V over those of a request."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    original = ForwardBatch._pad_inputs_to_size

    def _pad_inputs_to_size(self: Any, runner: Any, num_tokens: int, bs: int) -> None:
        real = len(self.out_cache_loc)
        original(self, runner, num_tokens, bs)
        if 0 < real < len(self.out_cache_loc):
            self.out_cache_loc[real:] = self.out_cache_loc[0]

    ForwardBatch._pad_inputs_to_size = _pad_inputs_to_size


def experts_elsewhere_are_the_last() -> None:
    """Id -1, an expert of another rank, is taken as an index: the last local expert."""
    from sglang_minimax.platforms.cpu import experts

    original = experts.local_experts

    def local_experts(
        x: Any, w13: Any, w2: Any, weights: Any, ids: torch.Tensor, *rest: Any
    ) -> torch.Tensor:
        return original(x, w13, w2, weights, ids.where(ids >= 0, len(w13) - 1), *rest)

    experts.local_experts = local_experts  # type: ignore[assignment]


def head_cut_over_tp() -> None:
    """A DP LM head is cut over TP, while its logits are gathered over attention-TP."""
    from sglang_minimax.models import minimax_m2

    original = minimax_m2.ParallelLMHead

    def ParallelLMHead(*args: Any, use_attn_tp_group: bool = False, **kwargs: Any) -> Any:
        return original(*args, use_attn_tp_group=False, **kwargs)

    minimax_m2.ParallelLMHead = ParallelLMHead


def last_layer_not_captured() -> None:
    """The output of the last layer is left out of what a draft model gets."""
    from sglang_minimax.models import minimax_m2

    original = minimax_m2.MiniMaxM2ForCausalLM._capture_outputs_of

    def _capture_outputs_of(self: Any, layer_ids: Any) -> None:
        original(self, [each for each in layer_ids if each != self.arch.num_layers - 1])

    minimax_m2.MiniMaxM2ForCausalLM._capture_outputs_of = _capture_outputs_of  # type: ignore[method-assign]


def captured_a_layer_early() -> None:
    """What is captured is a layer's input, not its output."""
    from sglang_minimax.models import minimax_m2

    original = minimax_m2.MiniMaxM2ForCausalLM._capture_outputs_of

    def _capture_outputs_of(self: Any, layer_ids: Any) -> None:
        original(self, [each - 1 for each in layer_ids])

    minimax_m2.MiniMaxM2ForCausalLM._capture_outputs_of = _capture_outputs_of  # type: ignore[method-assign]


def kv_of_all_layers() -> None:
    """A stage gets KV memory for all layers, as a model does that does not name its own."""
    from sglang.srt.model_executor.model_runner_components import layer_setup

    def _resolve_pp_layer_range(*, model: Any, model_num_layers: int) -> Any:
        return layer_setup._PPLayerRange(start_layer=0, end_layer=model_num_layers)

    layer_setup._resolve_pp_layer_range = _resolve_pp_layer_range


@dataclasses.dataclass(frozen=True, slots=True)
class Mistake:
    """plant: the patch. topology: the smallest shape of the list that shows it.

    words: a word of the sentence by which it must be caught, so that no other failure passes.
    """

    plant: Callable[[], None]
    topology: str
    words: str = "is off by"

    @property
    def name(self) -> str:
        """What to call it on the command line."""
        return self.plant.__name__


MISTAKES = (
    Mistake(local_variance_only, "tp=2"),
    # The loader holds what this rank should have of the weight, and nothing else.
    Mistake(k_norm_cut_like_q, "tp=8", "the server was not started"),
    Mistake(k_sum_counts_replicas, "tp=8"),
    # Ranks of another attention group have other tokens or none: what is summed does not match.
    # Behind our gather the ranks would wait for each other, until nobody does any more.
    Mistake(
        model_tp_group_in_the_norm,
        "tp=4,dp=2,exchange=sglang",
        "all_reduce at qk_norm over ranks [0, 1, 2, 3]",
    ),
    Mistake(norm_weights_of_the_model_tp_rank, "tp=4,dp=2", "of which this rank holds [64] of"),
    Mistake(k_norm_of_the_next_head, "tp=1"),
    Mistake(eps_divided_by_the_width, "tp=1"),
    Mistake(usual_eps, "tp=1"),
    Mistake(bf16_sum_of_squares, "tp=1"),
    Mistake(full_rotary, "tp=1"),
    Mistake(bias_in_the_weights, "tp=1"),
    Mistake(no_renormalisation, "tp=1"),
    Mistake(no_correction_bias, "tp=1"),
    Mistake(no_sum_over_moe_tp, "tp=4,ep=2"),
    Mistake(exchange.uneven_chunks_in_the_wrong_order, "tp=4,dp=4,ep=4"),
    Mistake(exchange.even_chunks_in_the_wrong_order, "tp=4,dp=2,ep=4"),
    Mistake(padding_leaks, "tp=4,dp=2,ep=4"),
    Mistake(experts_elsewhere_are_the_last, "tp=4,ep=4"),
    Mistake(head_cut_over_tp, "tp=4,dp=2,dp_lm_head", "the weights do not fit the model"),
    Mistake(last_layer_not_captured, "tp=1", "captured [30, "),
    Mistake(captured_a_layer_early, "tp=1", "captured of layer"),
    Mistake(kv_of_all_layers, "pp=2", "KV"),
    Mistake(
        exchange.summed_again_at_the_boundary,
        "tp=4,ep=2,exchange=gather",
        "4 all_reduce at boundary",
    ),
    Mistake(
        exchange.combined_over_attention_tp,
        "tp=4,dp=2",
        "reduce_scatter_tensor at experts over [0, 1]",
    ),
    Mistake(exchange.rows_in_the_order_of_attention_tp, "tp=4,dp=2"),
    Mistake(exchange.counts_of_the_forward_before, "tp=2,dp=2", "rows for sizes that add up to"),
    Mistake(exchange.counts_without_padding, "tp=2,dp=2", "rows where the forward counts"),
    Mistake(exchange.padded_for_an_even_gather, "tp=2,dp=2", "all_gather_into_tensor at experts"),
)


def run(mistake: Mistake, session: Session) -> ShapeResult:
    """Run the mistake's shape with the mistake in it."""
    shape = catalogue().find(mistake.topology)
    assert shape is not None, f"{mistake.topology} is not in the list"
    return run_shape(shape, session.subject(shape.model), before=mistake.plant, timeout=PATIENCE)


def caught_by(mistake: Mistake, result: ShapeResult) -> str | None:
    """The sentence that gives the mistake away, None where nothing does."""
    refused = (result.reason or "",) if result.status == "refused" else ()
    return next((each for each in (*result.shortcomings, *refused) if mistake.words in each), None)


def main(names: Iterable[str]) -> int:
    """Print one line a mistake; the number of those that nothing caught."""
    wanted = set(names)
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        session = Session(Path(folder))
        for mistake in MISTAKES:
            if wanted and mistake.name not in wanted:
                continue
            result = run(mistake, session)
            sentence = caught_by(mistake, result)
            missed += sentence is None
            print(
                f"{mistake.name:34} {mistake.topology:22} {result.seconds:5.1f} s  "
                f"{sentence or f'NOT CAUGHT {result.shortcomings}'}",
                flush=True,
            )
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
