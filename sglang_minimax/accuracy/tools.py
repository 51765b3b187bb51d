"""Tool calls on a live server: each case whole and streamed, judged as the replies come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_minimax.accuracy.endpoint import Asker, Reply, Server, look
from sglang_minimax.accuracy.errors import AccuracyError
from sglang_minimax.accuracy.journal import Entry
from sglang_minimax.accuracy.results import Result, Score
from sglang_minimax.accuracy.settings import ToolSettings
from sglang_minimax.accuracy.suite import Figures, run_suite
from sglang_minimax.accuracy.tool_cases import Case, is_correct, is_well_formed, load

SUITE = "tools"

#: The names of the scores: of the reply that comes whole, of the streamed one, of both together.
SCORES = ("well-formed", "correct", "streamed-well-formed", "streamed-correct", "streamed-same")


def run(settings: ToolSettings) -> Result:
    """Ask what the log does not hold yet; see `sglang_minimax.accuracy.run_tools`."""
    path = Path(settings.cases)
    cases = chosen(load(path), settings)
    server = look(settings)
    _check_parser(server)
    settings = replace(settings, model=server.model, max_tokens=server.budget(settings.max_tokens))
    asker = Asker(server, settings)
    return run_suite(
        SUITE,
        cases,
        lambda case: entry(
            case,
            asker.chat(case.messages, tools=case.tools),
            asker.streamed_chat(case.messages, tools=case.tools),
        ),
        lambda entries: (counted(entries), summed(entries)),
        identity=_identity(settings, path),
        server=server,
        settings=settings,
    )


def chosen(cases: Sequence[Case], settings: ToolSettings) -> list[Case]:
    """The cases that are asked. Raises AccuracyError where `calls_only` leaves none."""
    found = [case for case in cases if case.answer is None or not settings.calls_only]
    if not found:
        raise AccuracyError(
            f"every case of {settings.cases} has an 'answer', and those are left out; give other "
            "cases, or ask for all of them."
        )
    return found[: settings.limit]


def _check_parser(server: Server) -> None:
    """A server that tells its parsers, and has none of tools, would score nothing."""
    if "model_path" in server.facts and "tool_call_parser" not in server.facts:
        raise AccuracyError(
            f"the server at {server.url} has no tool-call parser; start it with "
            "--tool-call-parser minimax-m2."
        )


def _identity(settings: ToolSettings, path: Path) -> dict[str, Any]:
    identity = settings.identity()
    # The same cases may lie at another place.
    del identity["cases"]
    identity["cases_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return identity


def entry(case: Case, whole: Reply, streamed: Reply) -> Entry:
    """The log's line for a case: both replies, and what is true of each."""
    return {
        "id": case.id,
        "category": case.category,
        "messages": case.messages,
        "expected": case.expected,
        "answer": case.answer,
        "whole": _side(case, whole),
        "streamed": _side(case, streamed),
        "same": _seen(whole) == _seen(streamed),
    }


def _seen(reply: Reply) -> tuple[Any, ...]:
    """What a client sees of a reply, however it came."""
    return reply.text, reply.reasoning, reply.calls, reply.finish_reason


def _side(case: Case, reply: Reply) -> dict[str, Any]:
    """One reply. One that was cut off is neither well-formed nor correct, whatever it holds."""
    well_formed = not reply.is_truncated and is_well_formed(case, reply.text, reply.calls)
    return {
        "reply": reply.text,
        "reasoning": reply.reasoning,
        "calls": reply.calls,
        "well_formed": well_formed,
        "correct": well_formed and is_correct(case, reply.text, reply.calls),
        "finish_reason": reply.finish_reason,
        "truncated": reply.is_truncated,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "seconds": round(reply.seconds, 3),
    }


def counted(entries: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """The scores by the names of SCORES."""
    rights = (
        [row["whole"]["well_formed"] for row in entries],
        [row["whole"]["correct"] for row in entries],
        [row["streamed"]["well_formed"] for row in entries],
        [row["streamed"]["correct"] for row in entries],
        [row["same"] for row in entries],
    )
    return {name: Score(sum(right), len(right)) for name, right in zip(SCORES, rights, strict=True)}


def summed(entries: Iterable[Mapping[str, Any]]) -> Figures:
    """Truncation and tokens of all replies, two a case."""
    rows = [row[side] for row in entries for side in ("whole", "streamed")]
    truncated = sum(row["truncated"] for row in rows)
    return {
        "cases": len(rows) // 2,
        "truncated": truncated,
        "truncated_share": truncated / len(rows),
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
        "completion_tokens": sum(row["completion_tokens"] for row in rows),
    }
