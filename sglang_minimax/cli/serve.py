"""`sglang-minimax serve`: SGLang's server with the bundled model, and a line to try it."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from sglang_minimax.cli.local_server import LocalServer, ServerFailed

QUESTION = "What is 47 + 38?"


def serve(model: Path, host: str, port: int, arguments: Sequence[str]) -> int:
    """Run the server in the foreground until it ends or is told to stop; return its status.

    Raises ServerFailed where `model` is no checkpoint folder, or the server does not start.
    """
    if not (model / "config.json").is_file():
        raise ServerFailed(
            f"{model} holds no config.json; give --model the folder of a checkpoint."
        )
    console = Console(highlight=False, soft_wrap=True)
    server = LocalServer(
        model, host=host, port=port, arguments=["--log-level", "warning", *arguments]
    )
    told_to_stop = _noted_signals()
    console.print(f"[dim]{shlex.join(server.command)}[/]")
    try:
        with console.status("importing SGLang and starting the ranks"):
            server.start()
            ready = server.wait_until_ready(timeout=None, give_up=told_to_stop)
        if ready:
            console.print(f"\n[bold green]ready[/] {server.url}   (Ctrl-C stops it)\n")
            console.print(curl_line(server.url), markup=False)
            status = server.wait(give_up=told_to_stop)
            if status is not None:
                return status
        console.print("\nstopping")
        return 0
    finally:
        server.stop()


def curl_line(url: str) -> str:
    """A shell line that asks the server at `url` a question it can answer."""
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "temperature": 0})
    return (
        f"curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n  -d '{body}'"
    )


def _noted_signals() -> Callable[[], bool]:
    """Note SIGINT and SIGTERM from now on; the result says whether one has come.

    Not a KeyboardInterrupt, which ends whatever statement it meets: in the middle of `Popen` the
    child would be lost, in an `exec` of text, as in every dataclass that is imported, Python 3.11
    ends with the status of a killed process although the exception was caught.
    """
    noted: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda came, _frame: noted.append(came))
    return lambda: bool(noted)
