"""The attention prologue in one CUDA launch, the exchange between the ranks included.

The kernel (csrc/kernel.cuh) is compiled for one shape on first use. Ranks of a group push their
partial sums into one another's buffers (csrc/exchange.cuh), for which a call needs a channel. A
batch larger than the channel's slots goes in pieces, one launch each.

`prepare_virtual` compiles the same kernel with all ranks of a group in one cooperative launch on
one device, for tests and benchmarks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from jit_kernels.choice import KernelUnavailable
from jit_kernels.compile import Unit, architecture, load
from jit_kernels.qk_norm_rope.channel import FIRST_TICKET, MAX_RANKS, Channel, buffer_bytes
from jit_kernels.qk_norm_rope.contract import FP8_TYPES, Call, Request
from jit_kernels.qk_norm_rope.fit import VECTOR, Fit

NAME = "cuda"

TYPES = {
    torch.bfloat16: "__nv_bfloat16",
    torch.float16: "__half",
    torch.float8_e4m3fn: "__nv_fp8_e4m3",
    torch.float8_e5m2: "__nv_fp8_e5m2",
    None: "void",
}
HEAD_DIMS = (64, 128, 256)
# For kernels on other streams that wait for a peer as well: NCCL takes up to 32 blocks, DeepEP as
# many by default. They must find room beside blocks that poll.
RESERVED_MULTIPROCESSORS = 32

Run = Callable[[Call], None]


def refusal(request: Request) -> str | None:
    """Why the kernel cannot serve `request`, in one sentence, or None."""
    if request.device.partition(":")[0] != "cuda":
        return f"the device is {request.device}, not cuda"
    if request.capability is None or request.capability < (8, 0):
        return f"the device has capability {request.capability}, the kernel needs 8.0"
    if request.group_size > 1 and request.no_exchange:
        return request.no_exchange
    return shape_refusal(request)


def shape_refusal(request: Request) -> str | None:
    """Why no kernel can be compiled for the shape of `request`, or None; any device."""
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"q is {request.dtype}, the kernel takes bfloat16 and float16"
    if request.cache_dtype not in (None, request.dtype, *FP8_TYPES):
        return f"the cache is {request.cache_dtype}, the kernel writes {request.dtype} or FP8"
    if request.head_dim not in HEAD_DIMS:
        return f"head_dim is {request.head_dim}, the kernel takes 64, 128 or 256"
    if request.rotary_dim % (2 * VECTOR) or request.rotary_dim > request.head_dim:
        return (
            f"{request.rotary_dim} rotated dimensions are not a multiple of {2 * VECTOR} up to "
            f"head_dim {request.head_dim}"
        )
    if request.q_heads < 1 or request.kv_heads < 1:
        return f"{request.q_heads} query and {request.kv_heads} KV heads leave nothing to norm"
    if not 1 <= request.group_size <= MAX_RANKS:
        return f"the group has {request.group_size} ranks, the kernel takes up to {MAX_RANKS}"
    return None


def prepare(request: Request) -> Run:
    """Compile the kernel for `request` and return what serves its calls.

    Raises KernelUnavailable with the compiler's message. The returned function raises ValueError,
    before anything is written, where a call does not fit the request or is not aligned.
    """
    kernel, fit = _Kernel(request), Fit(request)

    def run(call: Call) -> None:
        if not call.tokens:
            return
        fit.check(call)
        channel = call.group.channel if request.group_size > 1 else None
        if channel is None:
            kernel.launch(call, None)
            return
        channel.claim()
        for piece in pieces(call, channel.slots):
            kernel.launch(piece, channel)

    return run


def prepare_virtual(
    request: Request, *, exchange: bool = True, slots: int = 8192, room: int | None = None
) -> VirtualGroup:
    """Compile the kernel with all ranks of the group of `request` in one cooperative launch.

    exchange: False compiles the exchange out: each rank takes the group's size times its own
    sums. Wrong unless the ranks' sums are equal; it is what the exchange's cost is measured
    against, on the same grid. slots: tokens of one launch. room: blocks of one rank at most, by
    default as many as run at a time beside those of the other ranks.
    """
    return VirtualGroup(request, exchange=exchange, slots=slots, room=room)


class VirtualGroup:
    """A group whose ranks share one device; called with every rank's call."""

    def __init__(self, request: Request, *, exchange: bool, slots: int, room: int | None) -> None:
        """The exchange buffers are made here, on the current CUDA device."""
        self._fit = Fit(request, virtual=True)
        self._kernel = _Kernel(request, virtual=True, exchange=exchange)
        size = request.group_size
        own = self._kernel.resident(torch.cuda.current_device()) // size
        self.room = own if room is None else min(own, room)
        self.buffers = torch.zeros(size, buffer_bytes(size, slots) // 8, dtype=torch.int64).cuda()
        pointers = [row.data_ptr() for row in self.buffers]
        self.channel = Channel(
            rank=0,
            slots=slots,
            pointers=torch.tensor(pointers, dtype=torch.int64).cuda(),
            ticket=torch.full((size,), FIRST_TICKET, dtype=torch.int64).cuda(),
        )

    def __call__(self, calls: Sequence[Call]) -> None:
        """Serve one call of every rank.

        The ranks' q must lie at the same distance one after another in one storage, so must their
        k, v, weights and caches. All share positions and slots. ValueError otherwise.
        """
        if not calls[0].tokens:
            return
        stacked = stack(calls)
        for call in calls:
            self._fit.check(call)
        for piece in pieces(stacked, self.channel.slots, dim=1):
            self._kernel.launch(piece, self.channel, self.room)


class _Kernel:
    """One compiled shape and how it is launched."""

    def __init__(self, request: Request, *, virtual: bool = False, exchange: bool = True) -> None:
        if request.capability is None:
            raise KernelUnavailable("the device's capability is not known")
        self._module = load(unit(request, virtual=virtual, exchange=exchange))
        self._virtual = virtual
        # A virtual group is launched cooperatively, which leaves nothing to overlap with.
        self._dependent = request.capability >= (9, 0) and not virtual
        self.resident: Callable[[int], int] = functools.cache(self._module.resident_blocks)
        try:
            # Now, since it loads the kernel, which must not happen while a graph is captured.
            self.resident(torch.cuda.current_device())
        except RuntimeError as error:
            raise KernelUnavailable(f"the compiled kernel cannot be loaded: {error}") from error

    def launch(self, call: Call, channel: Channel | None, room: int | None = None) -> None:
        """One launch. call: at most as many tokens as the channel has slots.

        room: blocks at most, by default this channel's share of those that run at a time.
        """
        norm, rotation, cache = call.norm, call.rotation, call.cache
        tokens = call.q.shape[1 if self._virtual else 0]
        device = call.q.device.index
        if room is None:
            room = self.resident(device) if channel is None else self._room(device, channel)
        blocks = grid(tokens, room)
        self._module.launch(
            *(call.q, call.k, norm.q_weight, norm.k_weight),
            *(norm.q_divisor, norm.k_divisor, norm.eps),
            *((rotation.positions, rotation.cos_sin_cache) if rotation else (None, None)),
            *((cache.v, cache.k_cache, cache.v_cache, cache.slots) if cache else (None,) * 4),
            *((cache.k_scale, cache.v_scale, cache.first_slot) if cache else (1.0, 1.0, 0)),
            *((channel.pointers, channel.ticket) if channel else (None, None)),
            *((channel.rank, channel.slots) if channel else (0, 0)),
            blocks,
            self._dependent,
            # Launch early: see "lock up the chip" in csrc/exchange.cuh.
            channel is not None and channel.alone and channel.sharers == 1,
        )

    def _room(self, device: int, channel: Channel) -> int:
        """Blocks that may poll at a time: this channel's share of the chip."""
        resident = self.resident(device)
        if not channel.alone:
            chip = _multiprocessors(device)
            resident = resident * max(chip - RESERVED_MULTIPROCESSORS, 1) // chip
        return resident // channel.sharers


@functools.cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def unit(request: Request, *, virtual: bool = False, exchange: bool = True) -> Unit:
    """What is compiled for `request`, whose capability is known."""
    if request.capability is None:
        raise KernelUnavailable("the device's capability is not known")
    shape = shape_arguments(request, virtual=virtual, exchange=exchange)
    text = f'#include "qk_norm_rope/csrc/binding.cuh"\nQK_NORM_ROPE_EXPORT({shape});\n'
    name = (
        f"qk_norm_rope_{request.q_heads}_{request.kv_heads}_{request.head_dim}_"
        f"{request.rotary_dim}_tp{request.group_size}"
    )
    return Unit(name, text, architecture(request.capability))


def shape_arguments(request: Request, *, virtual: bool = False, exchange: bool = True) -> str:
    """The template arguments of the kernel's Shape (csrc/heads.cuh)."""
    types = (TYPES[request.dtype], TYPES[request.cache_dtype])
    heads = (request.q_heads, request.kv_heads, request.head_dim, request.rotary_dim)
    flags = (str(flag).lower() for flag in (virtual, exchange))
    return ", ".join(map(str, (*types, *heads, request.group_size, *flags)))


def grid(tokens: int, room: int) -> int:
    """Blocks that share `tokens` evenly where at most `room` blocks run at a time.

    >>> grid(7, 264), grid(300, 264), grid(1000, 264)
    (7, 150, 250)
    """
    room = max(room, 1)
    rounds = -(-tokens // room)
    return -(-tokens // rounds)


def pieces(call: Call, slots: int, dim: int = 0) -> Iterator[Call]:
    """Split a call into calls of at most `slots` tokens. dim: the tokens' in q, k and v."""
    tokens = call.q.shape[dim]
    if tokens <= slots:
        yield call
        return
    for start in range(0, tokens, slots):
        length = min(slots, tokens - start)
        rows = functools.partial(torch.narrow, dim=dim, start=start, length=length)
        part = slice(start, start + length)
        rotation, cache = call.rotation, call.cache
        if rotation is not None:
            rotation = replace(rotation, positions=rotation.positions[part])
        if cache is not None:
            cache = replace(cache, v=rows(cache.v), slots=cache.slots[part])
        yield replace(call, q=rows(call.q), k=rows(call.k), rotation=rotation, cache=cache)


def stack(calls: Sequence[Call]) -> Call:
    """One call whose q, k, v, weights and caches are views with the rank as first dimension."""

    def over(get: Callable[[Call], torch.Tensor]) -> torch.Tensor:
        return _stacked([get(call) for call in calls])

    first = calls[0]
    norm = replace(
        first.norm,
        q_weight=over(lambda call: call.norm.q_weight),
        k_weight=over(lambda call: call.norm.k_weight),
    )
    cache = first.cache
    if cache is not None:

        def of_cache(name: str) -> torch.Tensor:
            return over(lambda call: getattr(call.cache, name))

        cache = replace(
            cache, v=of_cache("v"), k_cache=of_cache("k_cache"), v_cache=of_cache("v_cache")
        )
    return replace(
        first, q=over(lambda call: call.q), k=over(lambda call: call.k), norm=norm, cache=cache
    )


def _stacked(views: Sequence[torch.Tensor]) -> torch.Tensor:
    """[ranks, ...] over tensors that lie at one distance from one another in one storage."""
    first = views[0]
    starts = [view.storage_offset() for view in views]
    apart = starts[1] - starts[0] if len(views) > 1 else 0
    alike = all(
        view.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and view.shape == first.shape
        and view.stride() == first.stride()
        and start == starts[0] + rank * apart
        for rank, (view, start) in enumerate(zip(views, starts, strict=True))
    )
    if not alike or apart < 0:
        raise ValueError("qk_norm_rope_: the virtual ranks' tensors are not evenly stacked")
    return first.as_strided((len(views), *first.shape), (apart, *first.stride()), starts[0])
