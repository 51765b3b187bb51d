"""Serving speed by SGLang's own `sglang.benchmark.serving`, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from sglang_minimax.accuracy import gsm8k_data
from sglang_minimax.accuracy.endpoint import look
from sglang_minimax.accuracy.errors import AccuracyError, RequestsFailed
from sglang_minimax.accuracy.proxies import without_proxy
from sglang_minimax.accuracy.results import Result
from sglang_minimax.accuracy.settings import ServingSettings, Settings
from sglang_minimax.children import Child

SUITE = "bench_serving"
MODULE = "sglang.benchmark.serving"

#: The figures that are kept, by SGLang's names: requests/s, tokens/s, ms, tokens a step.
FIGURES = (
    *("completed", "duration", "request_throughput", "input_throughput", "output_throughput"),
    *("total_throughput", "total_input_tokens", "total_output_tokens", "concurrency"),
    *("median_e2e_latency_ms", "p99_e2e_latency_ms", "median_ttft_ms", "p99_ttft_ms"),
    *("median_tpot_ms", "p99_tpot_ms", "median_itl_ms", "p99_itl_ms", "accept_length"),
)


def run(settings: ServingSettings) -> Result:
    """Run the benchmark and read its figures; see `sglang_minimax.accuracy.run_bench_serving`.

    Raises AccuracyError where the server is not reached, where the benchmark ends with an error or
    takes longer than `limit_s`, and RequestsFailed where requests failed.
    """
    server = look(Settings(url=settings.url))
    date = datetime.now(UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as folder:
        output = Path(folder) / "output.jsonl"
        questions = _questions(settings, Path(folder) / "questions.jsonl")
        command = arguments(settings, server.url, server.model, output, questions)
        with _log(settings.log) as log:
            _run(command, server.url, log, settings.limit_s)
        found = _read(output)
    completed = int(found.get("completed") or 0)
    if completed < settings.prompts:
        raise RequestsFailed(
            f"{settings.prompts - completed} of {settings.prompts} requests of {MODULE} failed"
            f"{_see(settings.log)}.",
            settings.prompts - completed,
            settings.prompts,
        )
    return Result(
        suite=SUITE,
        settings=settings.as_dict(),
        date=date,
        server={"url": server.url, **server.facts},
        figures={name: found.get(name) for name in FIGURES},
    )


def arguments(
    settings: ServingSettings, url: str, model: str, output: Path, questions: Path | None
) -> list[str]:
    """The benchmark's command line."""
    asked = [
        *("--backend", "sglang", "--base-url", url),
        *("--model", settings.tokenizer or model, "--served-model-name", model),
        *("--num-prompts", str(settings.prompts), "--seed", str(settings.seed)),
        *("--output-file", str(output), "--disable-tqdm"),
    ]
    if settings.tokenizer is not None:
        asked += ["--tokenizer", settings.tokenizer]
    if settings.rate is not None:
        asked += ["--request-rate", str(settings.rate)]
    if settings.parallel is not None:
        asked += ["--max-concurrency", str(settings.parallel)]
    if questions is None:
        asked += [
            *("--dataset-name", "random-ids", "--tokenize-prompt"),
            *("--random-input-len", str(settings.input_tokens)),
            *("--random-output-len", str(settings.output_tokens)),
            *("--random-range-ratio", str(settings.range_ratio)),
        ]
    else:
        asked += [
            *("--dataset-name", "custom", "--dataset-path", str(questions)),
            *("--sharegpt-output-len", str(settings.output_tokens)),
            *("--apply-chat-template", "--disable-ignore-eos"),
        ]
    return [sys.executable, "-m", MODULE, *asked, *settings.arguments]


def _questions(settings: ServingSettings, path: Path) -> Path | None:
    """A file in SGLang's custom form with as many questions as prompts, None for random ids."""
    if settings.data is None:
        return None
    splits = gsm8k_data.load(settings.data, shots=0)
    if splits is None:
        raise AccuracyError(f"{settings.data} is no path; give one to GSM8K-shaped data.")
    rows = splits["test"]
    with path.open("w", encoding="utf-8") as file:
        for number in range(settings.prompts):
            row = rows[number % len(rows)]
            turns = [{"content": row["question"]}, {"content": row["answer"]}]
            file.write(json.dumps({"conversations": turns}) + "\n")
    return path


@contextlib.contextmanager
def _log(path: Path | None) -> Iterator[IO[bytes]]:
    if path is None:
        with tempfile.TemporaryFile() as file:
            yield file
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w+b")
    except OSError as error:
        raise AccuracyError(f"the log {path} cannot be written: {error.strerror}.") from error
    with file:
        yield file


def _run(command: list[str], url: str, log: IO[bytes], limit_s: float) -> None:
    """Run to the end. Raises AccuracyError for an error or too long a time; nothing is left."""
    # What it needs lies on this machine or comes from the server: nothing is downloaded.
    environment = {"HF_HUB_OFFLINE": "1", **without_proxy(url)}
    status = Child(command, environment, log).run(limit_s)
    if status is None:
        raise AccuracyError(
            f"{MODULE} took more than {limit_s:g} s and was stopped; ask for less or set limit_s."
        )
    if status:
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
        said = lines[-1][:300] if lines else "it said nothing"
        raise AccuracyError(f"{MODULE} ended with status {status} ({said}).")


def _read(output: Path) -> Mapping[str, Any]:
    """The last line of the benchmark's file."""
    try:
        found = json.loads(output.read_text(encoding="utf-8").strip().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        raise AccuracyError(f"{MODULE} wrote no figures.") from None
    if not isinstance(found, dict):
        raise AccuracyError(f"{MODULE} wrote no figures.")
    return found


def _see(log: Path | None) -> str:
    return f"; see {log}" if log else ""
