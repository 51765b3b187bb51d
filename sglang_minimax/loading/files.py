"""Look at a local checkpoint folder before anything opens its files as weights.

Headers only: whether there are safetensors at all (a pickle would run code when read), whether the
shards that the index names are there, and whether each file is as long as its header says. No
torch, no SGLang.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from sglang_minimax.errors import LoadError

INDEX = "model.safetensors.index.json"
AGAIN = "copy or download it again."
# What the safetensors library accepts.
LONGEST_HEADER = 100_000_000
_LENGTH = struct.Struct("<Q")


def check_checkpoint(folder: Path) -> None:
    """Raise LoadError, in one sentence, unless the weight files of `folder` are whole.

    A path that is no folder (a name on a hub) is left alone.
    """
    if not folder.is_dir():
        return
    for file in weight_files(folder):
        check_file(file)


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


def check_file(file: Path) -> None:
    """Raise LoadError unless a safetensors file has a header and the bytes that it announces."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(_LENGTH.size)
            if len(start) < _LENGTH.size:
                raise LoadError(f"{file} is incomplete: it has {size} bytes; {AGAIN}")
            (length,) = _LENGTH.unpack(start)
            if length > LONGEST_HEADER:
                raise LoadError(f"{file} has no valid safetensors header; {AGAIN}")
            header = stream.read(length)
    except OSError as error:
        raise LoadError(
            f"{file} cannot be read ({error.strerror}); check its permissions and its disk."
        ) from error
    announced = _LENGTH.size + length
    if len(header) == length:
        announced += _data_length(file, header)
    if size < announced:
        raise LoadError(
            f"{file} is incomplete: it has {size} bytes of at least {announced}; {AGAIN}"
        )
    if size > announced:
        raise LoadError(f"{file} has {size} bytes where its header announces {announced}; {AGAIN}")


def _data_length(file: Path, header: bytes) -> int:
    """The length of the data after the header: the largest end of a tensor."""
    try:
        entries: dict[str, Any] = json.loads(header)
        spans = [entry["data_offsets"] for n, entry in entries.items() if n != "__metadata__"]
        if all(0 <= start <= end for start, end in spans):
            return int(max((end for _, end in spans), default=0))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LoadError(f"{file} has no valid safetensors header; {AGAIN}") from error
    raise LoadError(f"{file} has a safetensors header with impossible offsets; {AGAIN}")
