"""The push/poll exchange, in every interleaving: right as it is, and wrong after each mistake."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.protocol.exchange import (
    EVERY_CALL_ENDS,
    NEVER_TWO_AHEAD,
    NOTHING_LOST,
    RIGHT_WORD,
    Exchange,
)
from tests.protocol.explorer import Broken, Label, TooManyStates, explore
from tests.protocol.residency import Residency
from tests.protocol.rules import Bounds, Grain, Rules
from tests.protocol.searches import HEADER, SEARCHES, Search
from tests.protocol.trace import told
from tests.protocol.variants import MISTAKES, Mistake

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "exchange.md"
SOURCES = ROOT / "jit_kernels" / "qk_norm_rope" / "csrc"


def _searches(slow: bool) -> list[object]:
    marks = [pytest.mark.slow] if slow else []
    chosen = [search for search in SEARCHES if search.slow == slow]
    return [pytest.param(s, id=f"{s.name}-{s.bounds.grain}", marks=marks) for s in chosen]


@pytest.mark.parametrize("search", _searches(slow=False) + _searches(slow=True))
def test_protocol_keeps_its_promises(search: Search) -> None:
    result = search.run()
    assert result.counterexample is None, told(
        Exchange(search.bounds, search.rules), result.counterexample
    )
    assert search.row(result) in DOCUMENT.read_text(), (
        f"not in docs/exchange.md (python -m tests.protocol table): {search.row(result)}"
    )


def test_document_has_a_row_a_search() -> None:
    table = DOCUMENT.read_text().split(HEADER)[1].split("<!-- /searches -->")[0]
    assert len(table.strip().splitlines()) == len(SEARCHES)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_is_caught(mistake: Mistake) -> None:
    model = Exchange(mistake.bounds, mistake.rules)
    example = explore(model).counterexample
    assert example is not None, f"not noticed: {mistake.why_plausible}"
    trace = told(model, example)
    print(trace)
    assert example.broken.promise == mistake.breaks, trace
    assert trace.splitlines()[-1] == f"BROKEN: {mistake.breaks}: {example.broken.how}"


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_only_the_mistake_breaks_it(mistake: Mistake) -> None:
    rules = mistake.needs or Rules()
    assert explore(Exchange(mistake.bounds, rules)).counterexample is None


@pytest.mark.parametrize("grain", ["access", "word", "token"])
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_no_grain_hides_a_mistake(mistake: Mistake, grain: Grain) -> None:
    """What makes a search small may not make it blind."""
    if mistake.rules.sentinel and grain == "token":
        pytest.skip("this grain tells words apart by their tags")
    bounds = replace(mistake.bounds, grain=grain)
    assert explore(Exchange(bounds, mistake.rules)).counterexample is not None


def test_a_missing_wait_puts_a_rank_two_launches_ahead() -> None:
    bounds = Bounds(lengths=(1,), early=True)
    example = explore(Exchange(bounds, Rules(waits=False))).counterexample
    assert example is not None
    assert example.broken.promise == NEVER_TWO_AHEAD


def test_a_sentinel_works_until_a_sum_is_zero() -> None:
    bounds = Bounds(blocks=2, slots=2, lengths=(0, 1, 2))
    assert explore(Exchange(bounds, Rules(sentinel=True))).counterexample is None
    example = explore(Exchange(replace(bounds, zero_partials=True), Rules(sentinel=True)))
    assert example.counterexample is not None
    assert example.counterexample.broken.promise == EVERY_CALL_ENDS


def test_full_pieces_in_one_launch_need_no_third_half() -> None:
    """The last, shorter piece is what two halves cannot bear."""
    rules = Rules(pieces_in_one_launch=True, scrubs=False)
    bounds = Bounds(blocks=2, slots=2, lengths=(2, 4, 6), grain="token")
    assert explore(Exchange(bounds, rules)).counterexample is None
    ragged = replace(bounds, lengths=(2, 3))
    assert explore(Exchange(ragged, rules)).counterexample is not None
    assert explore(Exchange(ragged, replace(rules, halves=3))).counterexample is None
    assert explore(Exchange(ragged)).counterexample is None  # a launch a piece


@pytest.mark.parametrize(("slots", "enough", "too_few"), [(1, 5, 3), (2, 7, 5), (3, 11, 9)])
def test_the_scrub_needs_four_tags_a_slot(slots: int, enough: int, too_few: int) -> None:
    """A word must be cleared before its tag returns: 2**32 tags are enough for 2**30 slots.

    With last tag 4 * slots + 1 each slot has two turns in a round of tags; slot 0 is used by every
    call, so two tags fewer still do where there are other slots.
    """
    bounds = Bounds(slots=slots, lengths=tuple(range(1, slots + 1)), grain="token")
    assert explore(Exchange(replace(bounds, last_tag=enough))).counterexample is None
    example = explore(Exchange(replace(bounds, last_tag=too_few))).counterexample
    assert example is not None
    assert example.broken.promise == RIGHT_WORD


def test_trace_counts_launches_and_tags_from_the_start() -> None:
    mistake = next(m for m in MISTAKES if m.name == "no scrub")
    model = Exchange(mistake.bounds, mistake.rules)
    example = explore(model).counterexample
    assert example is not None
    lines = told(model, example).splitlines()
    assert lines[0] == "rank 0: launch 0 begins, tokens: 2"
    # The round of tags 2 to 9 is over with launch 7; the word of launch 0 passes for launch 8's.
    assert "launch 8: polls for rank 1's token 1, finds an old tag 2" in lines[-2]
    assert lines[-1].startswith(f"BROKEN: {RIGHT_WORD}")


CHIPS = {
    "a grid that does not fit": (Residency(2, 1, 4, 0, let_in_early=False), False),
    "a grid that fits": (Residency(2, 1, 2, 0, let_in_early=False), True),
    "two grids, each capped by the whole chip": (Residency(2, 2, 2, 0, let_in_early=False), False),
    "two grids, each capped by its share": (Residency(2, 2, 1, 0, let_in_early=False), True),
    "and dependents let in early": (Residency(2, 2, 1, 2, let_in_early=True), False),
    "and dependents let in after the last poll": (Residency(2, 2, 1, 2, let_in_early=False), True),
    "one channel, dependents let in early": (Residency(2, 1, 2, 2, let_in_early=True), True),
}


@pytest.mark.parametrize("name", CHIPS)
def test_polling_blocks_leave_room_for_their_partners(name: str) -> None:
    model, ends = CHIPS[name]
    example = explore(model).counterexample
    assert (example is None) == ends, example


class _Lossy:
    """0 -> 1 -> 2 (rest), and 1 -> 3 <-> 4, from where no way leads to rest."""

    def start(self) -> int:
        return 0

    def steps(self, state: int) -> Iterator[tuple[Label, int | Broken]]:
        for after in {0: [1], 1: [2, 3], 2: [], 3: [4], 4: [3]}[state]:
            yield ("to", after), after

    def at_rest(self, state: int) -> bool:
        return state == 2


def test_explorer_sees_that_rest_cannot_be_reached() -> None:
    result = explore(_Lossy())
    assert result.states == 5
    assert result.steps == 5
    assert result.counterexample is not None
    assert result.counterexample.broken.promise == "termination"
    assert result.counterexample.labels == (("to", 1), ("to", 3))


def test_explorer_gives_up_rather_than_pass() -> None:
    with pytest.raises(TooManyStates, match="100 states"):
        explore(Exchange(Bounds()), most_states=100)


def test_document_names_what_the_kernel_has() -> None:
    """The table of rules and code in docs/exchange.md, against the CUDA sources."""
    table = DOCUMENT.read_text().split("<!-- code -->")[1]
    sources = "".join(path.read_text() for path in sorted(SOURCES.glob("*.cuh")))
    names = set(re.findall(r"`(\w+)`", "".join(row.split("|")[3] for row in _rows(table))))
    assert names
    assert not {name for name in names if not re.search(rf"\b{name}\b", sources)}


def _rows(table: str) -> list[str]:
    return [line for line in table.splitlines() if line.startswith("|")][2:]


def test_every_promise_is_broken_by_some_mistake() -> None:
    assert {m.breaks for m in MISTAKES} == {EVERY_CALL_ENDS, NOTHING_LOST, RIGHT_WORD}
