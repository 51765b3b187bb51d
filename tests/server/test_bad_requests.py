"""Requests that are wrong: a 4xx that says why, and a server that goes on serving."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from sglang_minimax.cli.local_server import LocalServer

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What is 47 + 38?"}]
CONTEXT = 4096
VOCABULARY = 896


@pytest.fixture(scope="module")
def http(server: LocalServer) -> Iterator[httpx.Client]:
    """Plain HTTP to the session's server; at the end of the module it is still healthy."""
    with httpx.Client(base_url=server.url, timeout=60) as http:
        before = {process.pid for process in server.family()}
        yield http
        assert http.get("/health").status_code == 200
        assert {process.pid for process in server.family()} == before


def chat(http: httpx.Client, **changes: Any) -> httpx.Response:
    """A sound chat request with some fields changed."""
    body = {"model": "m", "messages": QUESTION, "temperature": 0, "max_tokens": 4, **changes}
    return http.post(CHAT, json=body)


def assert_still_serving(http: httpx.Client) -> None:
    """The next sound request is answered."""
    answer = chat(http, max_tokens=2)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 2


def assert_refused(answer: httpx.Response, *words: str) -> None:
    """A 4xx whose message contains `words`."""
    assert 400 <= answer.status_code < 500, f"{answer.status_code} {answer.text[:300]}"
    message = answer.json()["message"]
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [',
        b"",
        b"what is 1 + 1?",
        b'{"model": "\xff"}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
    ],
    ids=["cut", "empty", "text", "not_utf8", "nan", "infinity"],
)
def test_malformed_json(body: bytes, http: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    assert_refused(http.post(CHAT, content=body, headers=headers))
    assert_still_serving(http)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="SGLang answers 500 to a JSON array")
def test_an_array_for_a_body(server: LocalServer, http: httpx.Client) -> None:
    # A connection of its own, because the server closes it after a 500.
    answer = httpx.post(f"{server.url}{CHAT}", json=[], timeout=60)
    assert_still_serving(http)
    assert_refused(answer)


TOOL: dict[str, Any] = {"name": "f", "parameters": {"type": "object"}}


def tool(**changes: Any) -> list[dict[str, Any]]:
    """A list of one tool with some fields changed."""
    return [{"type": "function", "function": {**TOOL, **changes}}]


CALL_WITHOUT_JSON = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{cut"}}],
}

#: name -> (changed fields, words of the message)
WRONG_FIELDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown_role": ({"messages": [{"role": "wizard", "content": "x"}]}, ("role",)),
    "content_is_a_number": ({"messages": [{"role": "user", "content": 5}]}, ("content",)),
    "content_is_missing": ({"messages": [{"role": "user"}]}, ("content",)),
    "messages_is_a_text": ({"messages": "hi"}, ("messages", "list")),
    "no_messages": ({"messages": []}, ("empty",)),
    "image": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "data:,"}}],
                }
            ]
        },
        ("text", "image_url"),
    ),
    "max_tokens_negative": ({"max_tokens": -1}, ("-1",)),
    "max_tokens_text": ({"max_tokens": "many"}, ("max_tokens", "many")),
    "temperature_negative": ({"temperature": -1}, ("temperature", "-1")),
    "temperature_text": ({"temperature": "hot"}, ("temperature", "hot")),
    "top_p_zero": ({"top_p": 0}, ("top_p",)),
    "top_p_above_one": ({"top_p": 2}, ("top_p", "2")),
    "frequency_penalty": ({"frequency_penalty": 9}, ("frequency_penalty", "9")),
    "no_choices": ({"n": 0}, ()),
    "n_is_a_text": ({"n": "x"}, ("'n'",)),
    "stop_is_a_number": ({"stop": 5}, ("stop",)),
    "stream_is_a_text": ({"stream": "perhaps"}, ("stream",)),
    "logit_bias_token": ({"logit_bias": {"999999": 1}}, ("logit_bias", "999999")),
    "logprobs_is_a_text": ({"logprobs": "perhaps"}, ("logprobs",)),
    "tools_is_a_text": ({"tools": "x"}, ("tools", "list")),
    "tool_without_name": ({"tools": [{"type": "function", "function": {}}]}, ("name",)),
    "schema_is_a_text": ({"tools": tool(parameters="x")}, ("Tool 0", "parameters")),
    "schema_is_a_list": ({"tools": tool(parameters=[1])}, ("Tool 0", "parameters")),
    "schema_type_unknown": ({"tools": tool(parameters={"type": "no"})}, ("Tool 0", "'no'")),
    "unknown_tool_chosen": (
        {"tools": tool(), "tool_choice": {"type": "function", "function": {"name": "g"}}},
        ("'g'",),
    ),
    "no_tool_to_choose": ({"tool_choice": "required"}, ("Tools", "required")),
    "call_without_json": (
        {
            "messages": [
                *QUESTION,
                CALL_WITHOUT_JSON,
                {"role": "tool", "tool_call_id": "a", "content": "1"},
            ]
        },
        ("arguments", "JSON"),
    ),
    "unknown_response_format": ({"response_format": {"type": "xml"}}, ("response_format",)),
    "grammar_that_is_none": ({"regex": "("}, ("regex",)),
}


@pytest.mark.parametrize("case", WRONG_FIELDS)
def test_a_wrong_field_is_named(case: str, http: httpx.Client) -> None:
    changes, words = WRONG_FIELDS[case]
    assert_refused(chat(http, **changes), *words)
    assert_still_serving(http)


def test_a_negative_number_of_choices(http: httpx.Client) -> None:
    assert_refused(chat(http, n=-1), "-1")
    assert_still_serving(http)


def test_a_negative_number_of_top_logprobs(http: httpx.Client) -> None:
    assert_refused(chat(http, logprobs=True, top_logprobs=-1), "-1", str(VOCABULARY))
    assert_still_serving(http)


def test_an_unknown_field_is_ignored(http: httpx.Client) -> None:
    """As the servers of others do: clients send extensions."""
    plain, extended = chat(http), chat(http, colour="blue")
    assert extended.status_code == 200
    assert extended.json()["choices"] == plain.json()["choices"]


# --- the context ---------------------------------------------------------------------------

LONG = "What is 1 + 1? " * 2000


def test_a_prompt_over_the_context(http: httpx.Client) -> None:
    answer = chat(http, messages=[{"role": "user", "content": LONG}])
    assert_refused(answer, "tokens", str(CONTEXT))
    assert_still_serving(http)


def test_a_completion_prompt_over_the_context(http: httpx.Client) -> None:
    body = {"model": "m", "prompt": LONG, "max_tokens": 1}
    assert_refused(http.post("/v1/completions", json=body), "tokens", str(CONTEXT))
    assert_still_serving(http)


def test_a_reply_that_would_not_fit(http: httpx.Client) -> None:
    assert_refused(chat(http, max_tokens=5000), "5000 tokens", str(CONTEXT))
    assert_still_serving(http)


def test_a_long_prompt_that_streams_is_refused_too(http: httpx.Client) -> None:
    """With streaming the status may be sent before the error is known."""
    answer = chat(http, messages=[{"role": "user", "content": LONG}], stream=True)
    assert str(CONTEXT) in answer.text
    assert 400 <= answer.status_code < 500 or '"error"' in answer.text
    assert_still_serving(http)


@pytest.mark.parametrize("prompt", ["", []], ids=["text", "ids"])
def test_an_empty_prompt(prompt: Any, http: httpx.Client) -> None:
    body = {"model": "m", "prompt": prompt, "max_tokens": 1}
    assert_refused(http.post("/v1/completions", json=body), "empty")
    assert_still_serving(http)


@pytest.mark.parametrize(("path", "status"), [("/nowhere", 404), (CHAT, 405)])
def test_an_address_that_is_not_served(path: str, status: int, http: httpx.Client) -> None:
    assert http.get(path).status_code == status


# --- numbers outside the vocabulary, which end SGLang's scheduler ----------------------------

LIMIT = {"max_new_tokens": 2}
STOPS = {"max_new_tokens": 2, "min_new_tokens": 1, "stop_token_ids": [10 * VOCABULARY]}

#: name -> (path, body, words of the message)
OUTSIDE: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "top_logprobs": (
        CHAT,
        {
            "messages": QUESTION,
            "logprobs": True,
            "top_logprobs": 10 * VOCABULARY,
            "max_tokens": 2,
            "temperature": 0,
        },
        ("8960", "896"),
    ),
    "logprobs": ("/v1/completions", {"prompt": "1", "logprobs": 897, "max_tokens": 2}, ("897",)),
    "token_above": ("/v1/completions", {"prompt": [5, 896], "max_tokens": 2}, ("896", "895")),
    "token_negative": ("/v1/completions", {"prompt": [-5], "max_tokens": 2}, ("-5", "895")),
    "token_of_a_batch": ("/v1/completions", {"prompt": [[5], [896]], "max_tokens": 2}, ("896",)),
    "generate_above": ("/generate", {"input_ids": [896], "sampling_params": LIMIT}, ("896",)),
    "generate_negative": ("/generate", {"input_ids": [7, -1], "sampling_params": LIMIT}, ("-1",)),
    "generate_top": (
        "/generate",
        {"text": "1", "return_logprob": True, "top_logprobs_num": 897, "sampling_params": LIMIT},
        ("897",),
    ),
    "stop_token": ("/generate", {"text": "1", "sampling_params": STOPS}, ("stop_token_ids",)),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_number_outside_the_vocabulary(case: str, http: httpx.Client) -> None:
    path, body, words = OUTSIDE[case]
    answer = http.post(path, json=body if path == "/generate" else {"model": "m", **body})
    assert answer.status_code == 400, answer.text[:300]
    assert all(word in answer.text for word in words), answer.text[:300]
    assert_still_serving(http)


def test_the_edges_of_the_vocabulary_are_served(http: httpx.Client) -> None:
    sampling = {"max_new_tokens": 2, "temperature": 0}
    body = {"input_ids": [0, VOCABULARY - 1], "sampling_params": sampling}
    top = {"return_logprob": True, "top_logprobs_num": VOCABULARY}
    answer = http.post("/generate", json={**body, **top})
    assert answer.status_code == 200, answer.text[:300]
    assert len(answer.json()["meta_info"]["output_top_logprobs"][0]) == VOCABULARY
