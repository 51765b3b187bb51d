"""Which model a checkpoint is, whatever it is quantised to: a fingerprint of its norms.

A draft is trained on the residual stream of one target. All variants of a model have the same
stream up to rounding, so the fingerprint must be equal for BF16, FP8, NVFP4, INT4 and so on. It is
taken of the last norm and of the norms of queries and keys. Quantisers keep these as they are. The
norms before attention and experts are left out: AWQ and SmoothQuant divide them by the factors with
which they multiply the matrices that follow. For the published shape that is 125 reads of 895 kB in
all, beside the headers.

Two models with equal norms have equal fingerprints. A fine-tuning that moves no norm by a step of
BF16 is such a model, and a draft of the one will do for the other.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from sglang_minimax.drafts.values import as_bf16
from sglang_minimax.errors import LoadError
from sglang_minimax.loading.files import architecture_of, weight_files
from sglang_minimax.loading.headers import Headers, Tensor, read_headers
from sglang_minimax.loading.names import TensorName, parse, spell

#: Hexadecimal digits of a fingerprint: 64 bits.
DIGITS = 16
# Another choice of tensors or another form gets another number, and so other fingerprints.
_FORM = b"minimax-m2 norms 1"
_IN_LAYER = ("q_norm", "k_norm")


def fingerprint(folder: Path) -> str:
    """DIGITS hexadecimal digits for the model in `folder`, a local checkpoint of any format.

    sha256 over name, shape and BF16 values of each norm, last norm first, then layer by layer.
    Wider types are rounded to BF16, to nearest and ties to even, so that a copy of a BF16 model in
    fp32 or fp16 has the same fingerprint. Raises MinimaxError, in one sentence, for a folder
    without config.json or weights, a norm that is missing or stored twice, and a file that is not
    whole.
    """
    arch = architecture_of(folder)
    if arch is None:
        raise LoadError(f"{folder} has no config.json; check the path of the model.")
    return fingerprint_of(read_headers(weight_files(folder)), arch.num_layers, str(folder))


def fingerprint_of(headers: Headers, num_layers: int, where: str) -> str:
    """The fingerprint of the checkpoint with these headers; `where` is for messages.

    Raises LoadError.
    """
    found = _norms(headers, where)
    digest = hashlib.sha256(_FORM)
    for record in _wanted(num_layers):
        tensor = found.get(record)
        if tensor is None:
            raise LoadError(
                f"{where} has no {spell(record)}, which tells models apart; download it again, or "
                "correct num_hidden_layers in config.json."
            )
        shape = "x".join(map(str, tensor.shape))
        digest.update(f"\n{spell(record)} {shape}\n".encode())
        digest.update(as_bf16(tensor))
    return digest.hexdigest()[:DIGITS]


def _wanted(num_layers: int) -> list[TensorName]:
    """The norms of the fingerprint, in its order."""
    layers = range(num_layers)
    inside = [TensorName(layer, module, "weight") for layer in layers for module in _IN_LAYER]
    return [TensorName(None, "norm", "weight"), *inside]


def _norms(headers: Headers, where: str) -> dict[TensorName, Tensor]:
    """The norms that may be wanted, under one name whatever the checkpoint calls them."""
    found: dict[TensorName, Tensor] = {}
    for name, tensor in headers.tensors.items():
        if "norm" not in name:  # most are of experts
            continue
        record = parse(name)
        if record is None or record.kind != "weight" or record.module not in ("norm", *_IN_LAYER):
            continue
        if record in found:
            raise LoadError(
                f"{where} has {spell(record)} under two names; remove one of them or download it "
                "again."
            )
        found[record] = tensor
    return found
