"""`python -m ci.lane list|check|run|compare`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from ci.lane import Exit
from ci.lane.files import find, names
from ci.lane.launch import Node
from sglang_minimax.errors import MinimaxError

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.command("list")
def list_lanes() -> None:
    """The lanes there are."""
    from ci.lane import show

    show.lanes([find(name) for name in names()])


@app.command()
def check(
    lane: Annotated[
        list[str] | None, typer.Argument(help="Lanes or files; all by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Whether lanes would start, as far as this machine can tell; 1 if one would not."""
    from ci.lane import check as checks
    from ci.lane import show

    found = checks.check([find(name) for name in lane or names()])
    if as_json:
        typer.echo(json.dumps([each.as_dict() for each in found], indent=1))
    else:
        show.findings(found)
    raise typer.Exit(Exit.FAIL if any(each.problems for each in found) else Exit.PASS)


@app.command()
def run(
    lane: Annotated[str, typer.Argument(help="A lane, or a lane file.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for results; by default a new one here.")
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Only these; may be repeated.")] = None,
    suite: Annotated[list[str] | None, typer.Option(help="Only these; may be repeated.")] = None,
    node_rank: Annotated[int, typer.Option(help="Which node this is.")] = 0,
    dist_init_addr: Annotated[str | None, typer.Option(help="HOST:PORT of node 0.")] = None,
    port: Annotated[int | None, typer.Option(help="Of the server; any by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Serve, measure, judge, stop; 0 pass, 1 fail, 2 could not run, 130 interrupted."""
    from ci.lane import run as runs
    from ci.lane import show

    found = find(lane)
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    folder = out or Path(f"lane-{found.name}-{now}")
    node = Node(node_rank, dist_init_addr)
    asked = runs.Asked(found, folder, variant or (), suite or (), node, port, resume)
    with runs.noted_signals() as give_up:
        outcome = runs.run(asked, give_up)
    show.outcome(outcome)
    typer.echo(f"{folder / 'result.json'}  {folder / 'junit.xml'}")
    raise typer.Exit(outcome.status)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="result.json of a run.")],
    after: Annotated[Path, typer.Argument(help="result.json of a later run.")],
) -> None:
    """How far two runs are apart, and in what; 1 if a threshold that held no longer does."""
    from ci.lane import show
    from ci.lane.compare import compare as compared
    from ci.lane.compare import differences
    from ci.lane.outcome import read

    one, other = read(before), read(after)
    found = compared(one, other)
    show.drifts(found)
    for sentence in differences(one, other):
        typer.echo(sentence)
    raise typer.Exit(Exit.FAIL if any(each.is_loss for each in found) else Exit.PASS)


def main(call: Callable[[], None] = app) -> None:
    """A mistake in a file or an argument is one sentence, and status 2."""
    try:
        call()
    except MinimaxError as error:
        typer.echo(f"ci.lane: {error}", err=True)
        sys.exit(Exit.COULD_NOT_RUN)


if __name__ == "__main__":
    main()
