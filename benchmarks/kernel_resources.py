"""What the compiled attention prologue takes of a multiprocessor: registers, spills, shared memory.

  python -m benchmarks.kernel_resources

Needs nvcc and no GPU: ptxas reports it for each architecture. Writes results/kernel_resources.json.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import write
from jit_kernels.compile import Resources, Unit, architecture, resources
from jit_kernels.qk_norm_rope.contract import Request
from jit_kernels.qk_norm_rope.cuda import shape_arguments

CAPABILITIES = ((8, 0), (9, 0), (10, 0))
REGISTERS = 65536  # of a multiprocessor
# Threads of a multiprocessor that the kernel is written for (csrc/heads.cuh, kBlocks): each has 16
# to 32 bytes of the next token under way while it works on this one.
RESIDENT_THREADS = 1024
REGISTER_BUDGET = REGISTERS // RESIDENT_THREADS


@dataclass(frozen=True, slots=True)
class Shape:
    """A kernel: what it is called in the table, and its request less the capability."""

    name: str
    q_heads: int
    kv_heads: int
    group_size: int
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype | None = torch.bfloat16
    virtual: bool = False

    def request(self, capability: tuple[int, int]) -> Request:
        return Request(
            device="cuda",
            dtype=self.dtype,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=128,
            rotary_dim=64,
            cache_dtype=self.cache_dtype,
            group_size=self.group_size,
            capability=capability,
        )


SHAPES = (
    Shape("TP1", 48, 8, 1),
    Shape("TP1, e4m3 cache", 48, 8, 1, cache_dtype=torch.float8_e4m3fn),
    Shape("TP2, e5m2 cache", 24, 4, 2, cache_dtype=torch.float8_e5m2),
    Shape("TP8", 6, 1, 8),
    Shape("TP16, fp16", 3, 1, 16, torch.float16, torch.float16),
    Shape("12/3 heads, TP3", 4, 1, 3),
    Shape("12/3 heads, TP6", 2, 1, 6),
    Shape("TP8, virtual ranks", 6, 1, 8, virtual=True),
)


def measure(shape: Shape, capability: tuple[int, int]) -> Resources:
    """Compile one kernel alone and return what ptxas reports."""
    arguments = shape_arguments(shape.request(capability), virtual=shape.virtual)
    text = (
        '#include "qk_norm_rope/csrc/kernel.cuh"\n'
        f"using Shape = qk_norm_rope::Shape<{arguments}>;\n"
        "template __global__ void qk_norm_rope::prologue<Shape>("
        "const __grid_constant__ qk_norm_rope::Params);\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        return resources(Unit("prologue", text, architecture(capability)), Path(folder))


def table() -> Iterator[dict[str, Any]]:
    """One row for each shape and architecture."""
    for capability in CAPABILITIES:
        for shape in SHAPES:
            found = measure(shape, capability)
            yield {
                "arch": f"sm_{architecture(capability)}",
                "shape": shape.name,
                "registers": found.registers,
                "spill_bytes": found.spill_bytes,
                "shared_bytes": found.shared_bytes,
            }


def main() -> None:
    """Print the table and write the results."""
    print(f"{'arch':<8} {'shape':<20} {'registers':>9} {'spills, B':>9} {'shared, B':>9}")
    rows = []
    for row in table():
        rows.append(row)
        print(
            f"{row['arch']:<8} {row['shape']:<20} {row['registers']:>9} "
            f"{row['spill_bytes']:>9} {row['shared_bytes']:>9}"
        )
    print(write("kernel_resources", rows, register_budget=REGISTER_BUDGET))


if __name__ == "__main__":
    main()
