"""The command: what it prints, how it ends, and what it imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_minimax.accuracy import ARITHMETIC
from sglang_minimax.cli.main import app
from tests.accuracy.conftest import Serve
from tests.accuracy.fake_server import Said

needs_evaluator = pytest.mark.skipif(
    find_spec("lm_eval") is None,
    reason="the evaluator is not installed: the extra `accuracy`",
)
PAGE = Path(__file__).parents[2] / "docs" / "accuracy.md"
ASKED = ["accuracy", "gsm8k", "--data", "arithmetic", "--limit", "4", "--shots", "0"]


@needs_evaluator
def test_a_run(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in (ARITHMETIC / "test.jsonl").open()][:4]
    number = rows[0]["answer"].rpartition("#### ")[2]
    server = serve(lambda body: Said(f"#### {number}"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "k-123")
    ended = CliRunner().invoke(app, [*ASKED, "--url", server.url, "--json", "r.json"])
    assert ended.exit_code == 0, ended.output
    line = next(line for line in ended.stdout.splitlines() if "strict-match" in line)
    assert line.split() == ["strict-match", "1", "4", "25.0%", "4.6%-69.9%"]
    assert re.search(r"truncated +0 of 4 \(0\.0%\)", ended.stdout)
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["scores"]["strict-match"]["right"] == 1
    (log,) = tmp_path.glob("gsm8k-*.jsonl")
    assert log.name in ended.stdout
    assert set(server.keys) == {"Bearer k-123"}
    assert all("k-123" not in each.read_text() for each in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--url", "http://127.0.0.1:1"], "no server of OpenAI's protocol answers"),
        (["--shots", "-1"], "shots is -1; use 0 or more"),
        (["--endpoint", "completion", "--no-thinking"], "no thinking to switch"),
    ],
)
def test_one_sentence_and_status_1(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, [*ASKED, *arguments])
    assert ended.exit_code == 1
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert words in ended.stderr
    assert list(tmp_path.iterdir()) == []


@needs_evaluator
def test_failed_requests_are_status_1(serve: Serve, tmp_path: Path) -> None:
    server, log = serve(lambda body: Said(status=500)), tmp_path / "log"
    more = ["--url", server.url, "--retries", "0", "--log", str(log)]
    ended = CliRunner().invoke(app, [*ASKED, *more])
    assert ended.exit_code == 1
    assert "4 of 4 requests failed" in ended.stderr


def test_wrong_data_are_status_1(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text('{"messages": []}\n')
    ended = CliRunner().invoke(app, ["accuracy", "tools", "--cases", str(path)])
    assert (ended.exit_code, "line 1 of" in ended.stderr) == (1, True)


def test_the_data_have_to_be_named() -> None:
    """So that nobody downloads anything by a command without arguments."""
    assert CliRunner().invoke(app, ["accuracy", "gsm8k"]).exit_code == 2


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "import sglang_minimax.accuracy.settings, sglang_minimax.accuracy.tool_cases\n"
        "from typer.testing import CliRunner\n"
        "from sglang_minimax.cli.main import app\n"
        "ended = CliRunner().invoke(app, ['accuracy', 'gsm8k', '--help'])\n"
        "assert ended.exit_code == 0, ended.output\n"
        "heavy = {'lm_eval', 'datasets', 'openai', 'httpx', 'torch', 'sglang', 'jsonschema'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout == "[]\n", found.stderr


def test_the_page_names_options_that_there_are() -> None:
    from typer.main import get_command

    suites = get_command(app).commands["accuracy"].commands  # type: ignore[attr-defined]
    there = {
        option
        for command in suites.values()
        for parameter in command.params
        if parameter.param_type_name == "option"
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    named = set(re.findall(r"--[a-z0-9][a-z0-9-]*", PAGE.read_text()))
    others = {"--dry-run", "--served-model-name"}  # of pip, of SGLang
    assert named - others <= there
    assert {"--data", "--no-thinking", "--cases"} <= named
    assert there - named <= {"--model", "--timeout", "--api-key", "--help"}
