"""The evaluator's GSM8K task: its prompts, its filters, its metric. Ours is only the asking.

The evaluator is lm-eval (https://github.com/EleutherAI/lm-evaluation-harness). What it brings from
its own task file is used as it is; the data and, where asked for, the prompt are put in its place.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from sglang_minimax.accuracy import gsm8k_data
from sglang_minimax.accuracy.errors import AccuracyError
from sglang_minimax.accuracy.settings import Gsm8kSettings

METRIC = "exact_match"


@dataclass(frozen=True)
class Verdict:
    """One reply judged. extracted, matches: by the name of the evaluator's filter."""

    extracted: dict[str, str]
    matches: dict[str, bool]


@dataclass(frozen=True)
class Question:
    """One question. prompt: a text, or messages for chat. expected: the number, as text.

    stop: the texts that end a reply.
    """

    id: str
    question: str
    expected: str
    prompt: str | list[dict[str, Any]]
    stop: list[str]
    document: dict[str, Any]


class Gsm8kTask:
    """The task for one run. Threads may share it.

    Raises AccuracyError where the evaluator is not installed, or the data not there or not GSM8K's.
    """

    def __init__(self, settings: Gsm8kSettings) -> None:
        self._settings = settings
        config = _configuration()
        splits = gsm8k_data.load(settings.data, settings.shots)
        if splits is None:
            config["dataset_path"] = settings.data
        else:
            config["custom_dataset"] = lambda **_: _as_datasets(splits)
        if settings.prompt is not None:
            config["doc_to_text"] = settings.prompt
        config["num_fewshot"] = settings.shots
        self._task = _built(config, settings.data)
        self._task.set_fewshot_seed(settings.seed)
        self.filters = [each.name for each in self._task._filters]

    def questions(self) -> list[Question]:
        """The questions in the data's order, with shots drawn by the evaluator's sampler."""
        documents = self._task.doc_iterator(limit=self._settings.limit)
        return [self._question(number, document) for number, document in documents]

    def data_sha256(self) -> str:
        """A hash of all rows that a run can see, so that a log tells data that were changed."""
        rows = [list(self._task.test_docs())]
        if self._settings.shots:
            rows.append(list(self._task.training_docs()))
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def _question(self, number: int, document: dict[str, Any]) -> Question:
        is_chat = self._settings.endpoint == "chat"
        context = self._task.fewshot_context(
            document,
            num_fewshot=self._settings.shots,
            apply_chat_template=is_chat,
            fewshot_as_multiturn=True,
            chat_template=_as_json,
        )
        request = self._task.construct_requests(
            doc=document, ctx=context, metadata=(self._task.config.task, number, 1)
        )
        prompt, generation = request.args
        return Question(
            id=str(number),
            question=document["question"],
            expected=document["answer"].rpartition("####")[2].strip(),
            prompt=json.loads(prompt) if is_chat else prompt,
            stop=[text for text in generation["until"] if text],
            document=document,
        )

    def judge(self, question: Question, reply: str) -> Verdict:
        """What the evaluator's filters take out of a reply, and whether its metric likes it."""
        request = self._task.construct_requests(
            doc=question.document, ctx="", metadata=(self._task.config.task, int(question.id), 1)
        )
        request.resps = [reply]
        for each in self._task._filters:
            each.apply([request])
        found = request.filtered_resps
        return Verdict(
            extracted=dict(found),
            matches={
                name: bool(self._task.process_results(question.document, [text])[METRIC] == 1)
                for name, text in found.items()
            },
        )


def cut_at_stop(text: str, stop: list[str]) -> str:
    """A chat reply up to the first text that ends it.

    The server is not asked to stop there: it would stop inside of the reasoning too.
    """
    for mark in stop:
        text = text.partition(mark)[0]
    return text


def _as_json(messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
    """The evaluator's chat template of an API: the messages, which the server renders."""
    return json.dumps(messages)


def _configuration() -> dict[str, Any]:
    """The evaluator's own task file."""
    found = find_spec("lm_eval")
    if found is None or found.origin is None:
        raise AccuracyError(
            "GSM8K needs the evaluator lm-eval; install it with "
            "pip install 'sglang-minimax[accuracy]'."
        )
    path = Path(found.origin).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config.pop("tag", None)
    return config


def _as_datasets(splits: dict[str, list[gsm8k_data.Row]]) -> Any:
    from datasets import Dataset, DatasetDict

    # A split without rows would have no columns.
    return DatasetDict(
        {
            name: Dataset.from_dict({key: [row[key] for row in rows] for key in gsm8k_data.KEYS})
            for name, rows in splits.items()
        }
    )


def _built(config: dict[str, Any], data: str) -> Any:
    """The evaluator's task. Raises AccuracyError where a data set of the hub does not come."""
    from lm_eval.api.task import ConfigurableTask

    # It explains an option of its own command line.
    logging.getLogger(ConfigurableTask.__module__).setLevel(logging.ERROR)
    if "custom_dataset" in config:
        return ConfigurableTask(config=config)
    try:
        task = ConfigurableTask(config=config)
        missing = [key for key in gsm8k_data.KEYS if key not in task.test_docs().column_names]
    except Exception as error:  # whatever the hub's client raises for a network, a name, a split
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise AccuracyError(
            f"the data set {data} did not come from the hub ({why}); give a path to it."
        ) from error
    if missing:
        raise AccuracyError(f"the data set {data} has no {' and no '.join(missing)} as GSM8K has.")
    gsm8k_data.check_shots(len(task.training_docs()), config["num_fewshot"], data)
    return task
