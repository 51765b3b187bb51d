"""`sglang-minimax inspect DRAFT --target MODEL` says what a launch would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_minimax import TINY_M2, TINY_M2_EAGLE3
from sglang_minimax.cli import inspect_draft
from sglang_minimax.cli.main import app
from sglang_minimax.drafts import judgement
from sglang_minimax.legality import Sizes
from tests.drafts import draft_config, draft_in, layers


def inspect(draft: Path, *more: str, target: Path = TINY_M2) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["inspect", str(draft), "--target", str(target), *more])
    return found.exit_code, found.output


def test_the_bundled_draft_fits() -> None:
    code, text = inspect(TINY_M2_EAGLE3)
    assert code == 0, text
    for words in ("[0, 1, 3] of the model's 4", "256 of the model's 896", "The draft fits"):
        assert words in text
    assert text.count("592e4ad68c666821") == 2


def test_a_draft_without_its_model_says_what_to_add() -> None:
    found = CliRunner().invoke(app, ["inspect", str(TINY_M2_EAGLE3)])
    assert found.exit_code == 1
    assert "it is a draft" in found.output
    assert "--target" in found.output


def test_what_speaks_against_a_draft_is_printed(tmp_path: Path) -> None:
    draft = draft_in(tmp_path, draft_config(**layers(0, 1, 1)))
    code, text = inspect(draft)
    assert code == 1
    assert "names layer 1 twice" in text
    code, text = inspect(draft, "--json")
    assert code == 1
    found = json.loads(text)
    assert found["fits"] is False
    assert "names layer 1 twice" in found["refusals"][0]


def test_a_doubt_is_printed_too(tmp_path: Path) -> None:
    other = {"sglang_minimax": {"target_fingerprint": "0123456789abcdef"}}
    code, text = inspect(draft_in(tmp_path, draft_config(**other)), "--json")
    assert code == 1
    assert "0123456789abcdef" in json.loads(text)["doubts"][0]


def test_ranks_are_those_of_an_attention_group(tmp_path: Path) -> None:
    assert inspect(TINY_M2_EAGLE3, "--tp", "32")[0] == 1
    assert inspect(TINY_M2_EAGLE3, "--tp", "32", "--dp", "2")[0] == 0
    assert inspect(TINY_M2_EAGLE3, "--topology", "tp=32,dp=2")[0] == 0
    sizes = Sizes(tp=32, attention_cp=2)
    assert inspect_draft.inspect(TINY_M2_EAGLE3, TINY_M2, sizes, None, as_json=True) == 0


def test_a_model_whose_weights_are_elsewhere_is_judged(tmp_path: Path) -> None:
    """By its config.json; only the fingerprint cannot be compared."""
    shutil.copy(TINY_M2 / "config.json", tmp_path)
    code, text = inspect(TINY_M2_EAGLE3, target=tmp_path)
    assert code == 0, text
    assert "not known, its weights are not there" in text
    code, text = inspect(TINY_M2_EAGLE3, "--json", target=tmp_path)
    assert json.loads(text)["fingerprint"] is None


def test_the_fingerprint_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = judgement.fingerprint
    monkeypatch.setattr(
        judgement, "fingerprint", lambda folder: calls.append(folder) or original(folder)
    )
    assert inspect(TINY_M2_EAGLE3)[0] == 0
    assert calls == [TINY_M2]


def test_a_folder_without_a_model_is_one_sentence(tmp_path: Path) -> None:
    code, text = inspect(TINY_M2_EAGLE3, target=tmp_path)
    assert code == 1
    assert "has no config.json" in text
