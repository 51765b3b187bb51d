"""A weight update that we refuse answers with the reason; the server goes on with its weights."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_minimax.errors import MinimaxError
from sglang_minimax.loading.files import check_checkpoint

logger = logging.getLogger(__name__)

Update = Callable[..., tuple[bool, str]]


def answer_with_the_reason(original: Update) -> Update:
    """Wrap `WeightUpdater.update_weights_from_tensor(named_tensors, load_format)`.

    SGLang turns an exception of the distributed update into an answer, but lets this one end the
    scheduler, and every request with it.
    """

    @functools.wraps(original)
    def update_weights_from_tensor(self: Any, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        try:
            return original(self, *args, **kwargs)
        except MinimaxError as error:
            logger.error("weight update refused: %s", error)
            return False, str(error)

    return update_weights_from_tensor


def go_back_to_the_old_weights(original: Update) -> Update:
    """Wrap `WeightUpdater.update_weights_from_disk(model_path, load_format, ...)`.

    SGLang rolls back by reading the new path once more, outside of any `try`, which ends the
    scheduler. Here the weights of the old path come back, and the answer is the reason. A
    checkpoint from disk must be complete, unless the caller filters its names.
    """

    @functools.wraps(original)
    def update_weights_from_disk(
        self: Any,
        model_path: str,
        load_format: str,
        weight_name_filter: Callable[[str], bool] | None = None,
        recapture_cuda_graph: bool = False,
    ) -> tuple[bool, str]:
        def load(path: str) -> tuple[bool, str]:
            return original(self, path, load_format, weight_name_filter, recapture_cuda_graph)

        try:
            check_checkpoint(Path(model_path))
        except MinimaxError as error:
            return False, str(error)
        before = self.model_config.model_path
        whole = getattr(self.get_model(), "demand_complete_load", None)
        demand = whole() if whole and weight_name_filter is None else contextlib.nullcontext()
        try:
            with demand:
                return load(model_path)
        except MinimaxError as error:
            logger.error("weight update refused, going back to %s: %s", before, error)
            self.model_config.model_path = before
            restored, message = load(before)
            if not restored:
                raise RuntimeError(f"the old weights could not be read again: {message}") from error
            return False, str(error)

    return update_weights_from_disk
