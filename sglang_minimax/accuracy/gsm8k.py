"""GSM8K on a live server: ask, judge each reply as it comes, and sum up from the log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from sglang_minimax.accuracy.endpoint import Asker, Reply, check_thinking, look
from sglang_minimax.accuracy.errors import AccuracyError
from sglang_minimax.accuracy.gsm8k_task import Gsm8kTask, Question, cut_at_stop
from sglang_minimax.accuracy.journal import Entry
from sglang_minimax.accuracy.results import Result, Score
from sglang_minimax.accuracy.settings import Gsm8kSettings
from sglang_minimax.accuracy.suite import Figures, run_suite

SUITE = "gsm8k"


def run(settings: Gsm8kSettings) -> Result:
    """Ask what the log does not hold yet; see `sglang_minimax.accuracy.run_gsm8k`."""
    server = look(settings)
    check_thinking(server, settings.thinking)
    settings = replace(settings, model=server.model, max_tokens=server.budget(settings.max_tokens))
    task = Gsm8kTask(settings)
    asker = Asker(server, settings)
    return run_suite(
        SUITE,
        task.questions(),
        lambda question: _answered(question, asker, task, settings),
        lambda entries: (counted(entries, task.filters), summed(entries)),
        identity=_identity(settings, task),
        server=server,
        settings=settings,
    )


def _identity(settings: Gsm8kSettings, task: Gsm8kTask) -> dict[str, Any]:
    identity = settings.identity()
    # The same rows may lie at another place.
    del identity["data"]
    identity["data_sha256"] = task.data_sha256()
    return identity


def _answered(question: Question, asker: Asker, task: Gsm8kTask, settings: Gsm8kSettings) -> Entry:
    if isinstance(question.prompt, str):
        reply = asker.complete(question.prompt, question.stop)
    else:
        reply = asker.chat(question.prompt, thinking=settings.thinking)
        reply = replace(reply, text=cut_at_stop(reply.text, question.stop))
    if settings.thinking is False and reply.reasoning:
        raise AccuracyError(
            "thinking is off, and the server answers with reasoning nevertheless; run with the "
            "server's default."
        )
    return entry(question, reply, task)


def entry(question: Question, reply: Reply, task: Gsm8kTask) -> Entry:
    """The log's line for a reply.

    A reply that was cut off is not right, whatever number it had come to: `matches` says what the
    evaluator found in it, `right` what counts.
    """
    verdict = task.judge(question, reply.text)
    return {
        "id": question.id,
        "question": question.question,
        "prompt": question.prompt,
        "reply": reply.text,
        "reasoning": reply.reasoning,
        "extracted": verdict.extracted,
        "expected": question.expected,
        "matches": verdict.matches,
        "right": {
            name: matches and not reply.is_truncated for name, matches in verdict.matches.items()
        },
        "finish_reason": reply.finish_reason,
        "truncated": reply.is_truncated,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "seconds": round(reply.seconds, 3),
    }


def counted(entries: Iterable[Mapping[str, Any]], filters: Iterable[str]) -> dict[str, Score]:
    """The score by each of the evaluator's filters."""
    rows = list(entries)
    return {name: Score(sum(row["right"][name] for row in rows), len(rows)) for name in filters}


def summed(entries: Iterable[Mapping[str, Any]]) -> Figures:
    """Truncation and tokens of all replies.

    truncated_matches: cut-off replies in which a filter found the right number all the same; they
    count as wrong.
    """
    rows = list(entries)
    truncated = [row for row in rows if row["truncated"]]
    completion = [row["completion_tokens"] for row in rows]
    return {
        "questions": len(rows),
        "truncated": len(truncated),
        "truncated_share": len(truncated) / len(rows),
        "truncated_matches": sum(any(row["matches"].values()) for row in truncated),
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
        "completion_tokens": sum(completion),
        "longest_completion": max(completion),
    }
