"""The judging of the accuracy matrix, and that its committed results are what the docs show."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from benchmarks import accuracy_plot, accuracy_table, readme
from benchmarks.accuracy_judging import differences, first_difference, is_within, verdict
from benchmarks.accuracy_matrix import BF16, EAGLE3, FP32, MISTAKE, PARTS, cells, falls_short
from benchmarks.common import RESULTS
from sglang_minimax.accuracy.results import Score
from sglang_minimax.validation.shapes import catalogue
from tests.engine.mistakes import MISTAKES

REFERENCES = [[5, 6, 7, 3], [5, 8, 3]]
TOLERANCE = 1e-3
COMMITTED = RESULTS / "accuracy_matrix.json"
TEXT = readme.ACCURACY.read_text()


def margin(question: int, step: int, one: int, other: int) -> float:
    """The second question's step 1 is a near tie of 8 and 9, and nothing else is."""
    return 1e-4 if (question, step, {one, other}) == (1, 1, {8, 9}) else 2.0


@pytest.mark.parametrize(
    ("found", "first"),
    [
        ([5, 6, 7, 3], None),
        ([5, 9, 7, 3], (1, 6, 9)),
        ([5, 6], (2, 7, None)),  # ended early
        ([5, 6, 7, 3, 3], (4, None, 3)),  # went on behind the end
        ([], (0, 5, None)),
    ],
)
def test_the_first_difference(found: list[int], first: tuple[int, ...] | None) -> None:
    assert first_difference(REFERENCES[0], found) == first


def test_equal_replies_are_ok() -> None:
    found = verdict(differences(REFERENCES, copy.deepcopy(REFERENCES), margin), TOLERANCE)
    assert found == {"status": "ok", "near_ties": [], "differences": []}


@pytest.mark.parametrize("wrong", [[5, 6, 9, 3], [5, 6, 7], [5, 6, 7, 3, 3]])
def test_a_reply_that_differs_is_reported(wrong: list[int]) -> None:
    """Another token that the oracle is sure about; an early end and a late one are no ties."""
    found = verdict(differences(REFERENCES, [wrong, REFERENCES[1]], margin), TOLERANCE)
    assert found["status"] == "differs"
    assert [each["question"] for each in found["differences"]] == [0]
    assert falls_short({"part": FP32, **found})


def test_a_near_tie_is_listed_and_passes() -> None:
    found = verdict(differences(REFERENCES, [REFERENCES[0], [5, 9, 7, 7]], margin), TOLERANCE)
    assert found["status"] == "ok"
    assert found["near_ties"] == [
        {"question": 1, "step": 1, "expected": 8, "found": 9, "margin": 1e-4}
    ]


def test_a_near_tie_excuses_no_other_reply() -> None:
    found = verdict(differences(REFERENCES, [[9, 6, 7, 3], [5, 9]], margin), TOLERANCE)
    assert (found["status"], len(found["near_ties"]), len(found["differences"])) == (
        "differs",
        1,
        1,
    )


def test_a_missing_reply_is_no_agreement() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        differences(REFERENCES, REFERENCES[:1], margin)


@pytest.mark.parametrize(
    ("right", "reference", "within"),
    [
        (40, 40, True),
        (37, 40, True),  # the interval of 40 of 40 begins at 91.2 %
        (36, 40, False),
        (30, 30, True),
        (38, 30, False),  # better than the reference by more than chance is another model too
    ],
)
def test_bf16_is_inside_of_the_references_interval(
    right: int, reference: int, within: bool
) -> None:
    asked = 30 if right == 30 else 40
    assert is_within(Score(right, asked), Score(reference, asked)) is within


def test_other_questions_are_not_compared() -> None:
    with pytest.raises(ValueError, match="40 questions beside 30"):
        is_within(Score(30, 40), Score(30, 30))


@pytest.mark.parametrize(
    ("part", "status", "short"),
    [
        (FP32, "ends", True),
        (EAGLE3, "differs", True),
        (BF16, "outside", True),
        (FP32, "ok", False),
        (FP32, "not run", False),
        (MISTAKE, "answers", False),
        (MISTAKE, "ends", False),
    ],
)
def test_what_makes_a_run_fail(part: str, status: str, short: bool) -> None:
    assert falls_short({"part": part, "status": status}) is short


def test_the_matrix_is_the_whole_list() -> None:
    listed = [shape.name for shape in catalogue().shapes]
    matrix = list(cells())
    for part in (FP32, EAGLE3, BF16):
        assert [cell.shape.name for cell in matrix if cell.part == part] == listed
    assert [cell.mistake for cell in matrix if cell.mistake] == list(MISTAKES)
    assert len({cell.id for cell in matrix}) == len(matrix)


def test_the_committed_results_are_the_whole_matrix_and_nothing_falls_short() -> None:
    data = json.loads(COMMITTED.read_text())
    assert [row["id"] for row in data["rows"]] == [cell.id for cell in cells()]
    assert {row["part"] for row in data["rows"]} == set(PARTS)
    assert [row["id"] for row in data["rows"] if falls_short(row)] == []
    for row in data["rows"]:
        if row["status"] == "not run":
            assert row["reason"]
        elif row["part"] in (FP32, EAGLE3):
            assert row["same_replies"] + len(row["near_ties"]) == row["asked"]


def test_the_docs_show_the_committed_results() -> None:
    assert readme.with_the_matrix(TEXT) == TEXT, "run `python -m benchmarks.readme`"
    stale = TEXT.replace("| `tp=1` |", "| `tp=9` |")
    assert stale != TEXT
    assert readme.with_the_matrix(stale) == TEXT


def test_a_shape_that_differs_shows_in_the_table() -> None:
    data = json.loads(COMMITTED.read_text())
    row = next(row for row in data["rows"] if row["id"] == "fp32 tp=2")
    row |= {"status": "differs", "right": 0, "asked": 20, "differences": [{}]}
    (line,) = (line for line in accuracy_table.shapes(data["rows"]) if line[0] == "`tp=2`")
    assert line[1] == "**1 of 20 replies differ**, 0.0 %"


def test_the_fall_is_against_the_right_model_in_the_same_shape() -> None:
    counts = {"asked": 40, "same_replies": 0, "mistake": None}
    rows = [
        {**counts, "part": FP32, "shape": "tp=1", "eagle3": False, "right": 39},
        {**counts, "part": FP32, "shape": "tp=2", "eagle3": False, "right": 20},
        {**counts, "part": EAGLE3, "shape": "tp=1", "eagle3": True, "right": 10},
    ]
    wrong = {"part": MISTAKE, "shape": "tp=1", "eagle3": False, "mistake": "x", "right": 9}
    found = {**counts, **wrong}
    assert accuracy_table.right_model(found, rows) is rows[0]
    assert accuracy_table.fall(found, rows[0]) == pytest.approx(75.0)
    assert accuracy_table.fall({"mistake": "x"}, rows[0]) is None


def test_the_plot_is_drawn_from_the_file(tmp_path: Path) -> None:
    copied = tmp_path / COMMITTED.name
    copied.write_bytes(COMMITTED.read_bytes())
    assert accuracy_plot.draw(copied).stat().st_size > 10_000
