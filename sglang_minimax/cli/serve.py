"""`sglang-minimax serve`: SGLang's server with the bundled model, and a line to try it."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from sglang_minimax.cli.local_server import LocalServer

QUESTION = "What is 47 + 38?"


def serve(model: Path, host: str, port: int, arguments: Sequence[str]) -> int:
    """Run the server in the foreground until it ends or is told to stop; return its status."""
    console = Console(highlight=False, soft_wrap=True)
    server = LocalServer(
        model, host=host, port=port, arguments=["--log-level", "warning", *arguments]
    )
    signal.signal(signal.SIGTERM, _interrupt)
    console.print(f"[dim]{shlex.join(server.command)}[/]")
    try:
        with console.status("importing SGLang and starting the ranks"):
            server.start()
            server.wait_until_ready(timeout=None)
        console.print(f"\n[bold green]ready[/] {server.url}   (Ctrl-C stops it)\n")
        console.print(curl_line(server.url), markup=False)
        return server.wait()
    except KeyboardInterrupt:
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


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
