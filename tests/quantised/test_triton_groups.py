"""FP8 groups against SGLang's own Triton kernels, interpreted on the CPU.

On a CUDA device SGLang's Triton runner of experts calls the CUDA kernel of
per_token_group_quant.cuh; these are its twins for other devices. What they do otherwise:
`_per_token_group_quant_8bit` divides by 448 and multiplies rows by 1 / scale, where the CUDA kernel
multiplies by 1/448 and by 448 / largest. Both are exact, and so the same, where the largest value
is 448 times a power of two; elsewhere they are up to two units in the last place apart, and a value
that comes halfway between two codes may get the neighbouring one. With UE8M0 rows are multiplied by
a power of two, which is exact in both: only `largest / 448` and `largest * (1/448)` may differ.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jit_kernels.row_quant import reference
from jit_kernels.row_quant.reference import ScaleRule

HERE = Path(__file__).parent
ROWS, COLUMNS = 24, 256
#: Rows below this have groups whose largest value is 448 times a power of two.
EXACT = 16

Kernel = tuple[torch.Tensor, torch.Tensor]


def rows() -> torch.Tensor:
    """Ties, zeros, subnormal codes and signs, in groups of every size of scale."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(ROWS, COLUMNS, generator=generator)
    x[:EXACT] = (x[:EXACT] * 100).clamp(-440, 440)
    halves = torch.tensor([17.0, -19, 21, 1.0625, 2**-10, -(3 * 2**-10), 1.1875, -440, 0, 1e-6])
    x[:EXACT, 1:11] = x[:EXACT, 129:139] = halves
    x[:EXACT, ::128] = 448
    x[:EXACT] *= 2.0 ** torch.arange(-EXACT // 2, EXACT // 2)[:, None]
    x[EXACT, :128] = 0
    return x


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kernel]:
    """What each kernel makes of `rows()`: values that FP8 would hold, and scales."""
    folder = tmp_path_factory.mktemp("triton")
    torch.save(rows(), folder / "rows")
    files = (HERE / "triton_groups.py", folder / "rows", folder / "made")
    command = [sys.executable, *map(str, files)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "made")


def codes_of(values: torch.Tensor) -> torch.Tensor:
    """As the hardware rounds them: to nearest, ties to even."""
    return values.to(torch.float8_e4m3fn).view(torch.uint8)


def same(rule: ScaleRule, made: Kernel, part: slice) -> bool:
    """Whether our codes and scales are those of the kernel, bit for bit, in some of the rows."""
    codes, scales = reference.fp8_groups(rows()[part], scales=rule)
    if rule is ScaleRule.UE8M0:
        scales = 2.0 ** (scales.float() - 127)
    values, factors = made
    return torch.equal(codes.view(torch.uint8), codes_of(values[part])) and torch.equal(
        scales, factors[part]
    )


def test_fp32_scales(kernels: dict[str, Kernel]) -> None:
    assert same(ScaleRule.FP32, kernels["fp32"], slice(EXACT))
    values, factors = kernels["fp32"]
    codes, scales = reference.fp8_groups(rows())
    assert torch.allclose(scales, factors, rtol=2**-22, atol=0)
    assert ((codes.view(torch.uint8).int() - codes_of(values).int()).abs() <= 1).all()


def test_ue8m0_scales(kernels: dict[str, Kernel]) -> None:
    """In all rows: none has a largest value within a unit of 448 times a power of two but at it."""
    assert same(ScaleRule.UE8M0, kernels["ue8m0"], slice(None))


def _shifted(rounded: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda values: rounded(values * (1 + 2.0**-22))


WRONG = [
    *((rule, what) for rule in ScaleRule for what in ("halfway upwards", "another largest")),
    (ScaleRule.UE8M0, "another power of two"),
]


@pytest.mark.parametrize(("rule", "wrong"), WRONG)
def test_a_difference_is_noticed(
    rule: ScaleRule, wrong: str, kernels: dict[str, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong == "halfway upwards":
        monkeypatch.setattr(reference, "_to_fp8", _shifted(reference._to_fp8))
    elif wrong == "another largest":
        monkeypatch.setattr(reference, "FP8_MAX_INVERSE", 1 / 447)
    else:
        exponents = reference._exponents_above
        monkeypatch.setattr(reference, "_exponents_above", lambda factors: exponents(factors) - 1)
    assert not same(rule, kernels[rule], slice(EXACT))
