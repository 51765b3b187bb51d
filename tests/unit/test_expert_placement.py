"""What --init-expert-location may be, and the sentence for what it may not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sglang_minimax.expert_placement import refusals


def answers(text: str) -> list[str]:
    return list(refusals(text, layers=2, experts=4, redundant=1))


def placed(*rows: list[object]) -> str:
    return json.dumps({"physical_to_logical_map": list(rows)})


GOOD = [0, 1, 2, 3, 0]


@pytest.mark.parametrize(
    "text",
    [
        "trivial",
        "counts.pt",
        placed(GOOD, [3, 2, 1, 0, 3]),
        json.dumps({"logical_count": [[1, 2, 3, 4], [0, 0.5, 0, 9]]}),
        json.dumps({"logical_count": [[[1, 2, 3, 4], [0, 0, 0, 9]]] * 3}),
    ],
)
def test_placements(text: str) -> None:
    assert answers(text) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{not json", "not JSON"),
        ("[]", "neither physical_to_logical_map nor logical_count"),
        ("{}", "neither physical_to_logical_map nor logical_count"),
        (placed(GOOD), "each of the 2 layers"),
        (json.dumps({"physical_to_logical_map": 7}), "each of the 2 layers"),
        (placed(GOOD, [0, 1, 2, 3]), "layer 1 4 slots, but 4 experts with .* 1 have 5"),
        (placed(GOOD, [0, 1, 2, 4, 3]), "expert 4 into layer 1, which has 0 to 3"),
        (placed(GOOD, [0, 1, 2, -1, 3]), "expert -1 into layer 1"),
        (placed(GOOD, [0, 1, 2, 1.5, 3]), "expert 1.5 into layer 1"),
        (placed(GOOD, [0, 1, 2, True, 3]), "expert True into layer 1"),
        (placed(GOOD, [0, 1, 1, 3, 0]), "expert 2 of layer 1 without a slot"),
        (json.dumps({"logical_count": [[1, 2, 3, 4]]}), "2 layers of 4 token counts"),
        (json.dumps({"logical_count": [[1, 2], [3, 4]]}), "2 layers of 4 token counts"),
        (json.dumps({"logical_count": [[1, 2, 3, -4]] * 2}), "no number of tokens"),
        (json.dumps({"logical_count": []}), "2 layers of 4 token counts"),
        (json.dumps({"logical_count": "many"}), "table of layers and experts"),
    ],
)
def test_what_is_no_placement(text: str, words: str) -> None:
    (sentence,) = answers(text)
    assert sentence.startswith("--init-expert-location ")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert re.search(words, sentence), sentence


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "placement.json"
    (sentence,) = answers(str(file))
    assert "cannot be read (No such file or directory)" in sentence
    file.write_text(placed(GOOD, GOOD))
    assert answers(str(file)) == []
