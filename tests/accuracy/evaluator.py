"""lm-eval by itself, from its task file to its metric, with replies that are known: the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Judged:
    """What the evaluator makes of one question, by its id and filter."""

    prompt: str
    extracted: dict[str, str]
    right: dict[str, bool]


def judge(
    folder: Path,
    reply: Callable[[str], str],
    *,
    shots: int,
    chat: bool,
    limit: int,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Judged]:
    """Run its `evaluate` on rows of a folder. reply: of a prompt, a text or JSON messages."""
    import datasets
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    class Known(LM):
        def generate_until(self, requests: list[Any]) -> list[str]:
            return [reply(request.args[0]) for request in requests]

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: list[Any]) -> list[Any]:
            raise NotImplementedError

        def apply_chat_template(self, messages: Any, add_generation_prompt: bool = True) -> str:
            return json.dumps(messages)

        @property
        def tokenizer_name(self) -> str:
            return "known"

        def chat_template(self, chat_template: bool | str = False) -> str:
            return ""

    def load(path: str, name: str, **_: Any) -> Any:
        assert (path, name) == ("openai/gsm8k", "main")
        splits = {
            split: [json.loads(line) for line in (folder / f"{split}.jsonl").open()]
            for split in ("test", "train")
        }
        return datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    tasks = Path(lm_eval.__file__).parent / "tasks" / "gsm8k"
    loaded = TaskManager(include_path=tasks, include_defaults=False).load(["gsm8k"])
    loaded["tasks"]["gsm8k"].set_config(key="num_fewshot", value=shots)
    loaded["tasks"]["gsm8k"].set_fewshot_seed(seed=seed)
    found = evaluate(
        Known(),
        loaded,
        limit=limit,
        apply_chat_template=chat,
        fewshot_as_multiturn=True,
        bootstrap_iters=0,
    )
    return _by_question(found["samples"]["gsm8k"])


def _by_question(samples: list[dict[str, Any]]) -> dict[str, Judged]:
    found: dict[str, Judged] = {}
    for sample in samples:
        each = found.setdefault(str(sample["doc_id"]), Judged(sample["arguments"][0][0], {}, {}))
        each.extracted[sample["filter"]] = sample["filtered_resps"][0]
        each.right[sample["filter"]] = sample["exact_match"] == 1
    return found
