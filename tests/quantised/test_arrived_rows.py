"""Experts whose rows come quantised, from a dispatcher, against the same rows in plain form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from jit_kernels.row_quant import reference
from jit_kernels.row_quant.reference import ScaleRule
from sglang_minimax.platforms import choice
from sglang_minimax.platforms.cpu.quantised import activations, intercept
from tests.quantised import layers, matrices
from tests.quantised.cases import CASES
from tests.quantised.layers import HIDDEN, TOKENS, Filled, as_rank, choices, inputs, run_experts

pytestmark = pytest.mark.skipif(not choice.cpu_platform_chosen(), reason="a GPU is present")

BLOCK_FP8 = ("fp8 blocks", "compressed fp8 blocks")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@pytest.fixture(scope="module", autouse=True)
def launched() -> Iterator[None]:
    with layers.published():
        yield


@pytest.fixture(scope="module")
def experts() -> Callable[[str], Filled]:
    """A filled layer of each format, made once; tests leave it as it was."""
    made: dict[str, Filled] = {}

    def of(name: str) -> Filled:
        if name not in made:
            with as_rank(0, 1):
                made[name] = Filled(CASES[name], "experts", 0, 1)
        return made[name]

    return of


def rows(dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different sizes, which share no scale."""
    return (inputs(HIDDEN) * torch.tensor([0.1, 0.001, 1, 1, 0.3, 0.02])[:, None]).to(dtype)


def as_fp8(x: torch.Tensor) -> dict[str, Any]:
    """What a dispatcher hands over: a tensor that only has a shape, and codes, padded to fours."""
    codes, scales = reference.fp8_groups(x)
    more = -len(codes) % 4
    codes = torch.cat([codes, torch.full((more, HIDDEN), torch.nan).to(codes.dtype)])
    scales = torch.cat([scales, torch.full((more, scales.shape[1]), torch.nan)])
    return {"x": torch.full_like(x, torch.nan), "hidden_states_pre_quant": (codes, scales)}


def as_fp4(x: torch.Tensor, layer: Any) -> dict[str, Any]:
    """By the largest of the input scales, as modelopt_quant.py makes `input_global_scale`."""
    codes, scales = reference.fp4_blocks(x, 1 / layer.w13_input_scale.max())
    return {"x": codes, "hidden_states_scale": scales}


def agrees(filled: Filled, x: torch.Tensor, arrived: dict[str, Any]) -> bool:
    """Whether rows give the same bits quantised as plain."""
    plain = run_experts(filled.layer, x, choices())
    found = run_experts(filled.layer, chosen=choices(), **arrived)
    assert plain.isfinite().all()
    assert plain.abs().max() > 0
    return found.dtype == x.dtype and torch.equal(found, plain)


@DTYPES
@pytest.mark.parametrize("name", BLOCK_FP8)
def test_fp8_rows(name: str, dtype: torch.dtype, experts: Callable[[str], Filled]) -> None:
    x = rows(dtype)
    assert agrees(experts(name), x, as_fp8(x))


@DTYPES
def test_fp4_rows(
    dtype: torch.dtype, experts: Callable[[str], Filled], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the dtype that the layer was built for: the codes have none. Experts' scales differ."""
    filled, x = experts("nvfp4"), rows(dtype)
    monkeypatch.setattr(filled.layer, "params_dtype", dtype)
    scales = filled.layer.w13_input_scale.data
    monkeypatch.setattr(
        filled.layer.w13_input_scale,
        "data",
        torch.linspace(0.002, 0.02, scales.numel()).view(scales.shape),
    )
    assert agrees(filled, x, as_fp4(x, filled.layer))


def test_no_rows(experts: Callable[[str], Filled]) -> None:
    x = torch.zeros(0, HIDDEN, dtype=torch.bfloat16)
    chosen = type(choices())(*(part[:0] for part in choices()))
    fp4 = experts("nvfp4").layer
    for layer, arrived in (
        (experts("fp8 blocks").layer, as_fp8(x)),
        (fp4, as_fp4(x, fp4)),
        (fp4, {"x": x}),
    ):
        found = run_experts(layer, chosen=chosen, **arrived)
        assert (found.shape, found.dtype) == (x.shape, x.dtype)


# --- rows that no rounding would have made: what arrives is what is multiplied --------------------


def drawn_fp8(rule: ScaleRule) -> tuple[dict[str, Any], torch.Tensor]:
    """Random codes far below the largest, and random scales; and their values."""
    draw = matrices.Draw(3)
    codes = (draw.fp8(TOKENS, HIDDEN).float() / 4).to(torch.float8_e4m3fn)
    scales = draw.scales(TOKENS, 2)
    factors = scales
    if rule is ScaleRule.UE8M0:
        scales = draw.integers(118, 124, TOKENS, 2).to(torch.uint8)
        factors = 2.0 ** (scales.float() - 127)
    x = torch.full((TOKENS, HIDDEN), torch.nan)
    values = codes.float() * matrices.spread(factors, 1, 128)
    return {"x": x, "hidden_states_pre_quant": (codes, scales)}, values


def drawn_fp4() -> tuple[dict[str, Any], torch.Tensor]:
    """The same in FP4, with the input scale of `matrices.nvfp4`."""
    draw = matrices.Draw(3)
    codes = draw.integers(0, 6, TOKENS, HIDDEN) + 8 * draw.integers(0, 2, TOKENS, HIDDEN)
    scales = draw.fp8(TOKENS, HIDDEN // 16).float().abs().to(torch.float8_e4m3fn)
    values = matrices.E2M1[codes] * matrices.spread(scales, 1, 16) * 0.01
    packed = matrices.packed(codes, 1, width=8)
    return {"x": packed, "hidden_states_scale": scales.view(torch.uint8)}, values


DRAWN = {
    "fp8": ("fp8 blocks", lambda: drawn_fp8(ScaleRule.FP32)),
    "fp8 ue8m0": ("fp8 blocks", lambda: drawn_fp8(ScaleRule.UE8M0)),
    "fp4": ("nvfp4", drawn_fp4),
}


def multiplies_what_arrived(form: str, experts: Callable[[str], Filled]) -> bool:
    name, draw = DRAWN[form]
    filled, (arrived, first) = experts(name), draw()
    found = run_experts(filled.layer, chosen=choices(), **arrived)
    weights, ids, _ = choices()
    expected = layers.dense(first, filled.weights, ids, weights, CASES[name].experts, first)
    return layers.close(found, expected)


@pytest.fixture
def fp32(experts: Callable[[str], Filled], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in FP4 are multiplied in fp32, to be compared with a dense product."""
    monkeypatch.setattr(experts("nvfp4").layer, "params_dtype", torch.float32)


@pytest.mark.usefixtures("fp32")
@pytest.mark.parametrize("form", DRAWN)
def test_what_arrives_is_multiplied(form: str, experts: Callable[[str], Filled]) -> None:
    assert multiplies_what_arrived(form, experts)


def _rounded_again(codes: torch.Tensor, scales: torch.Tensor, *factor: Any) -> torch.Tensor:
    if factor:
        return activations.fp4_blocks(reference.fp4_rows(codes, scales, *factor), *factor)
    return activations.fp8_groups(reference.fp8_rows(codes, scales), 128)


def _other_order(codes: torch.Tensor, scales: torch.Tensor, *factor: Any) -> torch.Tensor:
    decode = reference.fp4_rows if factor else reference.fp8_rows
    return decode(codes, scales.roll(1, 0), *factor)


def _without_scales(codes: torch.Tensor, scales: torch.Tensor, *factor: Any) -> torch.Tensor:
    decode = reference.fp4_rows if factor else reference.fp8_rows
    one = 0x38 if factor else 127 if scales.dtype == torch.uint8 else 1
    return decode(codes, torch.full_like(scales, one), *factor)


@pytest.mark.usefixtures("fp32")
@pytest.mark.parametrize("form", DRAWN)
@pytest.mark.parametrize("wrong", [_rounded_again, _other_order, _without_scales])
def test_a_wrong_reading_is_noticed(
    form: str,
    wrong: Callable[..., torch.Tensor],
    experts: Callable[[str], Filled],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intercept, "fp4_rows" if form == "fp4" else "fp8_rows", wrong)
    assert not multiplies_what_arrived(form, experts)


def test_another_global_scale_is_noticed(
    experts: Callable[[str], Filled], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the rank's first expert instead of the largest of all."""
    filled, x = experts("nvfp4"), rows(torch.bfloat16)
    scales = filled.layer.w13_input_scale.data
    different = torch.linspace(0.002, 0.02, scales.numel()).view(scales.shape)
    monkeypatch.setattr(filled.layer.w13_input_scale, "data", different)
    arrived = as_fp4(x, filled.layer)
    plain = run_experts(filled.layer, x, choices())
    monkeypatch.setattr(intercept, "input_global_scale", lambda _: 1 / different[0, 0])
    assert not torch.equal(run_experts(filled.layer, chosen=choices(), **arrived), plain)
