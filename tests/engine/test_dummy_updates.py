"""An engine that was started with dummy weights and gets its first ones from disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from sglang_minimax import TINY_M2
from sglang_minimax.validation.engine_process import EngineProcess
from tests.engine.updating import Updated, prepare


def test_a_failed_first_read_is_answered_and_can_be_repeated(tmp_path: Path) -> None:
    """There are no old weights to go back to, and no reason to end the scheduler."""
    folder = tmp_path / "flaky"
    shutil.copytree(TINY_M2, folder)
    (folder / "breaks_on_rank_0").touch()
    arguments = {"dtype": "float32", "skip_tokenizer_init": True, "load_format": "dummy"}
    with EngineProcess(model_path=str(TINY_M2), before=prepare, **arguments) as engine:
        updated = Updated(engine, {})
        success, message = updated.disk(TINY_M2)
        assert not success
        assert "load_format 'dummy'" in message
        success, message = updated.disk(folder, "auto")
        assert not success
        assert "Input/output error" in message
        assert "no checkpoint to go back to" in message
        success, message = updated.disk(folder, "auto")
        assert success, message
        held = updated.holds()
        success, message = updated.disk(TINY_M2, "auto")
        assert success, message
        assert updated.holds() == held
