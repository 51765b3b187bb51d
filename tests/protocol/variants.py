"""Plausible mistakes of the exchange, each with the least sizes at which it shows."""

from __future__ import annotations

from dataclasses import dataclass

from tests.protocol.exchange import (
    EVERY_CALL_ENDS,
    NOTHING_LOST,
    RIGHT_WORD,
)
from tests.protocol.rules import Bounds, Rules


@dataclass(frozen=True)
class Mistake:
    """Rules that break a promise within bounds in which the protocol keeps all of them.

    needs: rules that the mistake is made on top of, where those of the protocol leave no room for
    it; with them alone nothing breaks. breaks: the promise of the shortest counterexample.
    """

    name: str
    rules: Rules
    bounds: Bounds
    breaks: str
    why_plausible: str
    needs: Rules | None = None


IN_ONE_LAUNCH = Rules(pieces_in_one_launch=True, halves=3, scrubs=False)

MISTAKES = (
    Mistake(
        "one buffer",
        Rules(halves=1),
        Bounds(lengths=(1,)),
        NOTHING_LOST,
        "the tag tells calls apart, so why two halves",
    ),
    Mistake(
        "a zero-token call takes an epoch",
        Rules(zero_call_advances=True),
        Bounds(lengths=(0, 1)),
        NOTHING_LOST,
        "every call is treated alike",
    ),
    Mistake(
        "early launch without the wait",
        Rules(waits=False),
        Bounds(slots=2, lengths=(2,), early=True, judges_lead=False),
        NOTHING_LOST,
        "the kernel reads nothing of the exchange before it",
    ),
    Mistake(
        "no scrub",
        Rules(scrubs=False),
        Bounds(slots=2, lengths=(1, 2), last_tag=9, first_tag=2),
        RIGHT_WORD,
        "tags differ for 2**32 calls",
    ),
    Mistake(
        "the scrub clears slots in use",
        Rules(scrub_spares_used_slots=False),
        Bounds(lengths=(1,)),
        NOTHING_LOST,
        "the slot will be written anyway",
    ),
    Mistake(
        "tag 1 after the last",
        Rules(wraps_to=1),
        Bounds(lengths=(1,), last_tag=5, first_tag=5),
        NOTHING_LOST,
        "0 is skipped, as it must be, and two odd epochs meet",
    ),
    Mistake(
        "tag 0 after the last",
        Rules(wraps_to=0),
        Bounds(lengths=(1,), last_tag=5, first_tag=5),
        RIGHT_WORD,
        "that is what an unsigned integer does",
    ),
    Mistake(
        "block 0 advances the epoch",
        Rules(block_0_advances=True),
        Bounds(slots=2, blocks=2, lengths=(2,)),
        EVERY_CALL_ENDS,
        "one block is as good as another",
    ),
    Mistake(
        "epochs captured in a graph",
        Rules(captured_calls=2),
        Bounds(lengths=(1,)),
        RIGHT_WORD,
        "the host counts calls, and passes the number as an argument",
    ),
    Mistake(
        "pieces in one launch, two halves",
        Rules(pieces_in_one_launch=True, scrubs=False),
        Bounds(slots=2, blocks=2, lengths=(2, 3)),
        NOTHING_LOST,
        "within the launch, a block's own order keeps its slots apart",
        needs=IN_ONE_LAUNCH,
    ),
    Mistake(
        "slots change blocks between pieces",
        Rules(pieces_in_one_launch=True, scrubs=False, slots_keep_their_block=False),
        Bounds(slots=2, blocks=3, lengths=(6,)),
        NOTHING_LOST,
        "token t goes to block t % grid, as in any grid-stride loop",
        needs=Rules(pieces_in_one_launch=True, scrubs=False),
    ),
    Mistake(
        "zero as the sentinel",
        Rules(sentinel=True),
        Bounds(lengths=(1,), zero_partials=True),
        EVERY_CALL_ENDS,
        "a sum of squares is never zero",
    ),
)
