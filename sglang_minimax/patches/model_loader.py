"""The way in for our loader: SGLang's default one for safetensors, with what is read replaced.

SGLang still finds or downloads the files, builds the model, and post-processes the weights. A load
format of our own is not possible (`LoadFormat` is a closed set, and a draft model inherits it).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sglang.srt.configs.load_config import LoadConfig, LoadFormat
from sglang.srt.model_loader.loader import DefaultModelLoader, ModelOptModelLoader
from sglang.srt.runtime_context import get_parallel

from sglang_minimax import ARCHITECTURE
from sglang_minimax.loading.files import weight_files
from sglang_minimax.loading.planned import CheckpointFiles, ReadOptions
from sglang_minimax.patches.agreement import agree
from sglang_minimax.patches.shared_fate import SharedFate, shared_fate

logger = logging.getLogger(__name__)

FORMATS = (LoadFormat.AUTO, LoadFormat.SAFETENSORS)


def read_what_is_owned(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_model_loader(load_config, model_config)`: ours for our architecture's safetensors.

    Drafts, dummy weights, sharded states and streams keep SGLang's loaders.
    """

    @functools.wraps(original)
    def get_model_loader(load_config: LoadConfig, model_config: Any = None) -> Any:
        loader = original(load_config, model_config)
        if is_default(loader, model_config) and is_ours(load_config, model_config):
            return OwnShareLoader(load_config)
        return loader

    return get_model_loader


def is_default(loader: Any, model_config: Any) -> bool:
    """Whether SGLang would load as by default; ModelOpt's loader does with what is quantised."""
    if type(loader) is ModelOptModelLoader:
        calibrates = getattr(model_config, "modelopt_quant", None)
        return bool(model_config._is_already_quantized()) and not calibrates
    return type(loader) is DefaultModelLoader


def is_ours(load_config: LoadConfig, model_config: Any) -> bool:
    """Whether a load is of MiniMax-M2 itself, from safetensors."""
    if load_config.load_format not in FORMATS or load_config.draft_model_idx is not None:
        return False
    config = getattr(model_config, "hf_config", None)
    return ARCHITECTURE in (getattr(config, "architectures", None) or [])


class OwnShareLoader(DefaultModelLoader):
    """SGLang's default loader, reading of each file only what this rank holds."""

    _fate: SharedFate | None = None

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        """Build the model and load it. Raises LoadError, the same on all ranks."""
        with shared_fate() as self._fate:
            model: torch.nn.Module = super().load_model(
                model_config=model_config, device_config=device_config
            )
        self._fate = None
        return model

    def _get_weights_iterator(
        self, source: Any, *, resolved_source: Any = None, **_: Any
    ) -> Iterator[Any]:
        """What the model takes for (name, tensor) pairs: the files, in one piece."""
        if resolved_source is None:
            folder, _files, _safe = self._prepare_weights(
                source.model_or_path,
                source.revision,
                source.fall_back_to_pt,
                source.allow_patterns_overrides,
            )
        else:
            folder = resolved_source.hf_folder
        return iter(CheckpointFiles(tuple(weight_files(Path(folder))), self._options()))

    def _options(self) -> ReadOptions:
        extra = self.load_config.model_loader_extra_config
        threads = int(extra.get("num_threads", self.DEFAULT_NUM_THREADS))
        if not extra.get("enable_multithread_load", True):
            threads = 1
        return ReadOptions(
            threads=threads,
            pinned=torch.cuda.is_available(),
            progress=get_parallel().world_group.rank_in_group == 0,
            stop=self._fate.stop if self._fate else None,
            # Elsewhere a caller may be alone, such as the reload of experts of a lost rank.
            agree=agree if self._fate else lambda problems: problems,
        )
