"""The exchange of the attention prologue, as steps that a search can put in any order.

Each rank of a group has partial sums of a token and needs everybody's. Nothing but the words
themselves synchronises the ranks: a word is a value and a tag in one 64-bit store, and its reader
polls until the tag is the one that it expects. docs/exchange.md explains the protocol; here are its
rules (`Rules`), the sizes within which every interleaving is tried (`Bounds`), and the program of a
block, from its ticket to its end (`Exchange`).

What a step may be: one atomic or store to the own rank's memory, the issue of one token's words,
the landing of one word in a peer's memory, or the successful poll of one word. Words to one address
land in the order of their issue; between addresses there is no order. A poll that fails changes
nothing and is no step. Of a token's two words (q, k) one is modelled: they take the same way.

Beside its tag, a word carries which launch and token it is for. The protocol never looks at that:
the promises are judged by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from tests.protocol.explorer import Broken, Label
from tests.protocol.rules import Bounds, Item, Layout, Rules
from tests.protocol.state import (
    ADVANCE,
    EMPTY,
    END,
    ENDED,
    NOBODY,
    NOT_STARTED,
    POLL,
    PUSH,
    UNUSED,
    WAIT,
    At,
    Block,
    Cell,
    Rank,
    State,
    Word,
    counted_anew,
    put,
    with_block,
    with_rank,
    without_ended,
)

RIGHT_WORD = "every word that is read is the one meant"
NOTHING_LOST = "no word is lost before it is read"
NEVER_TWO_AHEAD = "no rank is two launches ahead of another"
EVERY_CALL_ENDS = "every call ends"

Step = tuple[Label, State | Broken]


@dataclass(frozen=True)
class Exchange:
    """The protocol as a model for `explorer.explore`.

    absolute: launches and tags go on counting, for traces that can be followed. Otherwise they
    count from the oldest launch that has not ended everywhere, so that states repeat.
    """

    bounds: Bounds
    rules: Rules = field(default_factory=Rules)
    absolute: bool = False

    @cached_property
    def layout(self) -> Layout:
        """The arithmetic of addresses, epochs and tokens."""
        return Layout(self.bounds, self.rules)

    def start(self) -> State:
        """Return zeroed buffers, and tickets at the first epoch."""
        cells = (UNUSED,) * self.layout.cells()
        return State((), (Rank(0, self.bounds.first_tag, 0, (), cells),) * self.bounds.ranks)

    def at_rest(self, state: State) -> bool:
        """Whether every launch has ended on every rank."""
        return not any(rank.grids or rank.ended < len(state.launches) for rank in state.ranks)

    def steps(self, state: State) -> Iterator[Step]:
        """Yield what may happen next: a stream launches, a block goes on, or a word lands."""
        stuck = True
        for r in range(self.bounds.ranks):
            for label, after in self._steps_of(state, r):
                stuck = False
                yield label, self._counted(after)
        if stuck and not self.at_rest(state):
            yield ("stuck",), Broken(EVERY_CALL_ENDS, "nobody can go on")
            return
        for label, after in self._new_calls(state):
            yield label, self._counted(after)

    def _steps_of(self, state: State, r: int) -> Iterator[Step]:
        rank = state.ranks[r]
        begun = rank.ended + len(rank.grids)
        if begun < len(state.launches) and self._may_launch(rank):
            yield ("launch", r, state.launches[begun]), self._launched(state, r)
        for g, grid in enumerate(rank.grids):
            for b, block in enumerate(grid):
                at = At(r, g, b)
                if block.stage != WAIT:
                    yield from self._continue(state, at, block)
                elif g == 0 or not self.rules.waits:
                    yield ("ticket", *at), self._run_on(self._take_ticket(state, at), at)
        for address, cell in enumerate(rank.cells):
            if cell.flying and self.bounds.grain != "token":
                yield ("land", r, address), self._land(state, r, address)

    def _counted(self, state: State | Broken) -> State | Broken:
        if self.absolute or isinstance(state, Broken):
            return state
        period = 2 * self.rules.halves * self.bounds.slots
        return counted_anew(state, None if self.layout.tags_return() else period)

    # The host: which launches a stream of calls becomes, and when they begin.

    def _may_launch(self, rank: Rank) -> bool:
        """Stream order; with an early launch, once every block of the grid before has begun."""
        if not rank.grids:
            return True
        most = 2 if self.rules.waits else 3
        begun = all(block.stage != WAIT for block in rank.grids[-1])
        return self.bounds.early and begun and len(rank.grids) < most

    def _new_calls(self, state: State) -> Iterator[Step]:
        """The first rank to come to a call finds any length there."""
        oldest = min(rank.ended for rank in state.ranks)
        for r, rank in enumerate(state.ranks):
            if rank.ended + len(rank.grids) < len(state.launches) or not self._may_launch(rank):
                continue
            for tokens in self.bounds.lengths:
                # Two calls without tokens between the ranks stand for more.
                if tokens or state.launches[oldest:].count(0) < 2:
                    known = State(state.launches + self.layout.launches_of(tokens), state.ranks)
                    yield ("launch", r, tokens), self._launched(known, r)

    def _launched(self, state: State, r: int) -> State:
        rank = state.ranks[r]
        grid = (NOT_STARTED,) * self.layout.grid_of(state.launches[rank.ended + len(rank.grids)])
        return without_ended(with_rank(state, r, rank._replace(grids=(*rank.grids, grid))), r)

    def now(self, state: State, at: At) -> tuple[Item, int]:
        """Return the item that a block is at, and the epoch of its piece."""
        rank = state.ranks[at.rank]
        block = rank.grids[at.grid][at.block]
        item = self.layout.items_of(state.launches[rank.ended + at.grid], at.block)[block.item]
        return item, self.layout.after(block.epoch, item.piece)

    # A block's program. First the order of its steps, then the steps.

    def _continue(self, state: State, at: At, block: Block) -> Iterator[Step]:
        if block.owes_scrub:  # due between the ticket and the end, at any time
            yield ("scrub", *at), self._run_on(self._scrub(state, at), at)
        if block.stage == ADVANCE:
            yield ("advance", *at), self._run_on(self._advance(state, at), at)
        elif block.stage == PUSH:
            for zero in (0, 1) if self.bounds.zero_partials else (0,):
                yield ("push", *at, zero), self._run_on(self._push(state, at, zero), at)
        elif block.stage == POLL and self.bounds.grain == "token":
            taken = self._collect(state, at)
            if taken is not None:
                yield ("collect", *at), self._run_on(taken, at)
        elif block.stage == POLL:
            for peer in range(self.bounds.ranks):
                if block.unread >> peer & 1 and self._is_here(state, at, peer):
                    yield ("read", *at, peer), self._run_on(self._read(state, at, peer), at)
        elif block.stage == END and not block.owes_scrub:
            yield ("end", *at), self._end(state, at)

    def _run_on(self, state: State | Broken, at: At) -> State | Broken:
        """Unless each access is a step, take with a step what follows and cannot be told apart.

        The ticket is this grid's alone; a word pushed later is a word that landed later. Only the
        moment of a scrub might be noticed: that is for the grain "access" to show.
        """
        while self.bounds.grain != "access" and not isinstance(state, Broken):
            block = state.ranks[at.rank].grids[at.grid][at.block]
            if block.stage == ADVANCE:
                state = self._advance(state, at)
            elif block.owes_scrub:
                state = self._scrub(state, at)
            elif block.stage == PUSH and not self.bounds.zero_partials:
                state = self._push(state, at, zero=0)
            elif block.stage == END:
                return self._end(state, at)
            else:
                break
        return state

    def _take_ticket(self, state: State, at: At) -> State | Broken:
        """One atomic add gives a block its launch's epoch and its place among the arrivals."""
        rank = state.ranks[at.rank]
        number = rank.ended + at.grid
        if self.bounds.judges_lead and self._is_two_ahead(state, number):
            return Broken(NEVER_TWO_AHEAD, "another has not ended the launch before the last")
        arrivals = rank.arrivals + 1
        is_last = arrivals == len(rank.grids[at.grid])
        if self.rules.block_0_advances:
            is_last = at.block == 0
        first = PUSH if state.launches[number] else END
        block = Block(
            ADVANCE if is_last else first, rank.epoch, 0, 0, at.block == 0 and self.rules.scrubs
        )
        return with_block(with_rank(state, at.rank, rank._replace(arrivals=arrivals)), at, block)

    def _advance(self, state: State, at: At) -> State:
        """The last to arrive stores the next launch's epoch: everyone has read this one's."""
        rank = state.ranks[at.rank]
        block, tokens = rank.grids[at.grid][at.block], state.launches[rank.ended + at.grid]
        pieces = -(-tokens // self.bounds.slots) if self.rules.pieces_in_one_launch else 1
        rank = rank._replace(epoch=self.layout.after(block.epoch, max(pieces, 1)), arrivals=0)
        block = block._replace(stage=PUSH if tokens else END)
        return with_block(with_rank(state, at.rank, rank), at, block)

    def _scrub(self, state: State, at: At) -> State | Broken:
        """Block 0 clears the slot whose turn it is in this half, unless the launch uses it."""
        rank = state.ranks[at.rank]
        block, cells = rank.grids[at.grid][at.block], rank.cells
        slot = (block.epoch >> 1) % self.bounds.slots
        used = slot < state.launches[rank.ended + at.grid]
        if not (used and self.rules.scrub_spares_used_slots):
            for peer in self.layout.peers(at.rank):
                address = self.layout.address(block.epoch, slot, at.rank, peer)
                if self._in_danger(cells[address]):
                    return Broken(NOTHING_LOST, "the scrub clears one that was not read")
                cells = put(cells, address, Cell(EMPTY, cells[address].flying))
        state = with_rank(state, at.rank, rank._replace(cells=cells))
        return with_block(state, at, block._replace(owes_scrub=False))

    def _push(self, state: State, at: At, zero: int) -> State | Broken:
        """Send the token's word to every peer."""
        rank = state.ranks[at.rank]
        item, epoch = self.now(state, at)
        tag = 1 - zero if self.rules.sentinel else epoch
        word = Word(tag, rank.ended + at.grid, item.token)
        block, unread = rank.grids[at.grid][at.block], 0
        for peer in self.layout.peers(at.rank):
            there = state.ranks[peer]
            address = self.layout.address(epoch, item.slot, peer, at.rank)
            here, flying = there.cells[address]
            if flying and self.bounds.grain == "token":
                return Broken(NOTHING_LOST, "another is sent onto one that was not read")
            cells = put(there.cells, address, Cell(here, (*flying, word)))
            state = with_rank(state, peer, there._replace(cells=cells))
            unread |= 1 << peer
        return with_block(state, at, Block(POLL, block.epoch, block.item, unread, block.owes_scrub))

    def _land(self, state: State, r: int, address: int) -> State | Broken:
        """The oldest word on its way to an address of rank r arrives."""
        rank = state.ranks[r]
        word, flying = rank.cells[address]
        if word.launch != NOBODY:
            return Broken(NOTHING_LOST, "another lands on one that was not read")
        cells = put(rank.cells, address, Cell(flying[0], flying[1:]))
        return with_rank(state, r, rank._replace(cells=cells))

    def _is_here(self, state: State, at: At, peer: int) -> bool:
        """Whether a poll of the peer's word ends: it has the tag of this epoch."""
        item, epoch = self.now(state, at)
        word = state.ranks[at.rank].cells[self.layout.address(epoch, item.slot, at.rank, peer)].word
        return word.tag != 0 if self.rules.sentinel else word.tag == epoch

    def _read(self, state: State, at: At, peer: int) -> State | Broken:
        """Take the peer's word; with the last one, go on to the block's next token."""
        rank = state.ranks[at.rank]
        item, epoch = self.now(state, at)
        address = self.layout.address(epoch, item.slot, at.rank, peer)
        word, flying = rank.cells[address]
        if word[1:] != (rank.ended + at.grid, item.token):
            return Broken(RIGHT_WORD, "an old word passes for the one awaited")
        # A tag that never comes back need not be remembered, nor a value that its reader clears.
        remembered = self.layout.tags_return() and not self.rules.sentinel
        old = Word(word.tag, NOBODY, NOBODY) if remembered else EMPTY
        cells = put(rank.cells, address, Cell(old, flying))
        state = with_rank(state, at.rank, rank._replace(cells=cells))
        stage, epoch, index, unread, owes_scrub = rank.grids[at.grid][at.block]
        unread &= ~(1 << peer)
        if not unread:
            index += 1
            items = self.layout.items_of(state.launches[rank.ended + at.grid], at.block)
            stage = PUSH if index < len(items) else END
        return with_block(state, at, Block(stage, epoch, index, unread, owes_scrub))

    def _collect(self, state: State, at: At) -> State | Broken | None:
        """Take all of a token's words, None while one is missing: landing and reading in one step.

        A word on its way may have landed or not: it counts as lost if another is sent after it or
        its place is cleared, and until it is read the old word there can still be seen.
        """
        item, epoch = self.now(state, at)
        missing = False
        for peer in self.layout.peers(at.rank):
            if self._is_here(state, at, peer):
                return Broken(RIGHT_WORD, "an old word passes for the one awaited")
            address = self.layout.address(epoch, item.slot, at.rank, peer)
            flying = state.ranks[at.rank].cells[address].flying
            missing |= not flying or flying[0].tag != epoch
        if missing:
            return None
        for peer in self.layout.peers(at.rank):
            address = self.layout.address(epoch, item.slot, at.rank, peer)
            landed = self._land(state, at.rank, address)
            read = landed if isinstance(landed, Broken) else self._read(landed, at, peer)
            if isinstance(read, Broken):
                return read
            state = read
        return state

    def _is_two_ahead(self, state: State, number: int) -> bool:
        """Whether some rank has not ended the last but one of the launches before this one."""
        launches = state.launches
        return bool(launches[number]) and any(
            sum(tokens > 0 for tokens in launches[rank.ended : number]) > 1 for rank in state.ranks
        )

    def _in_danger(self, cell: Cell) -> bool:
        """Whether the cell has, or in the grain "token" may have, a word that was not read."""
        return cell.word.launch != NOBODY or (self.bounds.grain == "token" and bool(cell.flying))

    def _end(self, state: State, at: At) -> State:
        return without_ended(with_block(state, at, ENDED), at.rank)
