"""What every rank of an exchange knows beforehand: the rules, the sizes, and where a word goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Literal, NamedTuple

Grain = Literal["access", "word", "token"]


@dataclass(frozen=True)
class Rules:
    """What a block does. The defaults are the protocol; anything else is a mistake or a variant."""

    halves: int = 2  # parts of the buffer that consecutive epochs take in turn
    wraps_to: int = 2  # the tag after the last, odd one: 0 stays invalid, and halves alternate
    waits: bool = True  # griddepcontrol.wait comes before the ticket
    scrubs: bool = True  # block 0 clears one slot a launch, so that no tag outlives the wrap
    scrub_spares_used_slots: bool = True
    zero_call_advances: bool = False  # a call without tokens launches a grid that takes an epoch
    pieces_in_one_launch: bool = False  # a call beyond the buffer; the protocol: a launch a piece
    slots_keep_their_block: bool = True  # from piece to piece within one launch
    block_0_advances: bool = False  # the protocol: the last block to arrive
    captured_calls: int = 0  # > 0: epochs are arguments recorded in a graph of so many calls
    sentinel: bool = False  # a word is a value alone, cleared by its reader: 0 is "not yet here"


@dataclass(frozen=True)
class Bounds:
    """The sizes of one search. The number of calls is not bounded: states repeat.

    blocks: most blocks of a grid. slots: tokens of a half of the buffer.
    lengths: the token counts among which each next call chooses, the same on all ranks.
    last_tag: odd. None: tags never repeat, which is what 2**32 of them are between two wraps.
    first_tag: the first call's; one near the last makes the trace of a bad wrap short.
    early: the next grid's blocks exist, and wait, while this one runs (programmatic launch).
    zero_partials: a sum may be zero; only a sentinel cares.
    judges_lead: a rank that is two launches ahead is a broken promise, whether it does harm or not.
    grain: what one step is. "access": each access. "word": the landing or the reading of a word,
    with what a block does next that nobody can tell apart in time. "token": a block takes all of a
    token's words at once, the last moment at which it can; a word is unread, and in danger, from
    its issue to then, so nothing is lost that a finer grain would find (`Exchange._collect`).
    """

    ranks: int = 2
    blocks: int = 1
    slots: int = 1
    lengths: tuple[int, ...] = (0, 1)
    last_tag: int | None = None
    first_tag: int = 1
    early: bool = False
    zero_partials: bool = False
    judges_lead: bool = True
    grain: Grain = "word"


class Item(NamedTuple):
    """A token of a block, and the slot that it takes in which piece of the launch."""

    piece: int
    slot: int
    token: int


@dataclass(frozen=True)
class Layout:
    """The arithmetic that all ranks share: a call's launches, a block's tokens, epochs, places."""

    bounds: Bounds
    rules: Rules = field(default_factory=Rules)

    def launches_of(self, tokens: int) -> tuple[int, ...]:
        """Return the token counts of a call's launches: one a piece of the buffer's size."""
        slots = self.bounds.slots
        if tokens <= slots or self.rules.pieces_in_one_launch:
            return (tokens,)
        return (slots,) * (tokens // slots) + ((tokens % slots,) if tokens % slots else ())

    def grid_of(self, tokens: int) -> int:
        """Return the number of blocks of a launch; a call without tokens launches nothing."""
        if tokens == 0:
            return int(self.rules.zero_call_advances)
        kept = self.rules.slots_keep_their_block
        return min(tokens, self.bounds.blocks, self.bounds.slots if kept else tokens)

    def items_of(self, tokens: int, block: int) -> tuple[Item, ...]:
        """Return a block's tokens in its order: slots block, block + grid, ... of each piece."""
        kept = self.rules.slots_keep_their_block
        return _items(tokens, block, self.grid_of(tokens), self.bounds.slots, kept)

    def epochs_of(self, tokens: int) -> int:
        """Return how many epochs a launch takes: one a piece."""
        return -(-tokens // self.bounds.slots) if self.rules.pieces_in_one_launch and tokens else 1

    def after(self, epoch: int, times: int = 1) -> int:
        """Return the epoch that is so many later."""
        for _ in range(times):
            if epoch == self.rules.captured_calls:
                epoch = 1
            else:
                epoch = self.rules.wraps_to if epoch == self.bounds.last_tag else epoch + 1
        return epoch

    def cells(self) -> int:
        """Return the number of words in a rank's buffer: one a half, slot and peer."""
        return self.rules.halves * self.bounds.slots * (self.bounds.ranks - 1)

    def address(self, epoch: int, slot: int, reader: int, writer: int) -> int:
        """Return which cell of the reader has the writer's word."""
        ranks, half = self.bounds.ranks, epoch % self.rules.halves
        return (half * self.bounds.slots + slot) * (ranks - 1) + (writer - reader - 1) % ranks

    def place(self, address: int, reader: int) -> tuple[int, int, int]:
        """Return half, slot and writer of an address of the reader: `address` backwards."""
        slot, offset = divmod(address, self.bounds.ranks - 1)
        half, slot = divmod(slot, self.bounds.slots)
        return half, slot, (reader + offset + 1) % self.bounds.ranks

    def peers(self, rank: int) -> list[int]:
        """Return the other ranks."""
        return [peer for peer in range(self.bounds.ranks) if peer != rank]

    def tags_return(self) -> bool:
        """Whether a tag is used again, so that an old word's tag has to be remembered."""
        return self.bounds.last_tag is not None or self.rules.captured_calls > 0


@cache
def _items(tokens: int, block: int, grid: int, slots: int, kept: bool) -> tuple[Item, ...]:
    return tuple(
        Item(token // slots, token % slots, token)
        for token in range(tokens)
        if (token % slots if kept else token) % grid == block
    )
