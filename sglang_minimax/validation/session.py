"""Models and oracles that several shapes share, and the one call that runs a place of the list."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sglang_minimax.config import Architecture
from sglang_minimax.topology import Topology
from sglang_minimax.validation import subject as subjects
from sglang_minimax.validation.engine_process import preload
from sglang_minimax.validation.run import (
    TIMEOUT,
    ShapeResult,
    refusal,
    run_refused,
    run_shape,
    why_not_here,
)
from sglang_minimax.validation.shapes import NotYet, Refused, Shape, catalogue
from sglang_minimax.validation.subject import Subject


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what SGLang's imports say about optional parts that this machine lacks."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


class Session:
    """Runs places one after the other in forked engines; SGLang is imported once, here.

    checkpoint, random_config: the model for every shape, instead of those of the list: a folder,
    or a path to a config.json or its text. folder: where random weights are written. say: called
    with a line before something that takes long.
    Raises MinimaxError for a model that is not understood or does not fit in memory.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Path | None = None,
        random_config: str | None = None,
        timeout: float = TIMEOUT,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._folder = folder
        self._timeout = timeout
        self._say = say
        self._checkpoint = checkpoint
        self._subjects: dict[str, Subject] = {}
        self._config: dict[str, Any] | None = None
        if random_config is not None:
            self._config = subjects.random_config(random_config)
        elif checkpoint is not None:
            self._config = subjects.read_config(checkpoint)
        if self._config is not None:
            arch = Architecture.from_config(self._config)
            subjects.refuse_what_does_not_fit(arch, Topology())

    def config(self, model: str) -> dict[str, Any]:
        """The config.json of the model that runs where a place names `model`."""
        return self._config or catalogue().config(model)

    def subject(self, model: str) -> Subject:
        """The model that a place names, made when it is first asked for."""
        name = model if self._config is None else str(self._checkpoint or "random")
        if name not in self._subjects:
            # Computing on several threads before a fork would leave the children without them.
            torch.set_num_threads(1)
            with _quiet():
                if self._checkpoint is not None:
                    self._subjects[name] = Subject(self._checkpoint, name)
                else:
                    folder = self._folder / name
                    self._subjects[name] = subjects.write(self.config(model), folder, name)
        return self._subjects[name]

    def run(self, place: Shape | Refused | NotYet) -> ShapeResult:
        """Run one place of the list, or any other shape."""
        blank = ShapeResult(place.name, place.model, status="not run")
        if isinstance(place, NotYet):
            return replace(blank, reason=place.reason)
        if isinstance(place, Shape):
            arch = Architecture.from_config(self.config(place.model))
            if reason := refusal(place, arch):
                return replace(blank, status="refused", reason=reason, expected=False)
            if reason := why_not_here(place.sizes()):
                return replace(blank, reason=reason)
        self._import()
        subject = self.subject(place.model)
        if isinstance(place, Refused):
            return run_refused(place, subject, timeout=self._timeout)
        return run_shape(place, subject, timeout=self._timeout)

    def _import(self) -> None:
        if "sglang.srt.entrypoints.engine" not in sys.modules:
            self._say("importing SGLang, once (some 15 s)")
        torch.set_num_threads(1)
        with _quiet():
            preload()
