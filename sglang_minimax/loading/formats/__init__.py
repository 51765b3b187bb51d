"""Quantisation formats, one module each, and which of them a checkpoint's config describes.

To add one: a module with `read(config) -> Recipe | None` and `KERNELS`, entered in READERS.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_minimax.errors import ConfigError
from sglang_minimax.loading.formats import (
    awq,
    compressed_tensors,
    fp8,
    gptq,
    modelslim,
    mxfp4,
    nvfp4,
)
from sglang_minimax.loading.formats.base import UNQUANTISED, ReadRecipe, Recipe

#: Where ModelOpt writes its config, beside config.json or instead of a part of it.
MODELOPT_FILE = "hf_quant_config.json"

READERS: tuple[ReadRecipe, ...] = (
    fp8.read,
    compressed_tensors.read,
    awq.read,
    gptq.read,
    nvfp4.read,
    mxfp4.read,
    modelslim.read,
)


def recipe_of(config: Mapping[str, Any] | None) -> Recipe:
    """What a parsed quantisation config describes; ConfigError for one that is not known.

    config: what `quantisation_config` finds, None where there is none.
    """
    if not config:
        return UNQUANTISED
    for read in READERS:
        recipe = read(config)
        if recipe is not None:
            return recipe
    method = config.get("quant_method", config.get("quant_algo"))
    raise ConfigError(
        f"config: quantization_config is of {method!r}, which is not a format that MiniMax-M2 "
        "checkpoints come in; use one of those in docs/formats.md, or set SGLANG_MINIMAX=0 to "
        "serve this one with SGLang's own model."
    )


def quantisation_config(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantisation config of a checkpoint, wherever its tool has put it; for `recipe_of`.

    config: the parsed config.json of `folder`. Looks in the order of SGLang's ModelConfig
    (_find_quant_modelslim_config, _parse_quant_hf_config): ModelSlim's description, config.json,
    ModelOpt's own file. Raises ConfigError where two of them contradict each other.
    """
    keys = ("quantization_config", "compression_config")
    found = next(((key, config[key]) for key in keys if config.get(key) is not None), None)
    description = _json_object(folder / modelslim.DESCRIPTION)
    if description is not None:
        if found is not None:
            raise ConfigError(
                f"{folder} has {modelslim.DESCRIPTION} and {found[0]} in config.json, and SGLang "
                "would mix them up; remove the one that the weights were not quantised with."
            )
        return {**description, "quant_method": "modelslim"}
    modelopt = _json_object(folder / MODELOPT_FILE)
    if found is None:
        return modelopt
    key, own = found
    if isinstance(own, Mapping) and modelopt is not None:
        algorithm = _algorithm(modelopt)
        if algorithm is not None and algorithm != _algorithm(own):
            raise ConfigError(
                f"{MODELOPT_FILE} says quant_algo {algorithm!r} and config.json "
                f"{_algorithm(own)!r} under {key}, which SGLang would follow; remove the one that "
                "the weights were not quantised with."
            )
    return own


def _algorithm(config: Mapping[str, Any]) -> Any:
    """ModelOpt's name for what was done, None where another tool did it."""
    nested = config.get("quantization")
    return (nested if isinstance(nested, Mapping) else config).get("quant_algo")


def _json_object(file: Path) -> dict[str, Any] | None:
    """A parsed file, None where there is none. Raises ConfigError."""
    if not file.is_file():
        return None
    try:
        parsed = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); copy or download it again.") from error
    if not isinstance(parsed, dict):
        raise ConfigError(f"{file} is no JSON object; copy or download it again.")
    return parsed
