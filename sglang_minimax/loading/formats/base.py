"""What a quantisation format stores for one matrix: names, shapes, types, and how they are cut.

A matrix is [rows, columns], output by input, as `weight` of a Linear has it. Each tensor that a
format stores for it has axes that follow the rows or the columns, in units (a block, a group, a
packed word) or in single lines. From that, any rank's share of any tensor follows from its share of
the matrix. No torch, no SGLang.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]

ROWS, COLUMNS = "rows", "columns"

# Types as safetensors headers spell them.
FLOATS = frozenset({"F32", "F16", "BF16", "F64"})
SCALE_TYPES = frozenset({"F32", "F16", "BF16"})
INTEGERS = frozenset({"I64", "I32", "I16", "I8", "U8"})


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of a stored tensor.

    along: ROWS or COLUMNS of the matrix, None for a dimension of fixed `size`.
    per: lines of the matrix that one element covers.
    whole: every rank keeps all of it, though the matrix is cut here.
    """

    along: str | None = None
    per: int = 1
    size: int = 1
    whole: bool = False

    def extent(self, rows: int, columns: int) -> int:
        """The length of this dimension for a [rows, columns] matrix."""
        if self.along is None:
            return self.size
        return -(-(rows if self.along == ROWS else columns) // self.per)

    def part(self, lines: range, total: int) -> range:
        """The elements that cover `lines` of `total`; ValueError where an element would be cut."""
        if lines.start % self.per or (lines.stop % self.per and lines.stop != total):
            raise ValueError(f"lines {lines.start} to {lines.stop} cut an element of {self.per}")
        return range(lines.start // self.per, -(-lines.stop // self.per))


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One of the tensors that stand for a matrix.

    kind: the last part of its name. types: as headers spell them. scale: whether its values must
    be finite and above zero (`zero_ok`: or zero, where an all-zero group has scale zero). padding:
    what each element of a block that a rank has beyond its share is set to, so that it stands for
    zeros. optional: a checkpoint may lack it; the parameter then keeps the value that it was built
    with. shared: matrices that SGLang packs may have one parameter for it, such as the input scale
    of w1 and w3. equal: and must then have the same values, because SGLang keeps the last; without
    `shared` they must even where there is room for each, because a kernel uses one of them. only:
    the one value that its elements may have, because SGLang's kernels take it for granted; they
    need not read it. dimensions: its values are the rows and columns of the matrix, which no kernel
    reads. everywhere: every rank needs those of all experts, because kernels take the largest.
    """

    kind: str
    axes: tuple[Axis, ...]
    types: frozenset[str]
    scale: bool = False
    zero_ok: bool = False
    padding: float = 0
    optional: bool = False
    shared: bool = False
    equal: bool = False
    dimensions: bool = False
    only: int | None = None
    everywhere: bool = False

    @property
    def judged(self) -> bool:
        """Whether its values can be wrong in themselves, so that they are looked at."""
        return self.scale or self.dimensions or self.equal or self.only is not None

    def shape(self, rows: int, columns: int) -> Shape:
        """Its shape for a [rows, columns] matrix."""
        return tuple(axis.extent(rows, columns) for axis in self.axes)

    def accepts(self, shape: Shape, rows: int, columns: int) -> bool:
        """Whether `shape` is right; dimensions of one at the end may be there or not."""
        return _stripped(shape) == _stripped(self.shape(rows, columns))


def _stripped(shape: Shape) -> Shape:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


@dataclass(frozen=True, slots=True)
class Format:
    """How one matrix is stored.

    name: short, stable. title: for people. made: kinds of parameters that SGLang builds with a
    loader, but fills itself after loading; no checkpoint has tensors for them.
    """

    name: str
    title: str
    tensors: tuple[StoredTensor, ...]
    made: frozenset[str] = frozenset()

    def tensor(self, kind: str) -> StoredTensor | None:
        """The stored tensor of that kind, None where the format has none."""
        return next((tensor for tensor in self.tensors if tensor.kind == kind), None)

    def unit(self, along: str) -> int:
        """Lines of the matrix that must stay together when it is cut along ROWS or COLUMNS."""
        axes = (axis for tensor in self.tensors for axis in tensor.axes)
        return math.lcm(*(axis.per for axis in axes if axis.along == along and not axis.whole))

    @property
    def expert_unit(self) -> int:
        """Lines of an expert's width that stay together: rows of w1 and w3, columns of w2."""
        return math.lcm(self.unit(ROWS), self.unit(COLUMNS))


PLAIN = Format(
    "plain",
    "BF16, FP16 or FP32",
    (StoredTensor("weight", (Axis(ROWS), Axis(COLUMNS)), FLOATS),),
)


@dataclass(frozen=True, slots=True)
class Names:
    """A list of module names in the spelling of one tool, and whether a module is on it.

    style: `exact` (a module or anything inside it), `regex` (`re:` marks expressions from the start
    of a name, the rest are names or their last parts).
    """

    entries: tuple[str, ...] = ()
    style: str = "exact"

    def __contains__(self, module: object) -> bool:
        return any(self._matches(entry, str(module)) for entry in self.entries)

    def _matches(self, entry: str, module: str) -> bool:
        if self.style == "regex":
            # Parents of quantised modules are listed too: the name must end so.
            if entry.startswith("re:"):
                return re.match(entry[3:], module) is not None
            return f".{module}".endswith(f".{entry}")
        # Config lists leave the prefix out at times: "lm_head", "gate", "self_attn".
        return f".{entry}." in f".{module}."


@dataclass(frozen=True, slots=True)
class Kernel:
    """One of SGLang's expert kernels for a format.

    hardware: `cuda`, `rocm` or `ascend`. name: as SGLang calls the runner. since, until: compute
    capability times ten, both included. source: the file of SGLang that decides. method: the
    --quantization without which SGLang does not choose it, None where it needs none.
    """

    hardware: str
    name: str
    source: str
    since: int = 0
    until: int = 999
    method: str | None = None

    def runs_on(self, hardware: str, capability: int | None) -> bool:
        """Whether it serves this hardware; an unknown capability is given the benefit of doubt."""
        fits = capability is None or self.since <= capability <= self.until
        return hardware == self.hardware and fits

    def __str__(self) -> str:
        """For a sentence: the hardware and, where it is not all of it, which."""
        if not self.since:
            return self.hardware
        until = "" if self.until == 999 else f" to {self.until / 10:.1f}"
        return f"{self.hardware} {self.since / 10:.1f}{until or ' and later'}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a checkpoint's quantisation config says: which matrices are stored how.

    name: short and stable. method: SGLang's name for it before it picks a kernel, None for plain
    weights. quantised: the format of matrices; those named in `plain` are stored as they are.
    kernels: SGLang's, for experts. cut_experts: why an expert's width cannot be shared by ranks, as
    a clause; None where it can.
    """

    name: str
    method: str | None
    quantised: Format
    plain: Names = Names()
    kernels: tuple[Kernel, ...] = ()
    cut_experts: str | None = None

    def format_of(self, module: str) -> Format:
        """The format of a module under its published name.

        module: such as model.layers.0.self_attn.q_proj, or ...block_sparse_moe.experts for all
        experts of a layer, of which SGLang makes one module.
        """
        return PLAIN if any(name in self.plain for name in _spellings(module)) else self.quantised


def _spellings(module: str) -> tuple[str, ...]:
    """The names under which tools and SGLang list a module, its own first."""
    parent, _, last = module.rpartition(".")
    if last in ("q_proj", "k_proj", "v_proj"):
        return module, f"{parent}.qkv_proj"
    if last == "experts":
        return module, f"{module}.0.w1"
    return (module,)


UNQUANTISED = Recipe("plain", None, PLAIN)

#: Reads a parsed quantisation config; None where it is another format's. Raises ConfigError.
ReadRecipe = Callable[[Mapping[str, Any]], Recipe | None]
