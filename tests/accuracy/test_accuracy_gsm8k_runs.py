"""What a run of GSM8K asks, writes and refuses, against a server that says what it is told to."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the evaluator is not installed: the extra `accuracy`")

from sglang_minimax.accuracy import ARITHMETIC, asking, gsm8k_task, run_gsm8k
from sglang_minimax.accuracy.errors import AccuracyError, RequestsFailed
from sglang_minimax.accuracy.settings import Gsm8kSettings
from tests.accuracy.conftest import Serve
from tests.accuracy.fake_server import FACTS, Body, Said, question_of
from tests.accuracy.gsm8k_replies import RIGHT, ROWS, answer, run, settings


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


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sockets reach this machine alone; the hosts that were looked up or asked all the same."""
    tried: list[str] = []

    def looked_up(host: Any, *arguments: Any, **options: Any) -> Any:
        return refuse(host) or resolve(host, *arguments, **options)

    def connect(name: str) -> Any:
        original = getattr(socket.socket, name)
        # An address that is no tuple is a file's.
        return lambda self, address: (
            refuse(address[0] if isinstance(address, tuple) else None) or original(self, address)
        )

    def refuse(host: Any) -> None:
        if host not in (None, "localhost", "127.0.0.1", "::1"):
            tried.append(str(host))
            raise OSError(f"asked {host}")

    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, connect(name))
    return tried


def test_a_path_downloads_nothing(serve: Serve, no_network: list[str]) -> None:
    server = serve(answer)
    assert run_gsm8k(settings(server, data=str(ARITHMETIC))).figures["questions"] == 14
    assert no_network == []


def test_a_hub_name_without_the_hub(
    serve: Serve, no_network: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the fixture above sees what goes out."""
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", ask_the_hub)
    with pytest.raises(AccuracyError, match=r"did not come from the hub \(OSError: asked"):
        run_gsm8k(settings(serve(answer), data="openai/gsm8k"))
    assert no_network == ["huggingface.co"]


def ask_the_hub(**_: Any) -> None:
    """Without the hub's own client, which tries again for long."""
    socket.create_connection(("huggingface.co", 443))


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
