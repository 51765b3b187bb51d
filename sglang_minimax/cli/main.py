"""`sglang-minimax`: look at an installation before a server has to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from sglang_minimax import TINY_M2, __version__
from sglang_minimax.errors import MinimaxError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="MiniMax-M2 for SGLang. The server itself is `python -m sglang.launch_server`.",
)


@app.callback()
def main() -> None:
    """Keep `sglang-minimax COMMAND` the form even while there are few commands."""


@app.command()
def version() -> None:
    """Print the version of this package."""
    typer.echo(__version__)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check versions, platform, model class, kernels and hooks; exit 1 if something matters."""
    # Imported here: the check imports SGLang, `--help` should not.
    from sglang_minimax.cli import doctor as checks

    report = checks.examine()
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        checks.show(report)
    raise typer.Exit(1 if report.problems else 0)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")] = TINY_M2,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 30000,
) -> None:
    """Run SGLang's server with the bundled tiny-m2; further options go to SGLang."""
    from sglang_minimax.cli.serve import serve as run

    _stop_on_user_error(lambda: run(model, host, port, context.args))


@app.command()
def demo() -> None:
    """Start a server, ask one question that needs thinking and one that needs a tool, stop it."""
    from sglang_minimax.cli.demo import demo as run

    _stop_on_user_error(run)


def _stop_on_user_error(command: Callable[[], int]) -> NoReturn:
    """Exit with the command's status; a MinimaxError is one line on stderr and status 1."""
    try:
        status = command()
    except MinimaxError as error:
        typer.echo(f"sglang-minimax: {error}", err=True)
        status = 1
    raise typer.Exit(status)


if __name__ == "__main__":
    app()
