"""What the headers of safetensors files announce: names, types, shapes and where the bytes lie.

No torch, no SGLang; a header is JSON in front of the data.
"""

from __future__ import annotations

import gc
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from sglang_minimax.errors import LoadError
from sglang_minimax.loading.formats.base import Shape

AGAIN = "copy or download it again."
# What the safetensors library accepts.
LONGEST_HEADER = 100_000_000
_LENGTH = struct.Struct("<Q")

#: Bytes of one element, by the name of its type.
ITEM_BYTES: Mapping[str, int] = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


class Tensor(NamedTuple):
    """One announced tensor. offset: of its first byte in the file."""

    file: Path
    kind: str
    shape: Shape
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.kind]


@dataclass(slots=True)
class Headers:
    """The tensors of a checkpoint. repeated: (name, first file, second file) of those in two."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    repeated: list[tuple[str, Path, Path]] = field(default_factory=list)


@contextmanager
def without_collector() -> Iterator[None]:
    """Python's cyclic collector pauses: it would go through what is made again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@without_collector()
def read_headers(files: Iterable[Path]) -> Headers:
    """The headers of all files. Raises LoadError for one that is not whole or not safetensors."""
    headers = Headers()
    for file in files:
        for name, tensor in read_header(file).items():
            before = headers.tensors.get(name)
            if before is not None:
                headers.repeated.append((name, before.file, file))
            else:
                headers.tensors[name] = tensor
    return headers


def read_header(file: Path) -> dict[str, Tensor]:
    """name -> tensor of one file, in the order of the header. Raises LoadError."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(_LENGTH.size)
            if len(start) < _LENGTH.size:
                raise LoadError(f"{file} is incomplete: it has {size} bytes; {AGAIN}")
            (length,) = _LENGTH.unpack(start)
            if length > LONGEST_HEADER:
                raise LoadError(f"{file} has no valid safetensors header; {AGAIN}")
            text = stream.read(length)
    except OSError as error:
        raise LoadError(
            f"{file} cannot be read ({error.strerror}); check its permissions and its disk."
        ) from error
    data = _LENGTH.size + length
    tensors: dict[str, Tensor] = {}
    announced = data
    if len(text) == length:
        tensors, end = _parsed(file, text, data)
        announced += end
    if size < announced:
        raise LoadError(
            f"{file} is incomplete: it has {size} bytes of at least {announced}; {AGAIN}"
        )
    if size > announced:
        raise LoadError(f"{file} has {size} bytes where its header announces {announced}; {AGAIN}")
    return tensors


def _parsed(file: Path, text: bytes, data: int) -> tuple[dict[str, Tensor], int]:
    """The tensors of a header whose data begin at byte `data`, and where the last of them ends."""
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int]] = []
    try:
        entries: dict[str, Any] = orjson.loads(text)
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            kind, shape = entry["dtype"], tuple(entry["shape"])
            nbytes = ITEM_BYTES.get(kind)
            if nbytes is None:
                raise LoadError(f"{name} in {file} is {kind}, which no MiniMax-M2 has.")
            sound = type(start) is type(end) is int and start >= 0
            for size in shape:
                sound = sound and type(size) is int and size >= 0
                nbytes *= size
            if not sound or end - start != nbytes:
                raise LoadError(f"{file} has a safetensors header with impossible offsets; {AGAIN}")
            tensors[name] = Tensor(file, kind, shape, data + start)
            spans.append((start, end))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LoadError(f"{file} has no valid safetensors header; {AGAIN}") from error
    last = 0
    for start, end in sorted(spans):
        if start != last:  # a gap, or two tensors in one place
            raise LoadError(f"{file} has a safetensors header with impossible offsets; {AGAIN}")
        last = end
    return tensors, last
