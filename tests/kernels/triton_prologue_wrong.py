"""Plausible mistakes planted in the Triton prologue, each of which must be caught.

Run by `test_triton_prologue`, as `triton_prologue_cases` is, and interpreted only.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from jit_kernels.qk_norm_rope import triton as implementation
from jit_kernels.qk_norm_rope import triton_kernels
from tests.kernels import cases, triton_prologue_cases
from tests.kernels.triton_prologue_cases import (
    BF16,
    E4M3,
    INTERPRETED,
    far_rows_agree,
    fp8_is_right,
    fp8_kernel,
    fp8_share,
    quick_interpreter,  # noqa: F401, a fixture that every test here uses
    verify,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on NaN and infinity


def notices(module: ModuleType) -> bool:
    """Whether any of a few cases fails: one rank with pages, FP8, a group with replicas."""
    for heads, size, cache in (((3, 1), 1, BF16), ((3, 1), 1, E4M3), ((4, 2), 4, None)):
        case = cases.make_case(5, heads=heads, cache_dtype=cache, page_size=16)
        try:
            verify(case.with_rows(cases.SPECIALS), size, module)
        except AssertionError:
            return True
    return False


@dataclass(frozen=True)
class Wrong:
    """A plausible mistake: text of a module (there exactly once), what takes its place, a judge."""

    name: str
    module: ModuleType
    text: str
    instead: str
    caught: Callable[[ModuleType], bool] = notices


KERNELS = triton_kernels
WRONG = (
    Wrong(
        "local variance only", implementation, "sums = call.group.reduce(sums).contiguous()", "pass"
    ),
    Wrong(
        "eps on the sum",
        KERNELS,
        "tl.div_rn(square_sum, divisor) + eps",
        "tl.div_rn(square_sum + eps, divisor)",
    ),
    # 4 ranks and 2 KV heads: each counts twice.
    Wrong(
        "replicas not counted",
        implementation,
        "float(norm.k_divisor)",
        "float(norm.k_divisor // 2)",
    ),
    Wrong("padding counted", KERNELS, "mask=real, other=0.0", "mask=real, other=1.0"),
    Wrong(
        "wrong half in q",
        KERNELS,
        "_store(q_row, q_pair, q_pair_real, a * cos - b * sin)",
        "_store(q_row, q_pair, q_pair_real, b * cos - a * sin)",
    ),
    Wrong(
        "wrong half in k",
        KERNELS,
        "_store(k_row + HALF, k_pair, k_pair_real, y)",
        "_store(k_row + HALF, k_pair, k_pair_real, x)",
    ),
    Wrong("cosine for sine", KERNELS, "sin = _load(angles + HALF,", "sin = _load(angles,"),
    Wrong(
        "store, then reload in place",
        KERNELS,
        "_store(q_row + HALF, q_pair, q_pair_real, b * cos + a * sin)",
        "a = _scaled(_load(q_row, q_pair, q_pair_real), q_inverse, wq_a)\n"
        "        _store(q_row + HALF, q_pair, q_pair_real, b * cos + a * sin)",
    ),
    Wrong(
        "cache from the rounded k",
        KERNELS,
        "_store_cached(k_slot, k_pair, real, x,",
        "_store_cached(k_slot, k_pair, real, x.to(k.dtype.element_ty).to(tl.float32),",
        lambda module: fp8_share(module) < 0.999,
    ),
    Wrong("cache from k before the norm", KERNELS, "real, c, k_scale", "real, k_c, k_scale"),
    # 5 tokens: `cases.cache_slots` gives 48 slots.
    Wrong(
        "slot -1 written",
        KERNELS,
        "written = slot >= first_slot",
        "written = slot >= -1\n        slot = tl.where(slot < 0, 47, slot)",
    ),
    Wrong("slot 0 written", KERNELS, "slot >= first_slot", "slot >= 0"),
    Wrong(
        "pages taken for dense",
        KERNELS,
        "slot // PAGE_SIZE * page_stride",
        "slot // PAGE_SIZE * slot_stride * PAGE_SIZE",
    ),
    Wrong(
        "not saturated",
        KERNELS,
        "tl.minimum(size, LARGEST)",
        "size",
        lambda module: not fp8_is_right(fp8_kernel, E4M3, 1.0),
    ),
    Wrong(
        "half rounded up",
        KERNELS,
        "odd = (saturated >> SHIFT) & 1",
        "odd = 1",
        lambda module: not fp8_is_right(fp8_kernel, E4M3, 1.0),
    ),
    *(
        Wrong(
            f"32-bit offset of {name}",
            KERNELS,
            text,
            instead,
            lambda module: not far_rows_agree(module),
        )
        for name, text, instead in (
            ("q", "q_row = q + token * q_stride", "q_row = q + token.to(tl.int32) * q_stride"),
            ("q's sum", "_load(q + token * q_stride,", "_load(q + token.to(tl.int32) * q_stride,"),
            ("k's sum", "_load(k + token * k_stride,", "_load(k + token.to(tl.int32) * k_stride,"),
            ("k", "k_row = k + token * k_stride", "k_row = k + token.to(tl.int32) * k_stride"),
            ("v", "v + token * v_stride", "v + token.to(tl.int32) * v_stride"),
            (
                "slots",
                "slot = tl.load(slots + token).to(tl.int64)",
                "slot = tl.load(slots + token).to(tl.int32)",
            ),
        )
    ),
)


@pytest.mark.skipif(not INTERPRETED, reason="wrong kernels run interpreted only")
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_a_plausible_mistake_is_caught(wrong, tmp_path, monkeypatch):
    source = Path(wrong.module.__file__).read_text()
    assert source.count(wrong.text) == 1, "the text has moved"
    # From a file, since Triton reads the source of a kernel.
    path = tmp_path / "wrong.py"
    path.write_text(source.replace(wrong.text, wrong.instead))
    spec = importlib.util.spec_from_file_location(f"wrong_{tmp_path.name}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    if wrong.module is KERNELS:
        monkeypatch.setitem(sys.modules, KERNELS.__name__, module)
        monkeypatch.setattr(triton_prologue_cases, "_fp8_bits", module._fp8_bits)
        module = implementation
    assert wrong.caught(module)


def test_the_cases_that_catch_mistakes_pass_without_one():
    assert not notices(implementation)
