"""Blocks that poll hold their place on the chip: who else must fit there for every call to end.

Two GPUs, one stream a channel. On each, a stream runs one exchange and then a kernel that depends
on it. A block of the exchange sends its words when it comes onto the chip and leaves when its
partner, the block of the same index on the other rank, has come too. A block of the dependent
kernel that was let in early holds its place until the exchange of its stream has ended. The chip
takes blocks in any order, whenever there is a place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.protocol.exchange import EVERY_CALL_ENDS
from tests.protocol.explorer import Broken, Label
from tests.protocol.state import put


class Stream(NamedTuple):
    """One stream on one GPU: bit sets of the exchange's blocks, and its dependent's blocks."""

    come: int
    gone: int
    dependents: int  # that are on the chip
    dependents_ended: bool


@dataclass(frozen=True)
class Residency:
    """The model. places: blocks that a chip holds. channels: streams that exchange on it.

    grid: blocks of an exchange. dependents: blocks that the next kernel of a stream wants.
    let_in_early: dependents are let in once all blocks of the exchange have come; otherwise once
    all of them have read their last word.
    """

    places: int
    channels: int
    grid: int
    dependents: int
    let_in_early: bool

    def start(self) -> tuple[Stream, ...]:
        """Return two empty chips: the streams of the first rank, then those of the second."""
        return (Stream(0, 0, 0, False),) * (2 * self.channels)

    def at_rest(self, state: tuple[Stream, ...]) -> bool:
        """Whether all kernels have ended."""
        return all(stream.dependents_ended for stream in state)

    def steps(
        self, state: tuple[Stream, ...]
    ) -> Iterator[tuple[Label, tuple[Stream, ...] | Broken]]:
        """Yield whatever block may come, go, or be let in next."""
        stuck = True
        for i, stream in enumerate(state):
            for label, after in self._steps_of(state, i, stream):
                stuck = False
                yield (*label, i // self.channels, i % self.channels), put(state, i, after)
        if stuck and not self.at_rest(state):
            yield ("stuck",), Broken(EVERY_CALL_ENDS, "every place is held by a block that waits")

    def _steps_of(
        self, state: tuple[Stream, ...], i: int, stream: Stream
    ) -> Iterator[tuple[Label, Stream]]:
        partner = state[(i + self.channels) % len(state)]
        everyone = (1 << self.grid) - 1
        free = self._free(state, i // self.channels)
        for b in range(self.grid):
            bit = 1 << b
            if free and not stream.come & bit:
                yield ("block comes", b), stream._replace(come=stream.come | bit)
            if stream.come & partner.come & bit and not stream.gone & bit:
                yield ("block goes", b), stream._replace(gone=stream.gone | bit)
        let_in = (stream.come if self.let_in_early else stream.gone) == everyone
        if free and let_in and stream.dependents < self.dependents and not stream.dependents_ended:
            yield ("dependent comes",), stream._replace(dependents=stream.dependents + 1)
        if stream.gone == everyone and not stream.dependents_ended:
            yield ("dependents end",), stream._replace(dependents=0, dependents_ended=True)

    def _free(self, state: tuple[Stream, ...], rank: int) -> int:
        here = state[rank * self.channels : (rank + 1) * self.channels]
        held = sum((s.come & ~s.gone).bit_count() + s.dependents for s in here)
        return self.places - held
