"""A live server: what it says of itself, and one question at a time through `openai`'s client."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, NoReturn

import httpx

from sglang_minimax import ARCHITECTURE
from sglang_minimax.accuracy.errors import AccuracyError
from sglang_minimax.accuracy.proxies import is_loopback
from sglang_minimax.accuracy.settings import TOKEN_BUDGET, Settings
from sglang_minimax.parsers.markup import THINK_CLOSE, THINK_OPEN

#: What of SGLang's `/server_info` says which model was asked, on how many ranks, by which way. Its
#: launch command is not among them: it may hold a key.
SERVER_FACTS = (
    *("version", "model_path", "served_model_name", "weight_version", "dtype", "quantization"),
    *("tp_size", "attn_dp_size", "dp_size", "ep_size", "pp_size", "nnodes", "device"),
    *("attention_backend", "moe_runner_backend", "moe_a2a_backend", "kv_cache_dtype"),
    *("speculative_algorithm", "speculative_draft_model_path", "speculative_num_steps"),
    *("speculative_eagle_topk", "speculative_num_draft_tokens"),
    *("reasoning_parser", "tool_call_parser"),
)
#: Seconds that a server may take to say what it is.
LOOK = 30.0

#: What closes the reasoning that MiniMax-M2's chat template has opened.
NO_THOUGHT = f"\n{THINK_CLOSE}\n\n"


@dataclass(frozen=True)
class Server:
    """A server that answers. model: the name to ask for. context: tokens of prompt and reply.

    facts: those of SERVER_FACTS that it tells. is_minimax: whether it serves MiniMax-M2, None where
    it does not say.
    """

    url: str
    model: str
    context: int | None
    facts: dict[str, Any] = field(default_factory=dict)
    is_minimax: bool | None = None

    def budget(self, wanted: int | None) -> int:
        """Tokens for a reply. Raises AccuracyError for more than the context holds."""
        if wanted is None:
            return min(TOKEN_BUDGET, self.context // 2) if self.context else TOKEN_BUDGET
        if self.context is not None and wanted >= self.context:
            raise AccuracyError(
                f"{wanted} tokens for a reply leave none for the question: the server's context "
                f"has {self.context}; use fewer."
            )
        return wanted


def look(settings: Settings) -> Server:
    """Ask a server what it is. Raises AccuracyError where nothing that fits answers."""
    url = settings.url.rstrip("/").removesuffix("/v1")
    key = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    trust_env = not is_loopback(url)
    with httpx.Client(base_url=url, headers=key, timeout=LOOK, trust_env=trust_env) as client:
        models = _json(client, "/v1/models", required=True)
        listed = [each for each in models.get("data", []) if isinstance(each, dict)]
        if not listed:
            raise AccuracyError(f"{url} lists no model; is it a server of OpenAI's protocol?")
        names = [str(each.get("id")) for each in listed]
        if settings.model is not None and settings.model not in names:
            raise AccuracyError(f"{url} serves {', '.join(names)} and not {settings.model}.")
        model = settings.model or names[0]
        facts = _json(client, "/server_info") | _json(client, "/model_info")
    architectures = facts.get("architectures")
    return Server(
        url=url,
        model=model,
        context=listed[names.index(model)].get("max_model_len"),
        facts={name: facts[name] for name in SERVER_FACTS if facts.get(name) is not None},
        is_minimax=ARCHITECTURE in architectures if architectures else None,
    )


def _json(client: httpx.Client, path: str, required: bool = False) -> dict[str, Any]:
    """What a GET answers; {} for anything else than an object, unless it is required."""
    try:
        response = client.get(path)
        found = response.json() if response.status_code == 200 else None
    except (httpx.HTTPError, ValueError) as error:
        if required:
            _unreachable(str(client.base_url), type(error).__name__)
        return {}
    if isinstance(found, dict):
        return found
    if required:
        _unreachable(str(client.base_url), f"{path} answers with status {response.status_code}")
    return {}


def _unreachable(url: str, why: str) -> NoReturn:
    raise AccuracyError(
        f"no server of OpenAI's protocol answers at {url} ({why}); start one, or give its --url."
    )


@dataclass(frozen=True)
class Reply:
    """One reply. text: without its reasoning. seconds: from the request to its last byte."""

    text: str
    reasoning: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    calls: list[dict[str, str]] = field(default_factory=list)

    @property
    def is_truncated(self) -> bool:
        """Whether the budget or the context ended it."""
        return self.finish_reason == "length"


class Asker:
    """Asks one server with one set of settings. Threads may share it.

    Each question raises openai.OpenAIError where there is no reply to judge.
    """

    def __init__(self, server: Server, settings: Settings) -> None:
        from openai import DefaultHttpxClient, OpenAI

        self._client = OpenAI(
            base_url=f"{server.url}/v1",
            api_key=settings.api_key or "none",
            max_retries=settings.retries,
            timeout=settings.timeout,
            http_client=DefaultHttpxClient(trust_env=not is_loopback(server.url)),
        )
        self._options: dict[str, Any] = {
            "model": server.model,
            "temperature": settings.temperature,
            "max_tokens": server.budget(settings.max_tokens),
            "seed": settings.seed,
        }
        if settings.top_p is not None:
            self._options["top_p"] = settings.top_p

    def complete(self, prompt: str, stop: list[str]) -> Reply:
        """Go on with a text, through `/v1/completions`; the text is the reply, thoughts and all."""
        begin = time.monotonic()
        answer = self._client.completions.create(prompt=prompt, stop=stop or None, **self._options)
        choice = _choice(answer)
        return Reply(
            choice.text or "", "", choice.finish_reason, *_tokens(answer), time.monotonic() - begin
        )

    def chat(
        self,
        messages: list[dict[str, Any]],
        *,
        thinking: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> Reply:
        """Answer messages, through `/v1/chat/completions`.

        thinking: False closes the reasoning before it begins.
        """
        begin = time.monotonic()
        answer = self._client.chat.completions.create(
            **self._chat_options(messages, thinking, tools)
        )
        choice = _choice(answer)
        text, reasoning = apart(
            choice.message.content or "", getattr(choice.message, "reasoning_content", None) or ""
        )
        calls = [
            {"name": call.function.name or "", "arguments": call.function.arguments or ""}
            for call in choice.message.tool_calls or ()
        ]
        seconds = time.monotonic() - begin
        return Reply(text, reasoning, choice.finish_reason, *_tokens(answer), seconds, calls)

    def streamed_chat(
        self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None
    ) -> Reply:
        """As `chat`, with the pieces of a stream joined."""
        from sglang_minimax.accuracy.pieces import Pieces

        begin = time.monotonic()
        stream = self._client.chat.completions.create(
            **self._chat_options(messages, None, tools),
            stream=True,
            stream_options={"include_usage": True},
        )
        pieces = Pieces()
        try:
            for chunk in stream:
                pieces.add(chunk)
        except httpx.HTTPError as error:  # the client does not make these its own in a stream
            raise _no_answer(f"half a stream ({type(error).__name__})") from error
        _check_end(pieces.finish_reason)
        text, reasoning = apart(pieces.text, pieces.reasoning)
        seconds = time.monotonic() - begin
        return Reply(
            text, reasoning, pieces.finish_reason, *_tokens(pieces), seconds, pieces.calls()
        )

    def _chat_options(
        self,
        messages: list[dict[str, Any]],
        thinking: bool | None,
        tools: list[dict[str, Any]] | None,
    ) -> dict[str, Any]:
        options = {**self._options, "messages": messages}
        if tools:
            options["tools"] = tools
        if thinking is False:
            options["messages"] = [*messages, {"role": "assistant", "content": NO_THOUGHT}]
            options["extra_body"] = {"continue_final_message": True}
        return options


def _choice(answer: Any) -> Any:
    """The one choice of an answer. Raises openai.OpenAIError where there is none to judge."""
    choices = getattr(answer, "choices", None)
    if not choices:
        raise _no_answer("an answer without a choice")
    _check_end(choices[0].finish_reason)
    return choices[0]


def _check_end(finish_reason: str | None) -> None:
    """A reply that the server gave up says nothing of the model: it is no wrong answer."""
    if finish_reason in (None, "abort"):
        raise _no_answer(f"a reply that ended with {finish_reason or 'no reason'}")


def _no_answer(what: str) -> Exception:
    from openai import OpenAIError

    return OpenAIError(f"the server sent {what}")


def _tokens(answer: Any) -> tuple[int, int]:
    """(prompt, completion) tokens, 0 where the server does not count."""
    usage = answer.usage
    return (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)


def apart(content: str, reasoning: str) -> tuple[str, str]:
    """(text, reasoning) of a reply, also from a server without a reasoning parser.

    A number in a thought is not an answer. Content without a closing tag is taken as it is: that a
    thought was cut off inside of it shows in its finish reason alone.

    >>> apart("2+2=4\\n</think>\\n\\n#### 4", "")
    ('#### 4', '2+2=4')
    """
    if THINK_CLOSE not in content:
        return content, reasoning
    thought, _, text = content.partition(THINK_CLOSE)
    thought = thought.strip().removeprefix(THINK_OPEN).strip()
    return text.lstrip("\n"), "\n".join(filter(None, (reasoning, thought)))


def check_thinking(server: Server, thinking: bool | None) -> None:
    """Raise AccuracyError where thinking is to be off and nobody knows how."""
    if thinking is False and not server.is_minimax:
        what = "does not say what it serves" if server.is_minimax is None else "serves another"
        raise AccuracyError(
            "thinking is switched off by closing the reasoning that MiniMax-M2's chat template "
            f"opens, and the server at {server.url} {what}; run with the server's default."
        )
