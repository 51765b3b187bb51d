"""The values of the few small tensors that are looked at before a launch, by ranged reads."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sglang_minimax.errors import LoadError
from sglang_minimax.loading.headers import Tensor

#: numpy's names of the types that are read; BF16, which numpy does not have, as its bits.
_TYPES = {
    "BF16": "<u2",
    "F16": "<f2",
    "F32": "<f4",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
}


def read(tensor: Tensor) -> npt.NDArray[np.generic]:
    """The elements of `tensor`, flat and in order; BF16 as its bits in uint16.

    Raises LoadError for a file that cannot be read, or another type than those of norms and maps.
    """
    kind = _TYPES.get(tensor.kind)
    if kind is None:
        raise LoadError(
            f"a tensor of {tensor.file} is {tensor.kind}, expected one of {', '.join(_TYPES)}; "
            "convert the checkpoint again."
        )
    try:
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.offset)
            data = stream.read(tensor.nbytes)
    except OSError as error:
        raise LoadError(
            f"{tensor.file} cannot be read ({error.strerror}); check its permissions and its disk."
        ) from error
    if len(data) < tensor.nbytes:
        raise LoadError(f"{tensor.file} became shorter while it was read; copy it again.")
    return np.frombuffer(data, kind)


def as_bf16(tensor: Tensor) -> bytes:
    """The elements of `tensor` as BF16, little endian, rounded to nearest, ties to even.

    BF16 is taken as it is. Raises LoadError as `read`, and for integers.
    """
    values = read(tensor)
    if tensor.kind == "BF16":
        return values.tobytes()
    if tensor.kind not in ("F16", "F32"):
        raise LoadError(
            f"a norm of {tensor.file} is {tensor.kind}, expected BF16, F16 or F32; "
            "convert the checkpoint again."
        )
    bits = values.astype("<f4").view("<u4").astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return rounded.astype("<u2").tobytes()
