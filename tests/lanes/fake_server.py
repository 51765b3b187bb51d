"""Stands in for SGLang's launcher: the same command line, logs and doors, and no model.

What it does is named by FAKE_SERVER: `serve`, `die` while loading, `hang` at every question,
`refuse` every question, `vanish` at the first one. It has a child, as SGLang has ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BEHAVIOUR = os.environ.get("FAKE_SERVER", "serve")
INFO = {"model_path": "fake", "tool_call_parser": "minimax-m2"}


class Handler(BaseHTTPRequestHandler):
    """The doors that a suite knocks at before and while it asks."""

    def do_GET(self) -> None:
        models = {"data": [{"id": "fake", "max_model_len": 4096}]}
        self._answer(200, models if self.path.endswith("/models") else INFO)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        if BEHAVIOUR == "hang":
            time.sleep(600)
        if BEHAVIOUR == "vanish":
            os._exit(1)
        if BEHAVIOUR == "refuse":
            self._answer(400, {"message": "no", "error": {"message": "no"}})
            return
        message = {"role": "assistant", "content": "#### 1"}
        choice = {"index": 0, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        reply = {"usage": usage, "model": "fake", "id": "0", "created": 0}
        if not asked.get("stream"):
            self._answer(200, {**reply, "choices": [{**choice, "message": message}]})
            return
        chunk = {**reply, "choices": [{**choice, "delta": message}]}
        self._send(200, "text/event-stream", f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _answer(self, status: int, content: Any) -> None:
        self._send(status, "application/json", json.dumps(content))

    def _send(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """What `python -m sglang.launch_server` does, in a few words."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("[2026-01-01 00:00:00 TP0] Load weight begin.", flush=True)
    if BEHAVIOUR == "die":
        print("Traceback (most recent call last):", flush=True)
        print("sglang-minimax: model-00001.safetensors is incomplete; copy it again.", flush=True)
        os._exit(3)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    print("The server is fired up and ready to roll!", flush=True)
    server.serve_forever()


main()
