"""What the model of the exchange remembers, and how it forgets what no longer matters."""

from __future__ import annotations

from typing import NamedTuple

WAIT, ADVANCE, PUSH, POLL, END, DONE = range(6)  # stages of a block
NOBODY = -1  # the launch of a word that nobody needs: read, cleared or never written


class Word(NamedTuple):
    """One 64-bit word. The protocol sees the tag; launch and token are whom the word is for."""

    tag: int
    launch: int
    token: int


class Cell(NamedTuple):
    """One address of a buffer: the word there, and those on their way to it, oldest first."""

    word: Word
    flying: tuple[Word, ...]


class Block(NamedTuple):
    """A thread block. `unread`: a bit for each peer whose word of the present item is awaited."""

    stage: int
    epoch: int
    item: int
    unread: int
    owes_scrub: bool


class Rank(NamedTuple):
    """One GPU. `ended` launches are over; `grids` are the launches after them that have begun."""

    ended: int
    epoch: int  # the ticket's upper half
    arrivals: int  # and its lower half
    grids: tuple[tuple[Block, ...], ...]
    cells: tuple[Cell, ...]


class State(NamedTuple):
    """launches: tokens of each launch that some rank has begun and another has not ended."""

    launches: tuple[int, ...]
    ranks: tuple[Rank, ...]


class At(NamedTuple):
    """Which block: of which rank, and of which of its grids."""

    rank: int
    grid: int
    block: int


EMPTY = Word(0, NOBODY, NOBODY)
UNUSED = Cell(EMPTY, ())
NOT_STARTED = Block(WAIT, 0, 0, 0, False)
ENDED = Block(DONE, 0, 0, 0, False)


def put(items: tuple, index: int, item: object) -> tuple:
    """Return `items` with another item at `index`."""
    return (*items[:index], item, *items[index + 1 :])


def with_rank(state: State, index: int, rank: Rank) -> State:
    """Return `state` with another rank at `index`."""
    return State(state.launches, put(state.ranks, index, rank))


def with_block(state: State, at: At, block: Block) -> State:
    """Return `state` with another block."""
    ended, epoch, arrivals, grids, cells = state.ranks[at.rank]
    grids = put(grids, at.grid, put(grids[at.grid], at.block, block))
    return with_rank(state, at.rank, Rank(ended, epoch, arrivals, grids, cells))


def without_ended(state: State, index: int) -> State:
    """Return `state` with the oldest grids of a rank counted as ended where all blocks are done."""
    rank = state.ranks[index]
    over = 0
    while over < len(rank.grids) and all(block.stage == DONE for block in rank.grids[over]):
        over += 1
    if not over:
        return state
    rank = rank._replace(ended=rank.ended + over, grids=rank.grids[over:])
    return with_rank(state, index, rank)


def counted_anew(state: State, period: int | None) -> State:
    """Return `state` with launches counted from the oldest that has not ended on every rank.

    period: the number of epochs after which halves and scrubbed slots repeat, where tags count
    without end: epochs then fall by whole periods. None: tags wrap, and stay as they are.
    """
    base = min(rank.ended for rank in state.ranks)
    if not base:
        return state
    lowest = min(rank.epoch for rank in state.ranks) - len(state.launches) - 1
    fall = lowest // period * period if period and lowest >= period else 0

    def word(old: Word) -> Word:
        return old if old.launch == NOBODY else Word(old.tag - fall, old.launch - base, old.token)

    def cell(old: Cell) -> Cell:
        return old if old == UNUSED else Cell(word(old.word), tuple(map(word, old.flying)))

    def block(old: Block) -> Block:
        return old._replace(epoch=old.epoch - fall) if old.stage not in (WAIT, DONE) else old

    ranks = tuple(
        Rank(
            rank.ended - base,
            rank.epoch - fall,
            rank.arrivals,
            tuple(tuple(map(block, grid)) for grid in rank.grids),
            tuple(map(cell, rank.cells)),
        )
        for rank in state.ranks
    )
    return State(state.launches[base:], ranks)
