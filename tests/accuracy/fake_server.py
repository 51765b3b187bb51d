"""A server of OpenAI's protocol that says what a test wants, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sglang_minimax import ARCHITECTURE

Body = dict[str, Any]


@dataclass(frozen=True)
class Said:
    """One answer. status 0 hangs up in place of an answer; other than 200 is an error.

    pieces: of the streamed form; what the whole one says without. breaks: the stream ends early.
    """

    text: str = ""
    reasoning: str = ""
    finish_reason: str = "stop"
    calls: tuple[tuple[str, str], ...] = ()
    status: int = 200
    pieces: tuple[Body, ...] | None = None
    breaks: bool = False

    def message(self) -> Body:
        """The message of a chat reply."""
        return {
            "role": "assistant",
            "content": self.text,
            "reasoning_content": self.reasoning or None,
            "tool_calls": [
                {"id": f"c{i}", "type": "function", "function": {"name": n, "arguments": a}}
                for i, (n, a) in enumerate(self.calls)
            ]
            or None,
        }

    def deltas(self) -> Iterator[Body]:
        """The same message letter by letter."""
        if self.pieces is not None:
            yield from self.pieces
            return
        yield from ({"reasoning_content": letter} for letter in self.reasoning)
        yield from ({"content": letter} for letter in self.text)
        for i, (name, arguments) in enumerate(self.calls):
            begin = {"name": name, "arguments": ""}
            yield {"tool_calls": [{"index": i, "id": f"c{i}", "function": begin}]}
            for letter in arguments:
                yield {"tool_calls": [{"index": i, "function": {"arguments": letter}}]}


class _Server(ThreadingHTTPServer):
    # Clients come by the dozen, and a busy machine accepts them late.
    request_queue_size = 128


@dataclass
class FakeServer:
    """Answers with `answer(body)`; `asked` holds the bodies of all questions. port 0 is any."""

    answer: Callable[[Body], Said]
    facts: Body = field(default_factory=lambda: dict(FACTS))
    asked: list[Body] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    port: int = 0

    def __post_init__(self) -> None:
        self._http = _Server(("127.0.0.1", self.port), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._http.shutdown()
        self._http.server_close()

    def questions(self) -> list[str]:
        """The last user message, or the prompt, of all that was asked."""
        return [question_of(body) for body in self.asked]


#: What the fake says of itself, as SGLang does.
FACTS: Body = {
    "model_path": "fake",
    "version": "0",
    "tp_size": 1,
    "architectures": [ARCHITECTURE],
    "reasoning_parser": "minimax",
    "tool_call_parser": "minimax-m2",
    "api_key": "a secret",
}


def question_of(body: Body) -> str:
    """What a body asks: the text of the prompt or last user message, without GSM8K's frame."""
    text = body.get("prompt") or [m["content"] for m in body["messages"] if m["role"] == "user"][-1]
    return str(text.rpartition("Question: ")[2].removesuffix("\nAnswer:"))


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self._send({"data": [{"id": "fake", "max_model_len": 4096}]})
            elif self.path in ("/server_info", "/model_info", "/health") and server.facts:
                self._send(server.facts)
            else:
                self._send({"error": "nothing here"}, 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(body)
            server.keys.append(self.headers.get("Authorization"))
            said = server.answer(body)
            if said.status == 0:
                self.close_connection = True
            elif said.status != 200:
                self._send({"error": {"message": "no luck"}}, said.status)
            elif body.get("stream"):
                self._stream(said)
            else:
                chat = self.path == "/v1/chat/completions"
                part = {"message": said.message()} if chat else {"text": said.text}
                self._send(
                    {
                        "id": "1",
                        "object": "chat.completion" if chat else "text_completion",
                        "created": 0,
                        "model": "fake",
                        "choices": [{"index": 0, "finish_reason": said.finish_reason, **part}],
                        "usage": USAGE,
                    }
                )

        def _send(self, answer: Body, status: int = 200) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _stream(self, said: Said) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            common = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "fake"}
            choices = [{"index": 0, "delta": delta} for delta in said.deltas()]
            choices.append({"index": 0, "delta": {}, "finish_reason": said.finish_reason})
            for choice in choices[: len(choices) // 2] if said.breaks else choices:
                self._event({**common, "choices": [choice]})
            if said.breaks:
                return
            self._event({**common, "choices": [], "usage": USAGE})
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, chunk: Body) -> None:
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    return Handler


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
