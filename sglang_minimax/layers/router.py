"""Which experts each token goes to: our operator inside SGLang's TopK, or SGLang's own.

SGLang's `TopK` does more than choose: it maps logical experts to physical ones, masks padding,
records and captures what was chosen, and wraps it for the runner. All of that stays. Where the
runner takes ids and weights, our operator is TopK's `custom_routing_function`; the buffer handed
to TopK as logits is filled by it. Elsewhere TopK gets logits and chooses itself. The start-up line
says which; SGLANG_MINIMAX_ROUTER=triton, reference or sglang forces one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from sglang.srt.layers.moe.topk import TopK, TopKOutputFormat
from sglang.srt.runtime_context import get_exec, get_parallel
from torch import nn

from jit_kernels.router import op, reference
from jit_kernels.router.op import Choice, KernelUnavailable, Request
from sglang_minimax.layers.agreeing import (
    NO_ACCELERATOR,
    Gather,
    asked_for,
    common_name,
    device_of,
    first_of,
    first_problem,
    group_gather,
    kind_and_capability,
    not_served,
    refusal_of,
    tell,
)

logger = logging.getLogger(__name__)

VARIABLE = "SGLANG_MINIMAX_ROUTER"
#: The path that is not ours: logits by a GEMM in fp32, then TopK's own kernels.
SGLANG = "sglang"

Chooser = Callable[[Request, str | None], Choice]


class Decision(NamedTuple):
    """Our operator's implementation, None for SGLang's path, and why.

    failed: whether ours does not run though the rules allow it.
    """

    choice: Choice | None
    why: str
    failed: bool = False


def forced() -> str | None:
    """The path that this rank's environment asks for, None where it names none."""
    return asked_for(VARIABLE)


def decide(
    request: Request,
    name: str | None,
    not_ours: str,
    gather: Gather[Any],
    chooser: Chooser = op.choose,
) -> Decision:
    """Which path all ranks take. Collective.

    name: as `forced` returns it on this rank. not_ours: why our operator has no place in this
    server, if it has none. gather: over the model-TP group. Raises PathError, on every rank, where
    the ranks' names differ, or where what they ask for does not run.
    """
    # First of all: which steps follow depends on this, and they are collective too.
    found = gather((name, not_ours))
    known = [*(implementation.name for implementation in op.IMPLEMENTATIONS), SGLANG]
    name = common_name(VARIABLE, known, [asked for asked, _ in found])
    if name == SGLANG:
        return Decision(None, "asked for")
    choice, problem = None, first_of([why for _, why in found])
    by_rule = bool(problem)
    if not problem:
        choice, own = _ours(request, name, chooser)
        # Ranks route the same tokens and add up their experts' outputs: they must not differ in a
        # bit, so all run the same kernel.
        problem = first_problem(gather)(own)
    if name is not None and problem:
        raise not_served(VARIABLE, name, problem)
    if problem or choice is None:
        return Decision(None, problem, failed=not by_rule and _allowed(request))
    return Decision(choice, choice.why)


def _allowed(request: Request) -> bool:
    """Whether the rules allow one of our kernels on this rank."""
    kernels = (each for each in op.IMPLEMENTATIONS if each.name != reference.NAME)
    return any(not refusal_of(each, request) for each in kernels)


def _ours(request: Request, name: str | None, chooser: Chooser) -> tuple[Choice | None, str]:
    """The implementation for this rank, or why it has none."""
    try:
        if name is None and request.device == "cpu":
            return replace(chooser(request, reference.NAME), why=NO_ACCELERATOR), ""
        choice = chooser(request, name)
    except KernelUnavailable as error:
        return None, str(error)
    if name is None and choice.name == reference.NAME:
        return None, choice.why  # SGLang's kernels are faster than plain PyTorch
    return choice, ""


class Gate(Protocol):
    """The layer's gate: its weight, [experts, hidden] fp32, and the product with it in fp32."""

    weight: nn.Parameter

    def __call__(self, hidden_states: torch.Tensor, /) -> torch.Tensor: ...


class Router:
    """Routes tokens with the gate of one layer and the correction bias that its TopK has.

    Not a module: the parameters belong to the layer, under their checkpoint names.
    """

    def __init__(self, gate: Gate, topk: TopK) -> None:
        """topk: with a correction bias, bound to the experts' runner."""
        self._gate = gate
        self._topk = topk
        request = request_for(gate.weight, topk.topk_config.top_k)
        self._choice = _decided(request, _not_ours(topk))
        if self._choice is not None:
            topk.topk_config.custom_routing_function = self._route

    def __call__(self, hidden_states: torch.Tensor) -> Any:
        """[tokens, hidden], at least one token -> SGLang's TopKOutput."""
        if self._choice is None:
            logits = self._gate(hidden_states)
        else:
            shape = (hidden_states.shape[0], self._gate.weight.shape[0])
            logits = hidden_states.new_empty(shape, dtype=torch.float32)
        return self._topk(hidden_states, logits)

    def _route(
        self, hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """TopK's custom routing function: fills gating_output, [tokens, experts] fp32."""
        assert self._choice is not None
        assert renormalize, "the architecture renormalises"
        bias = self._topk.topk_config.correction_bias
        arguments = (hidden_states, self._gate.weight, bias, gating_output, topk)
        if torch.compiler.is_compiling():
            return _route_opaque(*arguments, self._choice.name)
        return _route(*arguments, self._choice)


def _route(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    logits: torch.Tensor,
    top_k: int,
    choice: Choice,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = op.route(choice, hidden, weight, bias, top_k=top_k, logits=logits)
    return weights, ids


# One node for torch.compile: how tokens are cut depends on their number, and a graph that was
# traced through it would be compiled anew for each.
@torch.library.custom_op("sglang_minimax::route", mutates_args=("logits",))
def _route_opaque(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    logits: torch.Tensor,
    top_k: int,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    choice = _chosen(request_for(weight, top_k, hidden.dtype), name)
    return _route(hidden, weight, bias, logits, top_k, choice)


@_route_opaque.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    logits: torch.Tensor,
    top_k: int,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (hidden.shape[0], top_k)
    return weight.new_empty(shape), weight.new_empty(shape, dtype=torch.int32)


def request_for(weight: torch.Tensor, top_k: int, dtype: torch.dtype | None = None) -> Request:
    """What this server asks of the operator. dtype: of hidden states, by default the model's."""
    device, capability = kind_and_capability(device_of(weight))
    return Request(
        device=device,
        dtype=dtype or torch.get_default_dtype(),
        experts=weight.shape[0],
        hidden=weight.shape[1],
        top_k=top_k,
        batch_invariant=bool(get_exec().deterministic.enable_deterministic_inference),
        capability=capability,
    )


def _not_ours(topk: TopK) -> str:
    """Why our operator has no place in this server, empty where it has one."""
    config = topk.topk_config
    if config.output_format is not TopKOutputFormat.STANDARD:
        return f"the experts' runner {get_exec().moe.moe_runner_backend} routes by itself"
    if config.num_shared_topk_slots:
        return "SGLang adds shared experts to those chosen"
    if get_exec().moe.ep_dispatch_algorithm == "fake":
        return "--ep-dispatch-algorithm fake replaces the logits"
    return ""


@cache
def _decided(request: Request, not_ours: str) -> Choice | None:
    """Decide once for all layers of a shape, and say what. Collective."""
    parallel = get_parallel()
    gather = group_gather(request.device, parallel.tp_group.world_size, "tp_group")
    choice, why, failed = decide(request, forced(), not_ours, gather)
    name = SGLANG if choice is None else choice.name
    line = f"Router: {name} on {request.device} ({why})"
    tell(logger, line, failed=failed, group_rank=parallel.tp_rank)
    return choice


@cache
def _chosen(request: Request, name: str) -> Choice:
    return op.choose(request, name)
