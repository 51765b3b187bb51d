"""Copies of the bundled draft, changed in one place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sglang_minimax import TINY_M2_EAGLE3

#: Of what must not be there.
REMOVED = object()

State = dict[str, torch.Tensor]


def draft_config(**changes: Any) -> dict[str, Any]:
    """The bundled draft's config.json with some values replaced or REMOVED."""
    config = json.loads((TINY_M2_EAGLE3 / "config.json").read_text()) | changes
    return {key: value for key, value in config.items() if value is not REMOVED}


def layers(*ids: Any, **more: Any) -> dict[str, Any]:
    """An `eagle_config` that names these layers."""
    return {"eagle_config": {"eagle_aux_hidden_state_layer_ids": list(ids), **more}}


def draft_in(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    change: Callable[[State], State | None] | None = None,
) -> Path:
    """A copy of the bundled draft in `folder`, with another config.json or other tensors.

    change: alters the tensors in place, or returns others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config or draft_config())))
    tensors = load_file(TINY_M2_EAGLE3 / "model.safetensors")
    if change is not None:
        tensors = change(tensors) or tensors
    contiguous = {name: value.clone().contiguous() for name, value in tensors.items()}
    save_file(contiguous, folder / "model.safetensors")
    return folder
