"""Look at a local checkpoint folder before anything opens its files as weights.

Headers only: whether there are safetensors at all (a pickle would run code when read), whether the
shards that the index names are there, and whether each file is as long as its header says. No
torch, no SGLang.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from sglang_minimax.config import Architecture
from sglang_minimax.errors import LoadError
from sglang_minimax.loading.headers import AGAIN, read_header

INDEX = "model.safetensors.index.json"


def check_checkpoint(folder: Path) -> None:
    """Raise LoadError, in one sentence, unless the weight files of `folder` are whole.

    A path that is no folder (a name on a hub) is left alone.
    """
    if not folder.is_dir():
        return
    for file in weight_files(folder):
        read_header(file)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights: those of the index, or all without one."""
    index = folder / INDEX
    if index.is_file():
        files = [folder / name for name in _shards(index)]
        for file in files:
            if not file.is_file():
                raise LoadError(f"{file} is missing, but {INDEX} names it; {AGAIN}")
    else:
        files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(file.name for end in ("bin", "pt", "pth") for file in folder.glob(f"*.{end}"))
    if pickles:
        raise LoadError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which can run code when it is "
            "read; convert the checkpoint to safetensors."
        )
    raise LoadError(f"{folder} has no weights (*.safetensors); check the path of the model.")


def _shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        return sorted(str(name) for name in names)
    except OSError as error:
        raise LoadError(f"{index} cannot be read ({error.strerror}); {AGAIN}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LoadError(f"{index} is no index of safetensors files; {AGAIN}") from error


def architecture_of(folder: Path) -> Architecture | None:
    """What config.json of `folder` describes, None where there is none. Raises MinimaxError."""
    config = config_of(folder)
    return None if config is None else Architecture.from_config(config, folder)


def folder_of(model_path: str, revision: str | None = None) -> Path | None:
    """Where a checkpoint's small files lie: the folder, or the hub's cache; None for neither.

    SGLang has fetched config.json, and what lies beside it, before it asks for a model.
    """
    if Path(model_path).is_dir():
        return Path(model_path)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model_path, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def config_of(folder: Path, name: str = "config.json") -> dict[str, Any] | None:
    """The parsed JSON file `name` of `folder`, None where there is none. Raises LoadError."""
    file = folder / name
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{file} cannot be read as JSON; copy or download it again.") from error
    if not isinstance(config, dict):
        raise LoadError(f"{file} is no JSON object; copy or download it again.")
    return config


def check_same_architecture(folder: Path, running: Architecture) -> None:
    """Raise MinimaxError where config.json of `folder` describes another model than `running`.

    A folder without one says nothing. An update replaces weights only, so that another rope_theta
    would give other results than a fresh start. Layers for multi-token prediction are left out
    whatever their number.
    """
    new = architecture_of(folder)
    for field in fields(Architecture):
        there, here = getattr(new, field.name, None), getattr(running, field.name)
        if new and there != here and field.name != "num_mtp_modules":
            raise LoadError(
                f"config.json of {folder} is of another model ({field.name} is {there}, of the "
                f"running one {here}); start a server with it instead."
            )
