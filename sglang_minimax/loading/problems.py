"""What does not fit, collected, so that one refusal names all of it; ranks add theirs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sglang_minimax.errors import LoadError

LISTED = 10  # problems of one kind that a message spells out


@dataclass(slots=True)
class Problems:
    """What does not fit, by kind, in the order in which it was found.

    groups: kind -> one line for each tensor. sentences: what is wrong with the whole, each complete
    in itself, such as a file that cannot be read.
    """

    groups: dict[str, list[str]] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)

    def add(self, group: str, line: str) -> None:
        """Enter one: `missing`, `unexpected`, `duplicate`, `misshapen`, `invalid`, ...

        Also `contradictory` (to the quantisation config) and `quantised` (what must not be).
        """
        self.groups.setdefault(group, []).append(line)

    def say(self, sentence: str) -> None:
        """Enter what is wrong with the whole."""
        self.sentences.append(sentence)

    def take(self, other: Problems) -> None:
        """Enter all of another one's."""
        self.sentences += other.sentences
        for group, lines in other.groups.items():
            self.groups.setdefault(group, []).extend(lines)

    def __bool__(self) -> bool:
        return bool(self.groups or self.sentences)

    def error(self) -> LoadError:
        """The sentences, then one with the counts, and the first few of each group under it."""
        message = list(self.sentences)
        if self.groups:
            counts = ", ".join(f"{len(lines)} {group}" for group, lines in self.groups.items())
            message.append(
                f"the weights do not fit the model ({counts}); check that the checkpoint is "
                "complete and that config.json belongs to it."
            )
        for group, lines in self.groups.items():
            message += [f"  {group}: {line}" for line in lines[:LISTED]]
            if len(lines) > LISTED:
                message.append(f"  {group}: ... and {len(lines) - LISTED} more")
        return LoadError("\n".join(message))


def joined(found: Sequence[Problems]) -> Problems:
    """The problems of all ranks, each once; one that only some ranks have says which.

    found: one entry for each rank, in the order of ranks.
    """
    result = Problems()
    for line, ranks in _finders([problems.sentences for problems in found]).items():
        result.say(line + _by(ranks, len(found)))
    groups = dict.fromkeys(group for problems in found for group in problems.groups)
    for group in groups:
        lines = _finders([problems.groups.get(group, []) for problems in found])
        for line, ranks in lines.items():
            result.add(group, line + _by(ranks, len(found)))
    return result


def _finders(lists: Sequence[list[str]]) -> dict[str, list[int]]:
    """line -> the ranks that have it."""
    finders: dict[str, list[int]] = {}
    for rank, lines in enumerate(lists):
        for line in dict.fromkeys(lines):
            finders.setdefault(line, []).append(rank)
    return finders


def _by(ranks: list[int], size: int) -> str:
    if len(ranks) == size:
        return ""
    return f" [rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}]"
