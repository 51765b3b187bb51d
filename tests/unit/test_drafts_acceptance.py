"""When a low accepted length is spoken of: once, after enough steps, with both numbers."""

from __future__ import annotations

import random

import pytest

from sglang_minimax.drafts.acceptance import ENOUGH, RIGHT, Watch, expected_length


def test_says_both_numbers_once() -> None:
    watch = Watch(3)
    sentence = watch.heard(250, 275)
    assert sentence is not None
    # Ten requests of a batch are ten verifications.
    assert "is 1.10 tokens over 250 verifications (one for each request and step)" in sentence
    assert "below 1.62" in sentence
    assert sentence.endswith(".")
    assert watch.heard(500, 550) is None


@pytest.mark.parametrize(
    ("verified", "tokens"), [(ENOUGH - 1, ENOUGH - 1), (0, 0), (1000, 1625), (1000, 4000)]
)
def test_says_nothing_too_early_or_of_a_good_draft(verified: int, tokens: int) -> None:
    assert Watch(3).heard(verified, tokens) is None


def test_speaks_at_the_first_moment_that_it_may() -> None:
    assert Watch(3).heard(ENOUGH, ENOUGH) is not None
    assert Watch(3).heard(1000, 1623) is not None


def test_a_reset_of_the_totals_starts_over() -> None:
    watch = Watch(3)
    assert watch.heard(1000, 2000) is None
    assert watch.heard(40, 40) is None
    assert watch.heard(240, 240) is not None


def simulated(right: float, steps: int, seed: int) -> int:
    """Tokens of ENOUGH verified steps of a chain whose every token is right that often."""
    source = random.Random(seed)
    tokens = 0
    for _ in range(ENOUGH):
        tokens += 1
        for _ in range(steps):
            if source.random() >= right:
                break
            tokens += 1
    return tokens


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_enough_steps_tell_good_drafts_from_others(steps: int) -> None:
    """ENOUGH is chosen so: nobody with a draft as published is warned, everybody without is."""
    for seed in range(300):
        assert Watch(steps).heard(ENOUGH, simulated(0.57, steps, seed)) is None
        assert Watch(steps).heard(ENOUGH, simulated(0.2, steps, seed)) is not None


def test_expected_length_is_the_mean_of_a_chain() -> None:
    assert expected_length(0) == 1
    assert expected_length(5, 1.0) == 6
    mean = sum(simulated(RIGHT, 3, seed) for seed in range(200)) / (200 * ENOUGH)
    assert mean == pytest.approx(expected_length(3), abs=0.02)
