"""The tensors of safetensors files as their headers announce them, without the data.

A weight comes as a tensor on the meta device: name, shape and type. Scales, which are small and
whose values are judged, are read. No SGLang.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import safe_open

from sglang_minimax.config import Architecture
from sglang_minimax.errors import LoadError
from sglang_minimax.loading.ledger import SCALES

#: Types of the safetensors format. One that is not here has no parameter to go to.
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def announced_tensors(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) for each tensor of each file. Raises LoadError, SafetensorError, OSError."""
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
                if name.rpartition(".")[2] in SCALES:
                    yield name, opened.get_tensor(name)
                    continue
                entry = opened.get_slice(name)
                kind, shape = entry.get_dtype(), entry.get_shape()
                if kind not in TYPES:
                    raise LoadError(f"{name} in {file} is {kind}, which no MiniMax-M2 has.")
                yield name, torch.empty(shape, dtype=TYPES[kind], device="meta")


def architecture_of(folder: Path) -> Architecture | None:
    """What config.json of `folder` describes, None where there is none. Raises MinimaxError."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{file} cannot be read as JSON; copy or download it again.") from error
    if not isinstance(config, dict):
        raise LoadError(f"{file} is no JSON object; copy or download it again.")
    return Architecture.from_config(config)


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
