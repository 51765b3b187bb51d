"""How a command ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import typer

from sglang_minimax.errors import MinimaxError


def stop_on_user_error(command: Callable[[], int]) -> NoReturn:
    """Exit with the command's status; a MinimaxError is one line on stderr and status 1."""
    try:
        status = command()
    except MinimaxError as error:
        typer.echo(f"sglang-minimax: {error}", err=True)
        status = 1
    raise typer.Exit(status)
