"""The proof that the proof works: every plausible mistake is caught by a shape of the list."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sglang_minimax.validation.session import Session
from tests.engine.mistakes import MISTAKES, Mistake, caught_by, run


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Models and oracles of the list, made once for all mistakes."""
    return Session(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def caught(pytestconfig: pytest.Config) -> Iterator[list[str]]:
    """Which shape caught which mistake, printed at the end."""
    lines: list[str] = []
    yield lines
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        print("\n" + "\n".join(lines))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_planted_mistake_is_caught(session: Session, caught: list[str], mistake: Mistake) -> None:
    result = run(mistake, session)
    sentence = caught_by(mistake, result)
    assert sentence is not None, f"{mistake.plant.__doc__} Not caught: {result.shortcomings}"
    caught.append(f"{mistake.name} is caught by {mistake.topology}: {sentence[:120]}")


def test_each_shape_that_catches_passes_without_the_mistake() -> None:
    """Otherwise it would catch anything: test_validate.py runs each of them."""
    from sglang_minimax.validation.shapes import catalogue

    assert len(MISTAKES) == 28, "the README names the number"
    listed = {shape.name for shape in catalogue().shapes}
    assert {mistake.topology for mistake in MISTAKES} <= listed
