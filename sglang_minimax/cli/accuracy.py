"""`sglang-minimax accuracy`: how often a live server is right."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sglang_minimax.cli.exits import stop_on_user_error

if TYPE_CHECKING:
    from sglang_minimax.accuracy.results import Result

app = typer.Typer(
    no_args_is_help=True,
    help="Ask a live server questions whose answers are known, and count.",
)

#: What a shell expects of a command that Ctrl-C ended.
INTERRUPTED = 130

Url = Annotated[str, typer.Option(help="The server's address.")]
Model = Annotated[str | None, typer.Option(help="Model to ask for; the server's first without.")]
Limit = Annotated[int | None, typer.Option(help="Ask so many from the front.")]
Parallel = Annotated[int, typer.Option(help="Requests at a time.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(help="Tokens of a reply with its reasoning; 8192 without, or half the context."),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float | None, typer.Option(help="The server's without.")]
Timeout = Annotated[float, typer.Option(help="Seconds for one request.")]
Retries = Annotated[int, typer.Option(help="Further tries of a request that failed.")]
Log = Annotated[
    Path | None,
    typer.Option(help="One JSON line a question; a run that was stopped goes on from it."),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result here.")]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="Sent, never written."),
]


class Endpoint(StrEnum):
    """The doors of a server."""

    chat = "chat"
    completion = "completion"


@app.command()
def gsm8k(
    data: Annotated[
        str,
        typer.Option(
            help="JSONL file, folder with test.jsonl and train.jsonl, `arithmetic` for the bundled "
            "set, or a hub name such as openai/gsm8k."
        ),
    ],
    url: Url = "http://127.0.0.1:30000",
    endpoint: Annotated[Endpoint, typer.Option(help="Which door.")] = Endpoint.chat,
    shots: Annotated[int, typer.Option(help="Worked examples before each question.")] = 5,
    prompt: Annotated[
        str | None,
        typer.Option(help="Jinja template of a row, in place of the evaluator's prompt."),
    ] = None,
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="Let it reason, or close the reasoning before it begins; the server's without.",
        ),
    ] = None,
    model: Model = None,
    limit: Limit = None,
    parallel: Parallel = 32,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    seed: Annotated[int, typer.Option(help="Of the choice of shots and of the sampling.")] = 0,
    timeout: Timeout = 600.0,
    retries: Retries = 2,
    log: Log = None,
    json_file: Json = None,
    api_key: ApiKey = None,
) -> None:
    """Grade-school questions, judged by lm-eval's own GSM8K task; exit 1 if it cannot be run."""

    def ask(log: Path) -> Result:
        from sglang_minimax.accuracy import run_gsm8k
        from sglang_minimax.accuracy.settings import Gsm8kSettings

        return run_gsm8k(
            Gsm8kSettings(
                url=url,
                data=data,
                endpoint=endpoint.value,
                shots=shots,
                prompt=prompt,
                thinking=thinking,
                model=model,
                limit=limit,
                parallel=parallel,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                timeout=timeout,
                retries=retries,
                log=log,
                api_key=api_key,
                progress=True,
            )
        )

    stop_on_user_error(lambda: _run("gsm8k", ask, log, json_file))


@app.command()
def tools(
    url: Url = "http://127.0.0.1:30000",
    cases: Annotated[
        Path | None, typer.Option(help="JSONL file of cases; the bundled ones without.")
    ] = None,
    calls_only: Annotated[
        bool,
        typer.Option(
            "--calls-only",
            help="Leave out cases with an `answer`; for other models than tiny-m2.",
        ),
    ] = False,
    model: Model = None,
    limit: Limit = None,
    parallel: Parallel = 32,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    timeout: Timeout = 600.0,
    retries: Retries = 2,
    log: Log = None,
    json_file: Json = None,
    api_key: ApiKey = None,
) -> None:
    """Tool calls, whole and streamed, against what should be called; exit 1 if it cannot be run."""

    def ask(log: Path) -> Result:
        from sglang_minimax.accuracy import TOOL_CALLS, run_tools
        from sglang_minimax.accuracy.settings import ToolSettings

        return run_tools(
            ToolSettings(
                url=url,
                cases=str(cases or TOOL_CALLS),
                calls_only=calls_only,
                model=model,
                limit=limit,
                parallel=parallel,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                timeout=timeout,
                retries=retries,
                log=log,
                api_key=api_key,
                progress=True,
            )
        )

    stop_on_user_error(lambda: _run("tools", ask, log, json_file))


def _run(
    suite: str, ask: Callable[[Path], Result], log: Path | None, json_file: Path | None
) -> int:
    """Ask, print, write; 130 after Ctrl-C, with how to go on."""
    log = log or Path(f"{suite}-{datetime.now():%Y%m%d-%H%M%S}.jsonl")
    try:
        result = ask(log)
    except KeyboardInterrupt:
        typer.echo(f"sglang-minimax: stopped; --log {log} goes on from there.", err=True)
        return INTERRUPTED
    show(result, log)
    if json_file is not None:
        result.write(json_file)
    return 0


def show(result: Result, log: Path) -> None:
    """Print the scores as a table, and what they rest on."""
    from sglang_minimax.cli import tables

    rows = []
    for name, score in result.scores.items():
        low, high = score.interval
        rows.append(
            (
                name,
                str(score.right),
                str(score.asked),
                f"{score.share:.1%}",
                f"{low:.1%}-{high:.1%}",
            )
        )
    titles = ("score", "right", "asked", "share", "95 % interval")
    tables.show(tables.table(*titles, rows=rows, right=titles[1:]))
    tables.show(tables.pairs(_notes(result, log)))


def _notes(result: Result, log: Path) -> list[tuple[str, str]]:
    figures, settings = result.figures, result.settings
    asked = figures.get("questions") or 2 * (figures.get("cases") or 0)
    notes = [
        ("server", f"{result.server['url']} {_sizes(result.server)}".strip()),
        ("model", str(settings["model"])),
        ("budget", f"{settings['max_tokens']} tokens"),
        ("truncated", f"{figures['truncated']} of {asked} ({figures['truncated_share']:.1%})"),
    ]
    if matches := figures.get("truncated_matches"):
        notes.append(("", f"{matches} of them hold the right number and count as wrong"))
    return [
        *notes,
        ("tokens", f"{figures['prompt_tokens']} read, {figures['completion_tokens']} written"),
        ("seconds", f"{figures['seconds']:.1f}{_before(figures)}"),
        ("log", str(log)),
    ]


def _before(figures: dict[str, Any]) -> str:
    count = figures["answered_before"]
    return f", without those of {count} that were answered before" if count else ""


def _sizes(server: dict[str, Any]) -> str:
    """Where the model ran, as `tp 8 ep 8`; nothing for a server that does not tell."""
    names = {"tp_size": "tp", "attn_dp_size": "dp", "ep_size": "ep", "pp_size": "pp"}
    sizes = [f"{short} {server[name]}" for name, short in names.items() if name in server]
    if algorithm := server.get("speculative_algorithm"):
        sizes.append(str(algorithm))
    return ", ".join(sizes)
