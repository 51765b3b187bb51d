"""Whether a model or a data set is here, or can be had from the hub, without fetching it."""

from __future__ import annotations

import os
from pathlib import Path

from sglang_minimax.errors import MinimaxError
from sglang_minimax.loading.files import check_checkpoint, folder_of

#: Seconds for the hub to answer.
PATIENCE = 10.0


def model_obstacle(name: str) -> str | None:
    """Why a model of the hub cannot be served here, as a clause; None where it can.

    A cache with config.json alone is no model: then the hub has to be reached, and what is missing
    is fetched while the server starts.
    """
    cached = folder_of(name)
    if cached is None:
        here = "is not in the hub's cache"
    elif lacking := folder_obstacle(cached):
        here = f"is not whole in the hub's cache ({lacking})"
    else:
        return None
    refused = _refused(name, "model")
    return f"{here}, and {refused}" if refused else None


def folder_obstacle(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, as a clause; None for a whole one.

    Only headers are read: every file that the index names has to be there in its full length.
    """
    if not (folder / "config.json").is_file():
        return "it has no config.json"
    try:
        check_checkpoint(folder)
    except MinimaxError as error:
        return str(error).rstrip(".")
    return None


def data_obstacle(name: str) -> str | None:
    """Why a data set of the hub cannot be had, as a clause; None where it can."""
    from huggingface_hub.constants import HF_HOME

    # The package `datasets` keeps what it has prepared under the name with three underscores.
    if any((_data_cache(HF_HOME) / name.replace("/", "___")).glob("**/*.arrow")):
        return None
    refused = _refused(name, "dataset")
    return f"are not in the cache of `datasets`, and {refused}" if refused else None


def _data_cache(home: str) -> Path:
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(home) / "datasets").expanduser()


def _refused(name: str, kind: str) -> str | None:
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=PATIENCE)
    except Exception as error:  # whatever the network and the hub can come up with
        return f"the hub does not give it ({type(error).__name__})"
    return None
