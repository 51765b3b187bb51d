"""`sglang-minimax validate`: do the shapes of the list, or one shape, compute the same model?"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from sglang_minimax.errors import MinimaxError
from sglang_minimax.validation.shapes import NotYet, Refused, Shape, catalogue


def validate(
    topology: str | None,
    checkpoint: Path | None,
    random_config: str | None,
    as_json: bool,
    timeout: float,
) -> int:
    """Run what was asked for and print the outcome; 1 if any of it falls short.

    Raises MinimaxError, before anything is started, for arguments that make no sense.
    """
    if checkpoint is not None and random_config is not None:
        raise MinimaxError("--checkpoint and --random-config name two models; give one of them.")
    places = chosen(topology, listed_models=checkpoint is None and random_config is None)

    from sglang_minimax.validation import report
    from sglang_minimax.validation.session import Session

    progress = Console(stderr=True, highlight=False)

    def say(line: str) -> None:
        progress.print(line, markup=False)

    results = []
    with tempfile.TemporaryDirectory(prefix="minimax-models-") as folder:
        session = Session(Path(folder), checkpoint, random_config, timeout, say)
        for number, place in enumerate(places, start=1):
            why = getattr(place, "why", "")
            note = f" ({why})" if why else ""
            say(f"[{number}/{len(places)}] {place.name}{note}")
            results.append(session.run(place))
    if as_json:
        json.dump([report.as_dict(each) for each in results], sys.stdout, indent=1, allow_nan=False)
        print()
    else:
        report.show(results, report.console())
    asked_in_vain = topology is not None and any(each.status == "not run" for each in results)
    return int(asked_in_vain or any(each.falls_short for each in results))


def chosen(topology: str | None, *, listed_models: bool) -> list[Shape | Refused | NotYet]:
    """The places to run: one, or the whole list.

    listed_models: whether the list's own models are used; with another model, what the list
    expects to be refused may be legal, so it is left out.
    """
    everything = catalogue()
    if topology is not None:
        return [everything.find(topology) or Shape(topology=topology)]
    found: list[Shape | Refused | NotYet] = list(everything.shapes)
    return [*found, *everything.refused, *everything.not_yet] if listed_models else found
