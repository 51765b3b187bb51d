"""The benchmark of serving: what it is asked, what is read, and how it may end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sglang_minimax.accuracy import gsm8k_data, run_bench_serving, serving
from sglang_minimax.accuracy.errors import AccuracyError, RequestsFailed
from sglang_minimax.accuracy.settings import ServingSettings
from sglang_minimax.cli.local_server import LocalServer
from tests.accuracy.conftest import Serve
from tests.accuracy.fake_server import Said

FOUND = dict.fromkeys(serving.FIGURES, 1.5) | {"completed": 3, "accept_length": None}


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A factory: a module in place of SGLang's that runs `code` with `output` as its file."""

    def put(code: str) -> None:
        (tmp_path / "pretended.py").write_text(
            "import json, os, sys, time\n"
            "output = sys.argv[sys.argv.index('--output-file') + 1]\n" + code
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(serving, "MODULE", "pretended")

    return put


def settings(serve: Serve, **changes: Any) -> ServingSettings:
    """Three requests of a fake server."""
    return ServingSettings(**{"url": serve(lambda body: Said()).url, "prompts": 3, **changes})


def test_the_figures_are_read(serve: Serve, benchmark: Any, tmp_path: Path) -> None:
    benchmark(f"open(output, 'a').write({json.dumps(FOUND)!r} + chr(10)); print('said')")
    log = tmp_path / "new" / "log"
    result = run_bench_serving(settings(serve, log=log))
    assert result.figures == FOUND
    assert "accept_length" not in result.metrics
    assert result.metrics["p99_itl_ms"] == 1.5
    assert result.server["tp_size"] == 1
    assert log.read_text() == "said\n"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print('why it failed'); sys.exit(3)", r"ended with status 3 \(why it failed\)"),
        ("sys.exit(3)", "it said nothing"),
        ("pass", "wrote no figures"),
        ("open(output, 'w').write('not JSON')", "wrote no figures"),
        ("open(output, 'w').write('[1]')", "wrote no figures"),
    ],
)
def test_a_benchmark_that_fails(serve: Serve, benchmark: Any, code: str, words: str) -> None:
    benchmark(code)
    with pytest.raises(AccuracyError, match=words):
        run_bench_serving(settings(serve))


def test_failed_requests_are_no_result(serve: Serve, benchmark: Any, tmp_path: Path) -> None:
    """SGLang's figures leave them out and are the better for it."""
    benchmark(f"open(output, 'w').write({json.dumps(FOUND | {'completed': 2})!r})")
    with pytest.raises(RequestsFailed, match="1 of 3 requests") as caught:
        run_bench_serving(settings(serve, log=tmp_path / "log"))
    assert (caught.value.failed, caught.value.asked) == (1, 3)
    assert str(tmp_path / "log") in str(caught.value)


def test_one_that_hangs_is_ended_with_what_it_started(
    serve: Serve, benchmark: Any, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    benchmark(
        "import subprocess\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(600)"
    )
    begin = time.monotonic()
    with pytest.raises(AccuracyError, match="took more than 5 s and was stopped"):
        run_bench_serving(settings(serve, limit_s=5.0))
    assert time.monotonic() - begin < 60
    assert until(lambda: is_gone(int(child.read_text())), seconds=10)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, if nobody has asked for its status yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until(holds: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether something comes true in time."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def test_one_whose_parent_is_killed_ends_too(serve: Serve, benchmark: Any, tmp_path: Path) -> None:
    child = tmp_path / "child"
    benchmark(f"open({str(child)!r}, 'w').write(f'{{os.getpid()}}.'); time.sleep(600)")
    code = (
        "from sglang_minimax.accuracy import run_bench_serving, serving, settings\n"
        "serving.MODULE = 'pretended'\n"
        f"run_bench_serving(settings.ServingSettings(url={settings(serve).url!r}, prompts=3))"
    )
    # Killed, it cannot remove its temporary folder.
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as parent:
        assert until(lambda: child.exists() and child.read_text().endswith("."))
        parent.kill()
    pid = int(child.read_text()[:-1])
    assert until(lambda: is_gone(pid), seconds=10)


def test_nothing_is_started_without_a_server(benchmark: Any, tmp_path: Path) -> None:
    benchmark(f"open({str(tmp_path / 'began')!r}, 'w')")
    with pytest.raises(AccuracyError, match="no server of OpenAI's protocol"):
        run_bench_serving(ServingSettings(url="http://127.0.0.1:1"))
    assert not (tmp_path / "began").exists()


def test_questions_in_the_form_of_the_benchmark(
    serve: Serve, benchmark: Any, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    benchmark(
        "path = sys.argv[sys.argv.index('--dataset-path') + 1]\n"
        f"os.link(path, {str(kept)!r})\n"
        f"open(output, 'w').write({json.dumps(FOUND | {'completed': 210})!r})"
    )
    run_bench_serving(settings(serve, data="arithmetic", prompts=210))
    rows = gsm8k_data.load("arithmetic", shots=0)
    assert rows is not None
    asked = [json.loads(line)["conversations"][0]["content"] for line in kept.open()]
    assert asked == [row["question"] for row in [*rows["test"], *rows["test"][:10]]]


@pytest.mark.slow
@pytest.mark.server
def test_sglangs_own(server: LocalServer, tmp_path: Path) -> None:
    """The real one; each run imports SGLang, hence slow."""
    common = {"url": server.url, "prompts": 6, "parallel": 3, "log": tmp_path / "log"}
    result = run_bench_serving(ServingSettings(**common, input_tokens=40, output_tokens=8))
    figures = result.figures
    assert (figures["completed"], figures["total_input_tokens"]) == (6, 240)
    assert figures["total_output_tokens"] == 48
    assert figures["accept_length"] is None
    assert all(figures[name] > 0 for name in serving.FIGURES if name != "accept_length")  # type: ignore[operator]
    # Replies end where the model ends them, well before the most there may be.
    result = run_bench_serving(ServingSettings(**common, data="arithmetic", output_tokens=500))
    assert 0 < result.figures["total_output_tokens"] < 6 * 150  # type: ignore[operator]


def test_the_command_line() -> None:
    command = serving.arguments(
        ServingSettings(rate=2.0, parallel=4, tokenizer="t", arguments=("--warmup-requests", "2")),
        "http://[::1]:3",
        "m",
        Path("out"),
        None,
    )
    assert command[:3] == [sys.executable, "-m", "sglang.benchmark.serving"]
    assert command[-2:] == ["--warmup-requests", "2"]
    assert os.path.basename(command[0]).startswith("python")
