"""GSM8K against a server that says what it is told to, with lm-eval by itself as the oracle."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the evaluator is not installed: the extra `accuracy`")

from sglang_minimax.accuracy import ARITHMETIC, asking, endpoint, gsm8k, gsm8k_task, run_gsm8k
from sglang_minimax.accuracy.errors import AccuracyError, RequestsFailed
from sglang_minimax.accuracy.results import Result
from sglang_minimax.accuracy.settings import ENDPOINTS, Gsm8kSettings
from tests.accuracy import evaluator
from tests.accuracy.conftest import Serve
from tests.accuracy.fake_server import FACTS, Body, Said, question_of

ROWS = [json.loads(line) for line in (ARITHMETIC / "test.jsonl").open()][:14]
RIGHT = {row["question"]: row["answer"].rpartition("#### ")[2] for row in ROWS}
NUMBER = {row["question"]: i for i, row in enumerate(ROWS)}


def replies(n: str) -> list[Said]:
    """Replies to a question whose answer is n, as models write them, one for each row."""
    return [
        Said(f"{n}\n#### {n}"),
        Said(f"The answer is {n}."),  # flexible alone
        Said(f"#### {int(n) + 1}"),
        Said(f"#### 7\nNo, wait.\n#### {n}"),  # strict takes the first, flexible the last
        Said(f"#### {n}\nThat was step 1"),  # strict alone
        Said(f"${n}.00"),
        Said(f"#### {n}.", reasoning="no"),
        Said("I do not know.", reasoning=f"#### {n}"),  # a thought is no answer
        Said("", reasoning=f"so it is {n}", finish_reason="length"),
        Said(f"so far: {n}", finish_reason="length"),
        Said(f"1+1=2\n</think>\n\n#### {n}"),  # a server without a reasoning parser
        Said(f"{n} is it\n</think>\n\nno"),
        Said(f"#### {n}\nQuestion: 1+1?\nAnswer: #### 2"),  # goes on where it should have ended
        Said("", finish_reason="stop"),
    ]


def answer(body: Body) -> Said:
    """The reply of a question's row. A completion stops where the server is told to, a chat not."""
    question = question_of(body)
    said = replies(RIGHT[question])[NUMBER[question]]
    if "prompt" not in body:
        return said
    text = said.text.partition("Question:")[0] if "Question:" in body["stop"] else said.text
    return replace(said, text=text, reasoning="")


def shown_to_the_evaluator(prompt: str) -> str:
    """What lm-eval's filters have to see of that reply: no thought, nothing behind a stop."""
    body = {"messages": json.loads(prompt)} if prompt.startswith("[") else {"prompt": prompt}
    text = answer({**body, "stop": ["Question:"]}).text
    if "messages" in body:
        text = text.rpartition("</think>")[2].partition("Question:")[0]
    return text


def settings(server: Any, **changes: Any) -> Gsm8kSettings:
    """A run over those rows."""
    values = {"url": server.url, "limit": len(ROWS), "shots": 2, "retries": 0, "timeout": 20.0}
    return Gsm8kSettings(**{"prompt": None, **values, **changes})


@dataclass(frozen=True)
class Ran:
    """A run and its log."""

    result: Result
    entries: dict[str, dict[str, Any]]
    asked: list[Body]


def run(serve: Serve, log: Path, **changes: Any) -> Ran:
    """Run against a fresh server."""
    log.unlink(missing_ok=True)
    server = serve(answer)
    result = run_gsm8k(settings(server, log=log, **changes))
    lines = [json.loads(line) for line in log.read_text().splitlines()][1:]
    return Ran(result, {line["id"]: line for line in lines}, server.asked)


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


def test_a_limit_does_not_change_the_questions(serve: Serve, tmp_path: Path) -> None:
    whole = run(serve, tmp_path / "a")
    part = run(serve, tmp_path / "b", limit=3)
    assert {k: v["prompt"] for k, v in part.entries.items()} == {
        k: whole.entries[k]["prompt"] for k in "012"
    }


def test_what_is_sent_and_written(serve: Serve, tmp_path: Path) -> None:
    ran = run(serve, tmp_path / "log", temperature=0.7, top_p=0.9, seed=3, max_tokens=77)
    sent = {"temperature": 0.7, "top_p": 0.9, "seed": 3, "max_tokens": 77, "model": "fake"}
    assert all(sent.items() <= body.items() for body in ran.asked)
    # The server would stop inside of a thought too.
    assert not any(body.get("stop") for body in ran.asked)
    figures = ran.result.figures
    assert (figures["truncated"], figures["questions"]) == (2, 14)
    assert figures["truncated_share"] == pytest.approx(2 / 14)
    assert figures["truncated_matches"] == 1
    assert (figures["prompt_tokens"], figures["completion_tokens"]) == (42, 28)
    assert ran.result.server["tp_size"] == 1
    assert "secret" not in (tmp_path / "log").read_text() + json.dumps(ran.result.as_dict())
    entry = ran.entries["7"]
    assert (entry["reply"], entry["expected"]) == ("I do not know.", RIGHT[ROWS[7]["question"]])
    assert entry["reasoning"] == f"#### {entry['expected']}"
    assert entry["seconds"] >= 0


def test_the_key_is_sent_and_not_written(serve: Serve, tmp_path: Path) -> None:
    server, log = serve(answer), tmp_path / "log"
    result = run_gsm8k(settings(server, limit=2, api_key="k-123", log=log))
    assert set(server.keys) == {"Bearer k-123"}
    assert "k-123" not in log.read_text() + json.dumps(result.as_dict())


def test_the_budget(serve: Serve) -> None:
    server = serve(answer)
    run_gsm8k(settings(server, limit=1))
    assert server.asked[0]["max_tokens"] == 2048  # half of the context
    with pytest.raises(AccuracyError, match="4096 tokens for a reply leave none"):
        run_gsm8k(settings(server, max_tokens=4096))
    with pytest.raises(AccuracyError, match="serves fake and not another"):
        run_gsm8k(settings(server, model="another"))


# --- thinking ------------------------------------------------------------------------------


def test_thinking_off_closes_the_thought(serve: Serve) -> None:
    server = serve(lambda body: Said("#### 1"))
    run_gsm8k(settings(server, limit=1, thinking=False))
    (body,) = server.asked
    assert body["continue_final_message"] is True
    assert body["messages"][-1] == {"role": "assistant", "content": "\n</think>\n\n"}
    run_gsm8k(settings(server, limit=1))
    assert "continue_final_message" not in server.asked[1]


def test_thinking_off_that_is_not_is_an_error(serve: Serve) -> None:
    server = serve(lambda body: Said("#### 1", reasoning="hm"))
    with pytest.raises(AccuracyError, match="answers with reasoning nevertheless"):
        run_gsm8k(settings(server, limit=1, thinking=False))


@pytest.mark.parametrize("facts", [{}, FACTS | {"architectures": ["LlamaForCausalLM"]}])
def test_thinking_off_needs_a_minimax(serve: Serve, facts: Body) -> None:
    server = serve(answer, facts=facts)
    with pytest.raises(AccuracyError, match="closing the reasoning"):
        run_gsm8k(settings(server, thinking=False))
    assert run_gsm8k(settings(server, limit=1)).figures["questions"] == 1


# --- servers that fail ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "why"), [(500, "InternalServerError"), (0, "APIConnectionError")]
)
def test_failed_requests_are_counted_and_asked_again(
    serve: Serve, tmp_path: Path, status: int, why: str
) -> None:
    bad = {ROWS[2]["question"], ROWS[5]["question"]}
    broken = True

    def sometimes(body: Body) -> Said:
        return Said(status=status) if broken and question_of(body) in bad else answer(body)

    server, log = serve(sometimes), tmp_path / "log"
    with pytest.raises(RequestsFailed, match=f"2 of 14 requests failed .first: {why}") as caught:
        run_gsm8k(settings(server, log=log))
    assert (caught.value.failed, caught.value.asked) == (2, 14)
    assert str(log) in str(caught.value)
    broken = False
    before = len(server.asked)
    result = run_gsm8k(settings(server, log=log))
    assert set(server.questions()[before:]) == bad
    assert len(server.asked) == before + 2
    assert (result.figures["answered_before"], result.figures["questions"]) == (12, 14)
    assert result.scores == run(serve, tmp_path / "whole").result.scores


def test_a_reply_that_was_given_up_is_no_wrong_answer(serve: Serve) -> None:
    """SGLang ends a request that it cannot go on with so, with status 200."""
    server = serve(lambda body: Said("", finish_reason="abort"))
    with pytest.raises(RequestsFailed, match=r"2 of 2 .* a reply that ended with abort"):
        run_gsm8k(settings(server, limit=2))


def test_a_request_is_tried_again(serve: Serve) -> None:
    seen: list[Body] = []

    def second_time(body: Body) -> Said:
        seen.append(body)
        return Said(status=500) if len(seen) == 1 else answer(body)

    result = run_gsm8k(settings(serve(second_time), limit=1, retries=1))
    assert (result.figures["questions"], len(seen)) == (1, 2)


@pytest.mark.parametrize("parallel", [1, 4])
def test_so_many_at_a_time(serve: Serve, parallel: int) -> None:
    """As many as asked for do come together, and never one more."""
    lock, together = threading.Lock(), [0, 0]

    def slow(body: Body) -> Said:
        with lock:
            together[0] += 1
            together[1] = max(together)
        time.sleep(0.05)
        with lock:
            together[0] -= 1
        return answer(body)

    result = run_gsm8k(settings(serve(slow), parallel=parallel))
    assert result.figures["questions"] == len(ROWS)
    assert together == [0, parallel]


def test_a_server_that_is_gone_is_not_asked_on(serve: Serve, tmp_path: Path) -> None:
    server = serve(lambda body: Said(status=0))
    with pytest.raises(RequestsFailed, match="10 of 14 requests failed, and nothing more"):
        run_gsm8k(settings(server, parallel=1, log=tmp_path / "log"))
    assert len(server.asked) == asking.ENOUGH_FAILURES


def test_no_server() -> None:
    with pytest.raises(AccuracyError, match="no server of OpenAI's protocol answers at"):
        run_gsm8k(Gsm8kSettings(url="http://127.0.0.1:1"))


def test_a_server_of_something_else(serve: Serve) -> None:
    server = serve(answer)
    with pytest.raises(AccuracyError, match="answers with status 404"):
        run_gsm8k(Gsm8kSettings(url=f"{server.url}/elsewhere"))


# --- data ----------------------------------------------------------------------------------


def test_a_path_downloads_nothing(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    server = serve(answer)
    assert run_gsm8k(settings(server, data=str(ARITHMETIC))).figures["questions"] == 14
    with pytest.raises(AccuracyError, match=r"did not come from the hub \(AssertionError"):
        run_gsm8k(settings(server, data="openai/gsm8k"))


@pytest.mark.parametrize("columns", [("question", "answer"), ("prompt", "answer")])
def test_a_hub_name(serve: Serve, monkeypatch: pytest.MonkeyPatch, columns: Any) -> None:
    import datasets

    first, second = columns
    rows = [{first: row["question"], second: row["answer"]} for row in ROWS]
    split = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: {"test": split, "train": split})
    server = serve(answer)
    if first == "prompt":
        with pytest.raises(AccuracyError, match="openai/gsm8k"):
            run_gsm8k(settings(server, data="openai/gsm8k"))
    else:
        assert run_gsm8k(settings(server, data="openai/gsm8k")).figures["questions"] == 14


def test_without_the_evaluator(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gsm8k_task, "find_spec", lambda name: None)
    with pytest.raises(AccuracyError, match=r"pip install 'sglang-minimax\[accuracy\]'"):
        run_gsm8k(settings(serve(answer)))
