"""Mistakes planted in the parsers, each of which a quick run of the checks must notice."""

from __future__ import annotations

import re

import pytest

from tests.parsers.mistakes_in_calls import IN_CALLS
from tests.parsers.mistakes_in_values import IN_VALUES
from tests.parsers.planting import planted

MISTAKES = (*IN_CALLS, *IN_VALUES)
CHECKS = {id(mistake.check): mistake for mistake in MISTAKES}


def test_each_mistake_has_a_name():
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda each: re.sub(r"\W+", "_", each.name))
def test_a_planted_mistake_is_noticed(mistake):
    with (
        planted(mistake.file, mistake.right, mistake.wrong) as parsers,
        pytest.raises((AssertionError, ValueError, OverflowError)),
    ):
        mistake.check(parsers)


@pytest.mark.parametrize(
    "mistake", CHECKS.values(), ids=lambda each: re.sub(r"\W+", "_", each.name)
)
def test_the_source_as_it_is_passes(mistake):
    with planted("", "", "") as parsers:
        mistake.check(parsers)
