"""The router in Triton, on NVIDIA and AMD devices: two launches, no fp32 copy of the activations.

The first launch computes logits. For few tokens the hidden dimension is cut into parts, so that
all processors take part in reading the gate's weight; the second launch adds the parts in their
order, always the same, and chooses. Nothing is kept between calls: the partial logits live in a
buffer of each call.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from jit_kernels.choice import KernelUnavailable
from jit_kernels.router.contract import Call, Request, Routing, Run

NAME = "triton"

#: The whole row of biased scores is in registers while experts are chosen.
MOST_EXPERTS = 1024
#: What a row of partial logits may cost: beyond this, adding the parts shows.
MOST_PARTS = 16
#: Few, because a batch-invariant call of many tokens has them too, and they are memory.
INVARIANT_PARTS = 4
#: More tokens than this fill a device with larger blocks, which read less.
MANY = 1024
#: Rows that one program of the second launch takes, where there are many.
SELECTED_ROWS = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """How a number of tokens is cut: blocks of a program, parts of the hidden dimension.

    steps: blocks of the hidden dimension in a part. rows: tokens of a program of the second launch.
    """

    block_tokens: int
    block_experts: int
    block_hidden: int
    parts: int
    steps: int
    rows: int
    warps: int
    stages: int


def refusal(request: Request) -> str | None:
    """Why this machine or shape cannot be served, None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if request.device != "cuda" and not interpreted():
        return f"needs an NVIDIA or AMD device, not {request.device}"
    if request.capability is not None and request.capability < (8, 0):
        major, minor = request.capability
        return f"needs tensor cores for bf16 (sm_80), not sm_{major}{minor}"
    if request.experts > MOST_EXPERTS:
        return f"{request.experts} experts are more than {MOST_EXPERTS}"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels, on the CPU, as TRITON_INTERPRET=1 asks for."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def prepare(request: Request) -> Run:
    """Compile for every plan, and return what runs it; KernelUnavailable where that fails."""
    try:
        from jit_kernels.router import triton_kernels

        processors = 1
        if request.device == "cuda":
            device = torch.device(request.device, torch.cuda.current_device())
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            warm_up(request, processors, device)
    except Exception as error:  # a compiler may raise anything
        raise KernelUnavailable(f"{type(error).__name__}: {first_line(error)}") from error

    def run(call: Call) -> Routing:
        return serve(call, plan(call.hidden.shape[0], request, processors), triton_kernels)

    return run


def warm_up(request: Request, processors: int, device: torch.device) -> None:
    """Compile both kernels for every plan, by running them on zeros."""
    from jit_kernels.router import triton_kernels

    # The default dtype is the model's while a server builds its layers.
    fp32 = torch.float32
    weight = torch.zeros(request.experts, request.hidden, dtype=fp32, device=device)
    bias = torch.zeros(request.experts, dtype=fp32, device=device)
    for tokens in distinct(request, processors):
        hidden = torch.zeros(tokens, request.hidden, dtype=request.dtype, device=device)
        how = plan(tokens, request, processors)
        for logits in (None, weight.new_empty(tokens, request.experts)):
            call = Call(hidden, weight, bias, request.top_k, logits)
            # Whether the logits are written is compiled in, and one part never writes them.
            serve(call, replace(how, parts=max(2, how.parts)), triton_kernels)
    torch.cuda.synchronize(device)


def first_line(error: Exception) -> str:
    """The first line of an error's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def plan(tokens: int, request: Request, processors: int = 132) -> Plan:
    """The plan for so many tokens on a device of so many processors.

    It depends on the number of tokens, and so do the last bits of the logits, unless the request
    is batch-invariant.
    """
    if request.batch_invariant:
        block_tokens, block_experts, rows = 16, 32, 1
    else:
        many = tokens > MANY
        block_tokens = 128 if many else next((size for size in (16, 32) if tokens <= size), 64)
        block_experts, rows = (64, SELECTED_ROWS) if many else (32, 1)
    # fp32 tiles take twice the room, and no tensor core wants them large.
    if request.dtype == torch.float32:
        block_tokens, block_experts = min(block_tokens, 32), 32
    block_hidden = 64
    blocks = ceil_div(request.hidden, block_hidden)
    if request.batch_invariant:
        wanted = INVARIANT_PARTS
    else:
        tiles = ceil_div(tokens, block_tokens) * ceil_div(request.experts, block_experts)
        wanted = max(1, min(MOST_PARTS, processors // tiles))
    steps = ceil_div(blocks, wanted)
    parts = ceil_div(blocks, steps)
    large = block_tokens * block_experts >= 8192
    warps, stages = (8, 2) if large else (4, 3)
    return Plan(block_tokens, block_experts, block_hidden, parts, steps, rows, warps, stages)


def distinct(request: Request, processors: int) -> list[int]:
    """Numbers of tokens that between them need all code that a request can need."""
    found: dict[Plan, int] = {}
    for tokens in (1, 17, 33, MANY + 1):
        how = plan(tokens, request, processors)
        # The same code serves any number of parts and steps.
        found.setdefault(replace(how, parts=1, steps=1), tokens)
    return list(found.values())


def serve(call: Call, how: Plan, kernels: ModuleType) -> Routing:
    """Run both launches of `kernels`, which is `triton_kernels` or a copy for the interpreter."""
    tokens, hidden = call.hidden.shape
    experts = call.weight.shape[0]
    weights = call.weight.new_empty(tokens, call.top_k)
    ids = torch.empty(tokens, call.top_k, dtype=torch.int32, device=call.hidden.device)
    partial, whole = call.logits, how.parts == 1
    if partial is None or not whole:  # a single part is already the logits
        partial = call.weight.new_empty(how.parts, tokens, experts)
    grid = (ceil_div(tokens, how.block_tokens), ceil_div(experts, how.block_experts), how.parts)
    kernels.partial_logits[grid](
        call.hidden,
        call.weight,
        partial,
        tokens,
        call.hidden.stride(0),
        how.steps,
        EXPERTS=experts,
        HIDDEN=hidden,
        BLOCK_TOKENS=how.block_tokens,
        BLOCK_EXPERTS=how.block_experts,
        BLOCK_HIDDEN=how.block_hidden,
        num_warps=how.warps,
        num_stages=how.stages,
    )
    kernels.select[(ceil_div(tokens, how.rows),)](
        partial,
        call.bias,
        weights,
        ids,
        partial if call.logits is None else call.logits,
        tokens,
        how.parts,
        EXPERTS=experts,
        TOP_K=call.top_k,
        WRITE_LOGITS=call.logits is not None and not whole,
        BLOCK_TOKENS=how.rows,
        BLOCK_EXPERTS=power_of_two(experts),
        BLOCK_K=power_of_two(call.top_k),
        num_warps=how.rows,
    )
    return Routing(weights, ids)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up.

    >>> ceil_div(7, 2)
    4
    """
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n.

    >>> power_of_two(12), power_of_two(8)
    (16, 8)
    """
    return 1 << (n - 1).bit_length()
