"""The searches that the protocol has passed: sizes, and what each is there to show."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.protocol.exchange import Exchange
from tests.protocol.explorer import Result, explore
from tests.protocol.rules import Bounds, Rules


@dataclass(frozen=True)
class Search:
    """One search of the right protocol. slow: more than some seconds."""

    name: str
    bounds: Bounds
    slow: bool = False
    rules: Rules = field(default_factory=Rules)

    def run(self) -> Result:
        """Explore every interleaving."""
        return explore(Exchange(self.bounds, self.rules))

    def row(self, result: Result) -> str:
        """Return this search's line of the table in docs/exchange.md."""
        b = self.bounds
        lengths = ", ".join(map(str, b.lengths))
        tags = f"{b.first_tag} to {b.last_tag}" if b.last_tag else "never repeat"
        return (
            f"| {self.name} | {b.ranks} | {b.blocks} | {b.slots} | {lengths} | {tags} | "
            f"{b.grain} | {result.states} | {result.steps} | {result.depth} |"
        )


HEADER = (
    "| search | ranks | blocks | slots | tokens of a call | tags | one step | states | steps "
    "| depth |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)

SEARCHES = (
    Search("early launch and wrap", Bounds(last_tag=5, early=True, grain="access")),
    Search(
        "two blocks, all slots",
        Bounds(blocks=2, slots=2, lengths=(2,), last_tag=5, grain="access"),
    ),
    Search("wrap", Bounds(blocks=2, slots=2, lengths=(0, 1, 2), last_tag=9)),
    Search("pieces", Bounds(blocks=2, slots=2, lengths=(0, 1, 2, 3, 4, 5))),
    Search("three ranks and wrap", Bounds(ranks=3, last_tag=5)),
    Search(
        "three ranks, blocks",
        Bounds(ranks=3, blocks=2, slots=2, lengths=(0, 1, 2), grain="token"),
    ),
    Search("three blocks", Bounds(blocks=3, slots=3, lengths=(0, 1, 2, 3), grain="token")),
    Search(
        "three halves, pieces in one launch",
        Bounds(blocks=2, slots=2, lengths=(0, 1, 2, 3, 4, 5), grain="token"),
        rules=Rules(pieces_in_one_launch=True, halves=3, scrubs=False),
    ),
    Search("two blocks", Bounds(blocks=2, slots=2, lengths=(0, 1, 2), grain="access"), slow=True),
    Search("three ranks", Bounds(ranks=3, lengths=(1,), grain="access"), slow=True),
    Search(
        "three ranks, blocks and wrap",
        Bounds(ranks=3, blocks=2, slots=2, lengths=(0, 1, 2), last_tag=9, grain="token"),
        slow=True,
    ),
    Search(
        "three slots and wrap",
        Bounds(blocks=2, slots=3, lengths=(0, 1, 2, 3), last_tag=13, grain="token"),
        slow=True,
    ),
    Search(
        "three ranks, three blocks",
        Bounds(ranks=3, blocks=3, slots=3, lengths=(1, 3), grain="token"),
        slow=True,
    ),
    Search(
        "early launch, blocks",
        Bounds(blocks=2, slots=2, lengths=(0, 2), early=True, grain="access"),
        slow=True,
    ),
)
