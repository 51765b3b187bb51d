"""Dequantisation of each format, against arithmetic on the codes that were packed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sglang_minimax.platforms.cpu.quantised import dequantise
from tests.quantised import matrices
from tests.quantised.matrices import Draw, State, packed

OUT, COLUMNS, GROUP = 64, 256, 128
Weight = Callable[[State], torch.Tensor]

CASES: dict[str, tuple[Callable[..., matrices.Stored], Weight]] = {
    "fp8 blocks": (
        matrices.fp8_blocks,
        lambda t: dequantise.in_blocks(t["weight"], t["weight_scale_inv"], (128, 128)),
    ),
    "fp8 channels": (
        lambda *a: matrices.channels(*a, integer=False),
        lambda t: dequantise.scaled(t["weight"], t["weight_scale"]),
    ),
    "int8 channels": (
        lambda *a: matrices.channels(*a, integer=True),
        lambda t: dequantise.scaled(t["weight"], t["weight_scale"]),
    ),
    "compressed": (
        matrices.compressed,
        lambda t: dequantise.compressed(t["weight_packed"], t["weight_scale"]),
    ),
    "compressed, zero points": (
        lambda *a: matrices.compressed(*a, zeros=True),
        lambda t: dequantise.compressed(
            t["weight_packed"], t["weight_scale"], t["weight_zero_point"]
        ),
    ),
    "compressed, act-order": (
        lambda *a: matrices.compressed(*a, zeros=True, ordered=True),
        lambda t: dequantise.compressed(
            t["weight_packed"], t["weight_scale"], t["weight_zero_point"], t["weight_g_idx"]
        ),
    ),
    "awq": (matrices.awq, lambda t: dequantise.awq(t["qweight"], t["qzeros"], t["scales"])),
    "gptq": (
        matrices.gptq,
        lambda t: dequantise.gptq(t["qweight"], t["scales"], GROUP),
    ),
    "gptq, act-order": (
        lambda *a: matrices.gptq(*a, ordered=True),
        lambda t: dequantise.gptq(t["qweight"], t["scales"], GROUP, t["g_idx"]),
    ),
    "nvfp4": (
        matrices.nvfp4,
        lambda t: dequantise.nvfp4(t["weight"], t["weight_scale"], t["weight_scale_2"]),
    ),
    "mxfp4": (matrices.mxfp4, lambda t: dequantise.mxfp4(t["weight"], t["weight_scale"])),
    "modelslim": (
        matrices.modelslim,
        lambda t: dequantise.scaled(t["weight"], t["weight_scale"], t["weight_offset"]),
    ),
}
EVERY = pytest.mark.parametrize(("make", "ours"), CASES.values(), ids=CASES)


@EVERY
def test_formula(make: Callable[..., matrices.Stored], ours: Weight) -> None:
    state, weight = make(Draw(), OUT, COLUMNS)
    found = ours(state)
    assert found.dtype == torch.float32
    assert torch.equal(found, weight)


@EVERY
def test_experts(make: Callable[..., matrices.Stored], ours: Weight) -> None:
    """With a dimension of experts in front, each is what it is alone."""
    several = [make(Draw(seed), OUT, COLUMNS) for seed in range(3)]
    stacked = {name: torch.stack([s[name] for s, _ in several]) for name in several[0][0]}
    if "weight_scale_2" in stacked:
        stacked["weight_scale_2"] = stacked["weight_scale_2"].view(-1, 1, 1)
    assert torch.equal(ours(stacked), torch.stack([weight for _, weight in several]))


def test_scales_of_fused_matrices() -> None:
    found = dequantise.of_parts(torch.tensor([[1.0, 2, 3], [4, 5, 6]]), [2, 1, 1])
    assert found[..., 0].tolist() == [[1, 1, 2, 3], [4, 4, 5, 6]]


def test_cut_blocks() -> None:
    """A matrix may end inside a block."""
    state, weight = matrices.fp8_blocks(Draw(), 200, 130)
    found = dequantise.in_blocks(state["weight"], state["weight_scale_inv"], (128, 128))
    assert torch.equal(found, weight)


def test_padding_is_zero() -> None:
    """A block of zeros with scale one, as the loader fills what the checkpoint does not."""
    zeros = torch.zeros(128, 256).to(torch.float8_e4m3fn)
    assert not dequantise.in_blocks(zeros, torch.ones(1, 2), (128, 128)).any()


def test_gptq_takes_the_leading_groups() -> None:
    """SGLang gives experts as many rows of scales as all ranks have, the rank's in front."""
    state, weight = matrices.gptq(Draw(), OUT, COLUMNS)
    more = torch.cat([state["scales"], torch.zeros_like(state["scales"])])
    assert torch.equal(dequantise.gptq(state["qweight"], more, GROUP), weight)


def test_gptq_of_one_group() -> None:
    values, scale = Draw().integers(0, 16, COLUMNS, OUT), Draw(1).scales(1, OUT)
    found = dequantise.gptq(packed(values, 0), scale.half(), -1)
    assert torch.equal(found, ((values - 8) * scale).t())


def test_eight_bits() -> None:
    """compressed-tensors and GPTQ with four values a word; bytes are their own packing."""
    values = Draw().integers(-128, 128, OUT, COLUMNS)
    stored = (values + 128).to(torch.uint8)
    scale = Draw(1).scales(OUT, COLUMNS // GROUP)
    weight = values * scale.repeat_interleave(GROUP, 1)
    assert torch.equal(dequantise.compressed(stored.view(torch.int32), scale, bits=8), weight)
    rows = stored.view(torch.int32).t().contiguous()  # a word of four columns a row
    assert torch.equal(dequantise.gptq(rows, scale.t(), GROUP, bits=8), weight)


@pytest.mark.parametrize("zeros", [True, False])
def test_moe_wna16(zeros: bool) -> None:
    """What SGLang's conversion of AWQ and GPTQ experts holds."""
    draw = Draw()
    values, scale = draw.integers(0, 16, OUT, COLUMNS), draw.scales(OUT, COLUMNS // 32)
    zero = draw.integers(0, 16, OUT, COLUMNS // 32) if zeros else torch.full_like(scale, 8).long()
    found = dequantise.moe_wna16(
        packed(values, 1, width=8), scale, packed(zero, 0, width=8) if zeros else None
    )
    expected = (values - zero.repeat_interleave(32, 1)) * scale.repeat_interleave(32, 1)
    assert torch.equal(found, expected)


def test_nvfp4_as_sglang_dequantises() -> None:
    sglang = pytest.importorskip("sglang.srt.layers.quantization.dequantization")
    state, _ = matrices.nvfp4(Draw(), OUT, COLUMNS)
    tensors = (state["weight"], state["weight_scale"], state["weight_scale_2"])
    expected = sglang.dequantize_nvfp4(*tensors, torch.float32)
    assert torch.equal(dequantise.nvfp4(*tensors), expected)


def test_compressed_as_its_library_unpacks() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    state, _ = matrices.compressed(Draw(), OUT, COLUMNS)
    values = helpers.unpack_from_int32(state["weight_packed"], 4, torch.Size([OUT, COLUMNS]))
    found = dequantise.compressed(state["weight_packed"], torch.ones(OUT, 2))
    assert torch.equal(found, values.float())


def test_mxfp4_of_every_exponent() -> None:
    exponents = torch.arange(256, dtype=torch.int32).view(256, 1).to(torch.uint8)
    ones = torch.full((256, 16), 0x22, dtype=torch.uint8)
    found = dequantise.mxfp4(ones, exponents)[:, 0].double()
    assert found[255].isnan()
    assert torch.equal(found[:255], 2.0 ** (torch.arange(255).double() - 127))
