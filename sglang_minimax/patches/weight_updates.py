"""A weight update that we refuse answers with the reason; the server goes on with its weights."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from sglang_minimax.errors import MinimaxError

logger = logging.getLogger(__name__)

Update = Callable[..., tuple[bool, str]]


def answer_with_the_reason(original: Update) -> Update:
    """Wrap `WeightUpdater.update_weights_from_tensor(named_tensors, load_format)`.

    SGLang turns an exception of the disk and the distributed update into an answer, but lets this
    one end the scheduler, and every request with it.
    """

    @functools.wraps(original)
    def update_weights_from_tensor(self: Any, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        try:
            return original(self, *args, **kwargs)
        except MinimaxError as error:
            logger.error("weight update refused: %s", error)
            return False, str(error)

    return update_weights_from_tensor
