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
from typing import Any, Protocol

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
    first_problem,
    group_gather,
    not_served,
)

logger = logging.getLogger(__name__)

VARIABLE = "SGLANG_MINIMAX_ROUTER"
#: The path that is not ours: logits by a GEMM in fp32, then TopK's own kernels.
SGLANG = "sglang"

Chooser = Callable[[Request, str | None], Choice]


def forced() -> str | None:
    """The path that the environment asks for, None where it leaves the choice to us."""
    return asked_for(
        VARIABLE, [*(implementation.name for implementation in op.IMPLEMENTATIONS), SGLANG]
    )


def decide(
    request: Request,
    name: str | None,
    not_ours: str,
    gather: Gather[str],
    chooser: Chooser = op.choose,
) -> tuple[Choice | None, str]:
    """Our operator's implementation, None for SGLang's path, and why. Collective.

    name: as `forced` returns it. not_ours: why our operator has no place in this server, if it has
    none. gather: over the model-TP group. Raises PathError, on every rank, where what was asked for
    does not run.
    """
    if name == SGLANG:
        return None, "asked for"
    choice, problem = None, not_ours
    if not problem:
        choice, problem = _ours(request, name, chooser)
        # Ranks route the same tokens and add up their experts' outputs: they must not differ in a
        # bit, so all run the same kernel.
        problem = first_problem(gather)(problem)
    if name is not None and problem:
        raise not_served(VARIABLE, name, problem)
    return (None, problem) if problem or choice is None else (choice, choice.why)


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
    """What this server asks of the operator. dtype: of hidden states, by default the model's.

    ROCm calls its devices cuda too, but has no compute capability.
    """
    device = weight.device.type
    nvidia = device == "cuda" and torch.version.hip is None
    return Request(
        device=device,
        dtype=dtype or torch.get_default_dtype(),
        experts=weight.shape[0],
        hidden=weight.shape[1],
        top_k=top_k,
        batch_invariant=bool(get_exec().deterministic.enable_deterministic_inference),
        capability=torch.cuda.get_device_capability(weight.device) if nvidia else None,
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
    """Decide once for all layers of a shape, with one line from the first rank. Collective."""
    parallel = get_parallel()
    gather = group_gather(request.device, parallel.tp_group.world_size, "tp_group")
    choice, why = decide(request, forced(), not_ours, gather)
    if parallel.tp_rank == 0 and parallel.pp_rank == 0:
        name = SGLANG if choice is None else choice.name
        logger.info("Router: %s on %s (%s)", name, request.device, why)
    return choice


@cache
def _chosen(request: Request, name: str) -> Choice:
    return op.choose(request, name)
