"""A counterexample of the exchange as an engineer would tell it: who does what, and what breaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tests.protocol.exchange import Exchange
from tests.protocol.explorer import Broken, Counterexample, Label
from tests.protocol.state import EMPTY, NOBODY, POLL, At, State, Word


def told(model: Exchange, example: Counterexample) -> str:
    """Return a counterexample, a step a line, with launches and tags counted from the start."""
    model = replace(model, absolute=True)
    state = model.start()
    lines: list[str] = []
    for label in example.labels:
        (after,) = (after for step, after in model.steps(state) if step == label)
        lines += _told_step(model, state, label, after)
        if isinstance(after, Broken):
            lines.append(f"BROKEN: {after.promise}: {after.how}")
            break
        state = after
    else:
        lines.append(f"BROKEN: {example.broken.promise}: {example.broken.how}")
    return "\n".join(lines)


def _told_step(model: Exchange, state: State, label: Label, after: State | Broken) -> Iterator[str]:
    kind, *rest = label
    if kind == "stuck":
        yield from _waiting(model, state)
        return
    r = int(rest[0])
    if kind == "launch":
        rank = state.ranks[r]
        yield f"rank {r}: launch {rank.ended + len(rank.grids)} begins, tokens: {rest[1]}"
    elif kind == "land":
        half, slot, writer = model.layout.place(int(rest[1]), r)
        cell = state.ranks[r].cells[int(rest[1])]
        onto = "" if cell.word == EMPTY else f", over {_word(cell.word)}"
        yield (
            f"rank {r}: rank {writer}'s {_word(cell.flying[0])} lands in half {half}, "
            f"slot {slot}{onto}"
        )
    else:
        at = At(*(int(part) for part in rest[:3]))
        yield (
            f"rank {r}, block {at.block} of launch {state.ranks[r].ended + at.grid}: "
            + "; ".join(_block_step(model, state, str(kind), at, rest[3:], after))
        )


def _block_step(
    model: Exchange,
    state: State,
    kind: str,
    at: At,
    rest: list[str | int],
    after: State | Broken,
) -> Iterator[str]:
    rank = state.ranks[at.rank]
    if kind == "ticket":
        yield f"takes the ticket, epoch {rank.epoch}"
    elif kind == "read":
        item, epoch = model.now(state, at)
        address = model.layout.address(epoch, item.slot, at.rank, int(rest[0]))
        found = _word(rank.cells[address].word)
        yield f"polls for rank {rest[0]}'s token {item.token}, finds {found}"
    elif kind == "collect":
        yield f"reads all words of token {model.now(state, at)[0].token}"
    elif kind in ("scrub", "end"):
        yield {"scrub": "scrubs", "end": "has no more tokens"}[kind]
    if isinstance(after, State):
        yield from _effects(model, state, after, at.rank)


def _effects(model: Exchange, state: State, after: State, r: int) -> Iterator[str]:
    """What else a step did: seen in what is different after it."""
    if after.ranks[r].epoch != state.ranks[r].epoch:
        yield f"stores epoch {after.ranks[r].epoch}"
    sent: set[str] = set()
    for q, (old, new) in enumerate(zip(state.ranks, after.ranks, strict=True)):
        for address, (was, is_now) in enumerate(zip(old.cells, new.cells, strict=True)):
            half, slot, _ = model.layout.place(address, q)
            if len(is_now.flying) > len(was.flying):
                sent.add(f"sends {_word(is_now.flying[-1])} to half {half}, slot {slot}")
            if is_now.word == EMPTY != was.word and was.word.launch == NOBODY:
                yield f"clears half {half}, slot {slot}"
    yield from sorted(sent)
    for number in range(state.ranks[r].ended, after.ranks[r].ended):
        yield f"launch {number} has ended here"


def _waiting(model: Exchange, state: State) -> Iterator[str]:
    for r, rank in enumerate(state.ranks):
        for g, grid in enumerate(rank.grids):
            for b, block in enumerate(grid):
                if block.stage != POLL:
                    continue
                item, epoch = model.now(state, At(r, g, b))
                for peer in range(len(state.ranks)):
                    if block.unread >> peer & 1:
                        address = model.layout.address(epoch, item.slot, r, peer)
                        awaited = "a value" if model.rules.sentinel else f"tag {epoch}"
                        yield (
                            f"rank {r}, block {b} of launch {rank.ended + g}: polls for {awaited} "
                            f"of rank {peer} in half {epoch % model.rules.halves}, "
                            f"slot {item.slot}; there is {_word(rank.cells[address].word)}"
                        )


def _word(word: Word) -> str:
    if word.launch == NOBODY:
        return f"an old tag {word.tag}" if word.tag else "nothing (0)"
    return f"token {word.token} of launch {word.launch} (tag {word.tag})"
