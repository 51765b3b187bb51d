"""What each suite is asked to do, checked before a request is sent. Pure: no evaluator, no network.

`identity()` holds the settings that decide the answers; a log is gone on with only where they are
the same. How fast and where from the questions are asked (`parallel`, `timeout`, `url`) is not
among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from sglang_minimax.accuracy import ARITHMETIC, TOOL_CALLS
from sglang_minimax.accuracy.errors import AccuracyError

Endpoint = Literal["chat", "completion"]
ENDPOINTS: tuple[Endpoint, ...] = ("chat", "completion")

#: Tokens that a reply may have where none are asked for and the server allows them.
TOKEN_BUDGET = 8192


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every suite that asks questions has in common.

    url: the server's base address, without `/v1`. model: the name to ask for, None for the first
    one that the server lists. limit: so many questions from the front, None for all. parallel:
    requests at a time. max_tokens: budget of a reply with its reasoning; None for 8192, or half
    of the server's context where that is less. temperature, top_p: of the sampling; None leaves
    top_p to the server. seed: of the choice of shots, and of the sampling. timeout: seconds for one
    request. retries: further tries of a request that failed. log: one JSON line a question, gone
    on with if it exists; None keeps none. api_key: sent, never written. progress: a bar on stderr.
    Raises AccuracyError for values that make no sense.
    """

    url: str = "http://127.0.0.1:30000"
    model: str | None = None
    limit: int | None = None
    parallel: int = 32
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0
    timeout: float = 600.0
    retries: int = 2
    log: Path | None = None
    api_key: str | None = field(default=None, repr=False)
    progress: bool = False

    _BESIDE_THE_POINT: ClassVar[frozenset[str]] = frozenset(
        {"url", "parallel", "timeout", "retries", "log", "api_key", "progress"}
    )

    def __post_init__(self) -> None:
        at_least = {"limit": 1, "parallel": 1, "max_tokens": 1, "retries": 0, "temperature": 0}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise AccuracyError(f"{name} is {value}; use {least} or more.")
        if self.timeout <= 0:
            raise AccuracyError(f"timeout is {self.timeout:g} s; use more than 0.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise AccuracyError(f"top_p is {self.top_p:g}; use more than 0 and up to 1.")
        check_url(self.url)

    def as_dict(self) -> dict[str, Any]:
        """All settings but the key, as JSON values."""
        return _plain({k: v for k, v in asdict(self).items() if k != "api_key"})

    def identity(self) -> dict[str, Any]:
        """The settings that decide the answers, as JSON values."""
        return {k: v for k, v in self.as_dict().items() if k not in self._BESIDE_THE_POINT}


@dataclass(frozen=True, kw_only=True)
class Gsm8kSettings(Settings):
    """A run of GSM8K.

    data: a folder with `test.jsonl` and `train.jsonl`, one file (then the shots come from
    `train.jsonl` beside it, or there can be none), `arithmetic` for the bundled set, or a hub name
    such as `openai/gsm8k`. endpoint: `chat` or `completion`. shots: worked examples before the
    question, in chat as turns of their own. prompt: a Jinja template of a row in place of the
    evaluator's `Question: {{question}}\\nAnswer:`. thinking: None leaves it to the server; False
    closes the reasoning before it begins, which only the chat endpoint of a MiniMax-M2 can.
    """

    data: str = str(ARITHMETIC)
    endpoint: Endpoint = "chat"
    shots: int = 5
    prompt: str | None = None
    thinking: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.endpoint not in ENDPOINTS:
            raise AccuracyError(f"there is no endpoint {self.endpoint!r}; use chat or completion.")
        if self.shots < 0:
            raise AccuracyError(f"shots is {self.shots}; use 0 or more.")
        if self.endpoint == "completion" and self.thinking is not None:
            raise AccuracyError(
                "the completion endpoint has no chat template, so there is no thinking to switch; "
                "leave thinking out, or use the chat endpoint."
            )


@dataclass(frozen=True, kw_only=True)
class ToolSettings(Settings):
    """A run of the tool-call suite: each case is asked whole and streamed.

    cases: a JSONL file of `{"messages", "tools", "expected": [{"name", "arguments"}]}`, and
    optionally `"answer"`, the text that the reply's content has to end in. calls_only: leave out
    the cases that have an `answer`, before `limit` counts: the bundled ones fit tiny-m2 alone.
    """

    cases: str = str(TOOL_CALLS)
    calls_only: bool = False


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """A run of SGLang's `sglang.benchmark.serving`, offline.

    prompts: requests in all. data: None for random token ids; else GSM8K-shaped data, a path or
    `arithmetic`, asked in the chat template, whose replies end where the model ends them: how much
    of its draft a model accepts shows there alone. input_tokens, output_tokens: of each request;
    with data, output_tokens is the most there may be. range_ratio: lengths of random prompts are
    drawn from [ratio * length, length]. rate: requests a second, None for all at once. parallel:
    requests at a time, None for no limit. tokenizer: folder or name, None for the one that the
    server names. limit_s: seconds for all of it. arguments: further ones, as on its command line.
    log: where its output goes; None keeps none.
    Raises AccuracyError for values that make no sense.
    """

    url: str = "http://127.0.0.1:30000"
    prompts: int = 100
    data: str | None = None
    input_tokens: int = 512
    output_tokens: int = 128
    range_ratio: float = 1.0
    rate: float | None = None
    parallel: int | None = None
    tokenizer: str | None = None
    seed: int = 0
    limit_s: float = 1800.0
    arguments: tuple[str, ...] = ()
    log: Path | None = None

    def __post_init__(self) -> None:
        at_least = {"prompts": 1, "input_tokens": 1, "output_tokens": 1, "parallel": 1}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise AccuracyError(f"{name} is {value}; use {least} or more.")
        for name in ("limit_s", "rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise AccuracyError(f"{name} is {value:g}; use more than 0.")
        if not 0 <= self.range_ratio <= 1:
            raise AccuracyError(f"range_ratio is {self.range_ratio:g}; use 0 to 1.")
        check_url(self.url)

    def as_dict(self) -> dict[str, Any]:
        """All settings as JSON values."""
        return _plain(asdict(self))


def check_url(url: str) -> None:
    """Raise AccuracyError for an address that is none."""
    if not url.startswith(("http://", "https://")):
        raise AccuracyError(f"the address {url!r} has to begin with http:// or https://.")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
        for k, v in values.items()
    }
