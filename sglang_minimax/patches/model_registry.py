"""Make SGLang's model registry answer with our class, or stop."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

from sglang_minimax import ARCHITECTURE, __version__

logger = logging.getLogger(__name__)

MODEL_MODULE = "sglang_minimax.models.minimax_m2"


def resolve_ours_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_ModelRegistry.resolve_model_cls(architectures)`.

    The model file is imported only when MiniMax-M2 is asked for, so a server of another model
    never pays for it.
    """

    @functools.wraps(original)
    def resolve_model_cls(registry: Any, architectures: str | list[str]) -> Any:
        asked = [architectures] if isinstance(architectures, str) else list(architectures or [])
        if ARCHITECTURE in asked:
            registry.models[ARCHITECTURE] = our_model_class()
        return original(registry, architectures)

    return resolve_model_cls


@functools.cache
def our_model_class() -> type:
    """Import our model. Raises SystemExit with one sentence when it cannot serve."""
    from sglang_minimax import plugin

    plugin.require_healthy()
    try:
        model_class = importlib.import_module(MODEL_MODULE).EntryClass
    except Exception as error:
        logger.exception("importing %s failed", MODEL_MODULE)
        reason = str(error).strip().partition("\n")[0]
        raise SystemExit(
            f"sglang-minimax: the model could not be imported ({type(error).__name__}: {reason}); "
            "run `sglang-minimax doctor`, or set SGLANG_MINIMAX=0 to serve SGLang's own model."
        ) from error
    logger.info("sglang-minimax %s serves %s", __version__, ARCHITECTURE)
    return model_class
