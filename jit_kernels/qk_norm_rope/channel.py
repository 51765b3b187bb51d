"""The buffers through which ranks exchange their sums from inside a kernel.

Each rank of a group owns a buffer of 64-bit words, `word[half 2][slot S][rank N][which 2]`, that
its peers write and it alone reads; `which` is 0 for q's partial sum and 1 for k's. A word is the
partial (fp32 bits, low half) and the epoch's tag (high half), stored at once. The protocol, why two
halves are enough and how tags wrap, is in docs/exchange.md.

Behind the words lie the table of the buffers' addresses and the ticket. They are in the same memory
because it is not the caching allocator's, whose pools a server may give back while it sleeps (RL).

A channel belongs to one stream at a time: calls on it follow one another.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from jit_kernels import symmetric
from jit_kernels.choice import KernelUnavailable

T = TypeVar("T")
# Told this rank's problem ("" for none), returns the first problem of any rank, the same on all.
# Collective, and no rank returns before all have called: a barrier besides.
Agree = Callable[[str], str]

#: Tokens of one launch: the usual chunk of a prefill. Larger batches go in pieces.
SLOTS = 8192
#: One domain of direct access; a warp serves 2 * 16 words.
MAX_RANKS = 16
HALVES = 2
PARTIALS = 2
WORD_BYTES = 8
#: The ticket's high half is the epoch, its low half the arrivals. Tag 0 is never valid.
FIRST_TICKET = 1 << 32

# Open channels by device: their grids must fit on the chip together.
_open: defaultdict[torch.device, weakref.WeakSet[Channel]] = defaultdict(weakref.WeakSet)


def buffer_bytes(size: int, slots: int) -> int:
    """Bytes of one rank's buffer for a group of `size` ranks and `slots` tokens a launch."""
    return HALVES * slots * size * PARTIALS * WORD_BYTES


class Channel:
    """One rank's end of an exchange.

    size, rank: of the group. slots: tokens that one launch may have. pointers: [size] int64 on the
    device, the address of each rank's buffer as this process sees it. ticket: [1] int64 on the
    device. alone: whether no other kernel on these devices waits for a peer.
    """

    def __init__(
        self,
        *,
        rank: int,
        slots: int,
        pointers: torch.Tensor,
        ticket: torch.Tensor,
        alone: bool = False,
        keep: Any = None,
    ) -> None:
        """keep: what owns the memory behind `pointers`; dropped by `close`."""
        self.size = len(pointers)
        self.rank = rank
        self.slots = slots
        self.pointers = pointers
        self.ticket = ticket
        self.alone = alone
        self.captured = False
        self._keep = keep
        self._stream: Any = None
        self.closed = False

    @property
    def sharers(self) -> int:
        """Channels that are open on this device, this one included."""
        return max(1, len(_open[self.ticket.device]))

    def claim(self) -> None:
        """Make the current stream the channel's; called before each launch.

        Two calls in flight at once on one rank would break the exchange: one would overwrite words
        that a slow peer has not read for the other. So a stream that takes the channel over waits
        for all that the earlier one was given. It waits and is not refused, since a refusal would
        depend on how far this rank is, and leave its peers polling.

        While a CUDA graph is captured nothing runs, so there is nothing to order, and the capture's
        stream does not matter: the launches run on the stream that replays the graph. That stream
        must be the one of the eager calls, or be ordered with it; a capture cannot check it.
        RuntimeError where the channel is closed.
        """
        if self.closed:
            raise RuntimeError("the exchange channel is closed; open another one")
        if _capturing():
            self.captured = True
            return
        stream = _current_stream(self.ticket.device)
        if stream == self._stream:
            return
        if self._stream is not None:
            stream.wait_stream(self._stream)
        self._stream = stream

    def close(self) -> None:
        """Give the memory back. No rank may have a call in flight on any of the buffers."""
        self.closed = True
        _open[self.ticket.device].discard(self)
        self._stream = self._keep = None


def open_channel(
    group: Any,
    agree: Agree,
    device: torch.device,
    *,
    slots: int = SLOTS,
    alone: bool = False,
) -> Channel:
    """Open this rank's end of a channel. Collective over `group`.

    group: a torch.distributed ProcessGroup of 2 to 16 ranks, one device each. After every step
    the ranks agree on its outcome, so that none waits for one that has failed. alone: see Channel.
    Raises KernelUnavailable with the same sentence on all ranks where it cannot be done.
    """
    size, rank = group.size(), group.rank()
    _together(agree, lambda: _check(size, slots, device))
    words = buffer_bytes(size, slots)
    own = WORD_BYTES * (size + 1)
    local = _together(agree, lambda: symmetric.allocate(words + own, device))
    shared = _together(agree, lambda: symmetric.share(local, group))

    def cleared() -> Channel:
        # Words of tag 0 are never valid. Zero before any rank can push: agreeing is the barrier.
        shared.local.zero_()
        pointers, ticket = shared.local[words:].view(torch.int64).split([size, 1])
        pointers.copy_(torch.tensor(shared.pointers, dtype=torch.int64))
        ticket.fill_(FIRST_TICKET)
        channel = Channel(
            rank=rank, slots=slots, pointers=pointers, ticket=ticket, alone=alone, keep=shared
        )
        _synchronize(device)
        _open[ticket.device].add(channel)
        return channel

    return _together(agree, cleared)


def _check(size: int, slots: int, device: torch.device) -> None:
    if not 2 <= size <= MAX_RANKS:
        raise KernelUnavailable(f"an exchange has 2 to {MAX_RANKS} ranks, the group has {size}")
    if slots < 1:
        raise KernelUnavailable(f"an exchange needs at least one slot, not {slots}")
    if any(channel.captured for channel in _open[device]):
        raise KernelUnavailable("a CUDA graph holds launches that share the chip with no other")
    problem = symmetric.unavailable(device)
    if problem:
        raise KernelUnavailable(problem)


def _together(agree: Agree, step: Callable[[], T]) -> T:
    """Take a step on every rank; where it failed on one, raise KernelUnavailable on all."""
    problem = ""
    done: T | None = None
    try:
        done = step()
    except Exception as error:  # of whatever kind: the other ranks must hear of it
        problem = str(error) or type(error).__name__
    common = agree(problem)
    if common:
        raise KernelUnavailable(common)
    return done  # type: ignore[return-value]


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _current_stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device)


def _synchronize(device: torch.device) -> None:
    torch.cuda.synchronize(device)
