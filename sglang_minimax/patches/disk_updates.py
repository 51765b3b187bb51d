"""Weights from disk into a running engine: headers first, all ranks or none, and the way back.

SGLang's own way back reads the new path once more, and outside of any `try`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.model_loader.loader import DefaultModelLoader, get_model_loader

from sglang_minimax.errors import LoadError, MinimaxError
from sglang_minimax.loading.files import (
    architecture_of,
    check_checkpoint,
    check_same_architecture,
    weight_files,
)
from sglang_minimax.loading.planned import CheckpointFiles
from sglang_minimax.loading.problems import Problems
from sglang_minimax.patches.agreement import together

logger = logging.getLogger(__name__)

Update = Callable[..., tuple[bool, str]]

NO_WAY_BACK = (
    "The server was started with load_format dummy, so there is no checkpoint to go back to: "
    "update from one before the next request."
)


def problems_of(updater: Any, path: str, load_format: str) -> Problems:
    """What speaks against the checkpoint at `path`, from its headers. Raises MinimaxError.

    A name on a hub is downloaded first, as SGLang would.
    """
    folder = Path(path)
    if not folder.is_dir() and (folder.is_absolute() or folder.exists()):
        raise LoadError(f"{path} is no folder; give the path of a checkpoint.")
    check_checkpoint(folder)
    model, config = updater.get_model(), copy.copy(updater.model_config)
    before, config.model_path = Path(config.model_path), path
    loader = get_model_loader(LoadConfig(load_format=load_format), config)
    if not isinstance(loader, DefaultModelLoader):
        raise LoadError(f"{type(loader).__name__} cannot update weights; use load_format auto.")
    (source,) = loader.resolve_model_weights(config, model)
    resolved = Path(source.hf_folder)
    check_checkpoint(resolved)
    if not source.use_safetensors:
        raise LoadError(f"{path} has no safetensors; convert the checkpoint.")
    check_same_architecture(resolved, architecture_of(before) or model.arch)
    return model.weight_problems(CheckpointFiles(tuple(weight_files(resolved))), complete=True)


def load_or_go_back(
    updater: Any, path: str, load_format: str, recapture: bool
) -> tuple[bool, str, bool]:
    """Load a checkpoint that was found right; where that fails on any rank, all go back.

    Returns (success, message, whether the weights are other ones than before). After a start with
    load_format dummy there is nothing to go back to, which the message says. Raises RuntimeError
    where the old weights cannot be read either: there is nothing left to serve.
    """
    model = updater.get_model()
    before, before_format = updater.model_config.model_path, _format_of(updater)
    lost = " Updates since then that did not come from a checkpoint are lost."
    lost = lost if model.partly_replaced else ""
    _, failed = together(
        lambda problems: _load(problems, updater, path, load_format, recapture=recapture)
    )
    if not failed:
        return True, "Succeeded to update model weights.", True
    if before_format == "dummy":
        return False, f"{failed.error()}\n{NO_WAY_BACK}", True
    logger.error("weight update failed, going back to %s: %s", before, failed.error())
    _, lost_all = together(lambda problems: _load(problems, updater, before, before_format))
    if lost_all:
        raise RuntimeError(f"the old weights could not be read again: {lost_all.error()}")
    return False, f"{failed.error()}\nThe weights of {before} are back.{lost}", bool(lost)


def _load(
    problems: Problems, updater: Any, path: str, load_format: Any, *, recapture: bool = False
) -> None:
    """One read of a whole checkpoint, on this rank. Raises MinimaxError, and what SGLang raises."""
    sglangs: Update = type(updater).update_weights_from_disk.__sglang_original__
    with updater.get_model().demand_complete_load():
        success, message = sglangs(updater, path, load_format, None, recapture)
    if not success:
        problems.say(message)


def _format_of(updater: Any) -> Any:
    return updater.get_model_runner().load_config.load_format


def go_back_to_the_old_weights(original: Update) -> Update:
    """Wrap `WeightUpdater.update_weights_from_disk(model_path, load_format, ...)`.

    For callers on one rank, such as the reload of experts after a rank was lost; requests take the
    way above. The weights of the old path come back, and the answer is the reason. A checkpoint
    must be complete, unless the caller filters its names.
    """

    @functools.wraps(original)
    def update_weights_from_disk(
        self: Any,
        model_path: str,
        load_format: str,
        weight_name_filter: Callable[[str], bool] | None = None,
        recapture_cuda_graph: bool = False,
    ) -> tuple[bool, str]:
        def load(path: str, load_format: Any) -> tuple[bool, str]:
            demand = whole() if whole and weight_name_filter is None else contextlib.nullcontext()
            with demand:
                return original(self, path, load_format, weight_name_filter, recapture_cuda_graph)

        whole = getattr(self.get_model(), "demand_complete_load", None)
        if whole is None:
            return load(model_path, load_format)
        before, before_format = self.model_config.model_path, _format_of(self)
        try:
            check_checkpoint(Path(model_path))
        except MinimaxError as error:
            return False, str(error)
        try:
            success, message = load(model_path, load_format)
        except Exception as error:
            success, message = False, str(error)
        if success:
            return True, message
        logger.error("weight update failed, going back to %s: %s", before, message)
        restored, reason = load(before, before_format)
        if not restored:
            raise RuntimeError(f"the old weights could not be read again: {reason}")
        return False, message

    return update_weights_from_disk
