"""Parts of the weight updates on stand-ins: when a call is too early, and what stages hold back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_minimax.errors import LoadError
from sglang_minimax.patches import pipeline, weight_updates


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("idle", [False, True])
def test_a_cache_that_could_not_be_flushed_is_found_before_writing(flush: bool, idle: bool) -> None:
    manager = SimpleNamespace(
        scheduler=SimpleNamespace(_engine_paused=False), is_fully_idle=lambda ignore_waiting: idle
    )
    request = SimpleNamespace(flush_cache=flush)
    if flush and not idle:
        with pytest.raises(LoadError, match="flush_cache=false"):
            weight_updates._check_idle(manager, request)
    else:
        weight_updates._check_idle(manager, request)


class Stage:
    """The first of two pipeline stages."""

    def __init__(self) -> None:
        self.idle, self.pp_outputs, self._engine_paused = True, None, False
        self._deferred_input_requests: list[Any] = []
        self.answered: list[Any] = []

    def is_fully_idle(self, ignore_waiting: bool) -> bool:
        return self.idle

    def send_control_output(self, output: Any, request: Any) -> None:
        self.answered.append((output, request))

    def round(self, *new: Any) -> list[Any]:
        """What is processed in a round in which `new` arrives."""
        requests = [*self._deferred_input_requests, *new]
        self._deferred_input_requests = []
        pipeline._hold_back_until_dry(self, requests)
        return requests


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    group = SimpleNamespace(world_size=1, cpu_group=None)
    monkeypatch.setattr(
        pipeline, "get_parallel", lambda: SimpleNamespace(pp_size=2, tp_group=group)
    )
    return Stage()


def update() -> Any:
    return pipeline.UpdateWeightFromDiskReqInput(model_path="x")


def test_an_update_waits_until_the_stages_are_dry_and_what_follows_waits_too(stage: Stage) -> None:
    request = update()
    stage.idle = False
    assert stage.round("before", request, "after") == ["before"]
    assert stage.round("later") == []
    stage.idle, stage.pp_outputs = True, object()
    assert stage.round() == []
    stage.pp_outputs = None
    # As many quiet rounds as there are stages, and one more.
    assert [stage.round() for _ in range(2)] == [[], []]
    assert stage.round() == [request, "after", "later"]
    assert stage.answered == []


def test_after_quiet_rounds_an_update_goes_at_once(stage: Stage) -> None:
    for _ in range(3):
        stage.round()
    request = update()
    assert stage.round(request) == [request]


def test_an_update_that_waits_too_long_is_answered(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "PATIENCE", -1.0)
    stage.idle = False
    request = update()
    assert stage.round(request, "after") == []
    ((answer, about),) = stage.answered
    assert about is request
    assert not answer.success
    assert "Nothing was changed" in answer.message
    assert stage.round() == ["after"]
