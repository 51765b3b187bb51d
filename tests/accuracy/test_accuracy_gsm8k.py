"""GSM8K's prompts and verdicts, with lm-eval by itself as the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the evaluator is not installed: the extra `accuracy`")

from sglang_minimax.accuracy import ARITHMETIC, endpoint, gsm8k, gsm8k_task
from sglang_minimax.accuracy.settings import ENDPOINTS
from tests.accuracy import evaluator
from tests.accuracy.conftest import Serve
from tests.accuracy.fake_server import question_of
from tests.accuracy.gsm8k_replies import ROWS, Ran, replies, run, shown_to_the_evaluator


def prompt_of(ran: Ran, number: str) -> Any:
    """What the server was asked for a question, as lm-eval writes it."""
    question = ROWS[int(number)]["question"]
    (body,) = [each for each in ran.asked if question_of(each) == question]
    return body["prompt"] if "prompt" in body else json.dumps(body["messages"])


def faults(ran: Ran, oracle: dict[str, evaluator.Judged]) -> list[str]:
    """Where a run is not what lm-eval makes of the same replies, or counts a cut-off one."""
    found = []
    for number, judged in oracle.items():
        entry = ran.entries[number]
        cut = replies("0")[int(number)].finish_reason == "length"
        if prompt_of(ran, number) != judged.prompt:
            found.append(f"{number}: prompt")
        if entry["extracted"] != judged.extracted:
            found.append(f"{number}: extracted {entry['extracted']} not {judged.extracted}")
        if entry["right"] != {name: right and not cut for name, right in judged.right.items()}:
            found.append(f"{number}: right {entry['right']}")
    for name, score in ran.result.scores.items():
        if score.right != sum(entry["right"][name] for entry in ran.entries.values()):
            found.append(f"{name}: {score.right}")
    return found


@pytest.fixture(scope="module")
def oracle() -> dict[str, dict[str, evaluator.Judged]]:
    """lm-eval's own verdicts, by endpoint."""
    with pytest.MonkeyPatch.context() as patch:
        return {
            door: evaluator.judge(
                ARITHMETIC,
                shown_to_the_evaluator,
                shots=2,
                chat=door == "chat",
                limit=len(ROWS),
                seed=5,
                monkeypatch=patch,
            )
            for door in ENDPOINTS
        }


@pytest.mark.parametrize("door", ENDPOINTS)
def test_as_the_evaluator_does(door: str, oracle: Any, serve: Serve, tmp_path: Path) -> None:
    ran = run(serve, tmp_path / "log", endpoint=door, seed=5)
    assert faults(ran, oracle[door]) == []
    # Not all of a kind, or agreement would say little.
    assert {tuple(each["right"].values()) for each in ran.entries.values()} == {
        *((True, True), (True, False), (False, True), (False, False))
    }


Mistake = Callable[[pytest.MonkeyPatch], None]
MISTAKES: dict[str, Mistake] = {}


def mistake(act: Mistake) -> Mistake:
    """Plant this one too."""
    MISTAKES[act.__name__] = act
    return act


@mistake
def strict_takes_the_first_number(patch: pytest.MonkeyPatch) -> None:
    ours = gsm8k_task.Gsm8kTask.judge

    def judge(self: Any, question: Any, reply: str) -> Any:
        import re

        first = re.findall(r"-?\d+", reply)[:1]
        return ours(self, question, f"#### {first[0]}" if first else reply)

    patch.setattr(gsm8k_task.Gsm8kTask, "judge", judge)


@mistake
def cut_off_replies_count(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(endpoint.Reply, "is_truncated", False)


@mistake
def an_empty_answer_is_looked_for_in_the_thought(patch: pytest.MonkeyPatch) -> None:
    ours = endpoint.apart

    def apart(content: str, thought: str) -> tuple[str, str]:
        text, thought = ours(content, thought)
        return text or thought, thought

    patch.setattr(endpoint, "apart", apart)


@mistake
def thoughts_are_left_in_the_answer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(endpoint, "apart", lambda text, thought: (f"{thought}\n{text}", thought))


@mistake
def a_chat_reply_goes_on_behind_its_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gsm8k, "cut_at_stop", lambda text, stop: text)


@mistake
def shots_of_another_seed(patch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.task import ConfigurableTask

    patch.setattr(ConfigurableTask, "set_fewshot_seed", lambda self, seed: self.sampler.set_rnd(0))


@mistake
def one_shot_less(patch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.task import ConfigurableTask

    ours = ConfigurableTask.fewshot_context
    patch.setattr(
        ConfigurableTask,
        "fewshot_context",
        lambda self, document, num_fewshot, **k: ours(
            self, document, num_fewshot=num_fewshot - 1, **k
        ),
    )


#: Those that only a chat can show: a completion has no thought apart, and the server ends it.
OF_CHAT = {
    "an_empty_answer_is_looked_for_in_the_thought",
    "thoughts_are_left_in_the_answer",
    "a_chat_reply_goes_on_behind_its_end",
}
PLANTED = [
    (door, name) for name in MISTAKES for door in ENDPOINTS if door == "chat" or name not in OF_CHAT
]


@pytest.mark.parametrize(("door", "name"), PLANTED)
def test_a_planted_mistake_shows(
    door: str,
    name: str,
    oracle: Any,
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    MISTAKES[name](monkeypatch)
    assert faults(run(serve, tmp_path / "log", endpoint=door, seed=5), oracle[door])
