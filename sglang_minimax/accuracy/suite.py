"""One run of a suite: ask what the log does not hold yet, and sum up from the whole of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from sglang_minimax.accuracy.asking import HasId, ask_all
from sglang_minimax.accuracy.endpoint import Server
from sglang_minimax.accuracy.journal import Entry, Journal
from sglang_minimax.accuracy.results import Result, Score
from sglang_minimax.accuracy.settings import Settings

Asked = TypeVar("Asked", bound=HasId)
Figures = dict[str, float | int | None]


def run_suite(
    suite: str,
    asked: Sequence[Asked],
    answer: Callable[[Asked], Entry],
    sum_up: Callable[[list[Entry]], tuple[dict[str, Score], Figures]],
    *,
    identity: Mapping[str, Any],
    server: Server,
    settings: Settings,
) -> Result:
    """Ask, and sum up the entries in the order of `asked`.

    identity: what a log has to agree on for this run to go on with it, beside the server's facts.
    Raises AccuracyError for a log of another run, and RequestsFailed where requests failed.
    """
    date, begin = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    heading = {"suite": suite, "identity": dict(identity), "server": server.facts}
    with Journal(settings.log, heading) as journal:
        ask_all(asked, answer, journal, settings)
        scores, figures = sum_up([journal.entries[each.id] for each in asked])
        figures = figures | {
            "answered_before": journal.found,
            "seconds": round(time.monotonic() - begin, 3),
        }
    return Result(
        suite=suite,
        settings=settings.as_dict(),
        date=date,
        server={"url": server.url, **server.facts},
        scores=scores,
        figures=figures,
    )
