"""Processes in which SGLang never loads plugins: our model must be there as well."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from openai import OpenAI

from sglang_minimax import TINY_M2, __version__
from sglang_minimax.cli.local_server import LocalServer
from sglang_minimax.validation.random_checkpoint import write_random_checkpoint
from tests.engine.conftest import HUB_FORM
from tests.server.forced import reply

SERVES = f"sglang-minimax {__version__} serves MiniMaxM2ForCausalLM"
WRITE = {
    "type": "function",
    "function": {
        "name": "write",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}},
    },
}
CODE = 'if a < b:\n    return "}"\n'
TEXT = (
    "\n\nNow.\n<minimax:tool_call>\n"
    f'<invoke name="write">\n<parameter name="text">{CODE}</parameter>\n</invoke>\n'
    "</minimax:tool_call>"
)


def test_the_offline_benchmark(tmp_path: Path) -> None:
    """`sglang.benchmark.one_batch` builds its model runner by itself."""
    # It draws token ids up to 10000.
    write_random_checkpoint(tmp_path, {**HUB_FORM, "vocab_size": 10_240})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(TINY_M2 / name)
    sizes = ("--batch-size", "2", "--input-len", "16", "--output-len", "4")
    command = (sys.executable, "-m", "sglang.benchmark.one_batch", "--model-path", str(tmp_path))
    done = subprocess.run(
        [*command, *sizes, "--result-filename", str(tmp_path / "r.jsonl")],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert SERVES in done.stdout + done.stderr


def test_several_tokenizer_workers() -> None:
    """The HTTP workers are processes of their own; requests go through any of them."""
    with tempfile.TemporaryFile() as log:
        server = LocalServer(arguments=["--tokenizer-worker-num", "2"], log=log)
        with server.running():
            deadline = time.monotonic() + 120  # each imports SGLang first
            names: list[str] = []
            while time.monotonic() < deadline:  # a worker gets its name when it has started
                names = [process.name() for process in server.family()]
                if sum(name.startswith("sglang::tokenize") for name in names) == 2:
                    break
                time.sleep(0.2)
            assert sum(name.startswith("sglang::tokenize") for name in names) == 2, names
            for _ in range(4):
                _parses(server)
        log.seek(0)
        assert SERVES in log.read().decode()


def _parses(server: LocalServer) -> None:
    """One reply whole and one streamed, each by a connection of its own, which any worker takes."""
    for stream in (False, True):
        url = f"{server.url}/v1"
        with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            found = reply(client, TEXT, stream=stream, tools=[WRITE])
        # In-tree leaves the template's line breaks where they are.
        assert found["reasoning"]
        assert found["content"] == "Now."
        # It strips the value, and streams what is not JSON.
        calls = [(name, json.loads(given)) for name, given in found["calls"].values()]
        assert calls == [("write", {"text": CODE})]
