"""The packed formats: what every rank reads of each, and what that stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from sglang_minimax.loading.formats import gptq as our_gptq
from sglang_minimax.loading.formats import modelslim as our_modelslim
from sglang_minimax.loading.formats.base import Axis, Format
from tests.formats import modelslim
from tests.formats.packed_oracle import FIXTURES, check, checkpoint, kinds
from tests.formats.packing import lines_of

WHOLE = ("tp=1", "tp=2,ep=2", "tp=4,ep=4", "pp=2")
CUT = (*WHOLE, "tp=2", "tp=4", "tp=4,ep=2", "tp=8,dp=2", "tp=16,dp=4")
CASES = [
    (name, topology)
    for name in FIXTURES
    for topology in (WHOLE if name in ("gptq", "gptq-v2", "gptq-act-order") else CUT)
]


@pytest.mark.parametrize(("name", "topology"), CASES)
def test_every_rank_reads_its_part_and_that_stands_for_its_weights(name: str, topology: str):
    check(checkpoint(name), topology)


# --- mutants ---


def changed(kind: str, **values: Any) -> Callable[[Format], Format]:
    """A format with another `kind`."""

    def change(form: Format) -> Format:
        tensors = (replace(t, **values) if t.kind == kind else t for t in form.tensors)
        return replace(form, tensors=tuple(tensors))

    return change


ROW, COLUMN = (lambda **k: Axis("rows", **k)), (lambda **k: Axis("columns", **k))
MUTANTS = {
    "words of four rows": ("awq", "tp=1", changed("qweight", axes=(COLUMN(), ROW(per=4)))),
    "words along the columns": ("awq", "tp=1", changed("qweight", axes=(COLUMN(per=8), ROW()))),
    "zero points do not follow": (
        "awq",
        "tp=2",
        changed("qzeros", axes=(COLUMN(per=64, whole=True), ROW(per=8))),
    ),
    "padded zero points": ("awq", "tp=4", changed("qzeros", padding=0x77777777)),
    "scales cut under act-order": (
        "gptq-act-order",
        "tp=2,ep=2",
        changed("scales", axes=(COLUMN(per=64), ROW())),
    ),
    "scales whole without it": (
        "gptq",
        "tp=2,ep=2",
        changed("scales", axes=(COLUMN(per=64, whole=True), ROW())),
    ),
    "g_idx not cut": ("gptq-act-order", "tp=2,ep=2", changed("g_idx", axes=(COLUMN(whole=True),))),
    "padding of zero bits": ("gptq-whole-rows", "tp=20,dp=5", changed("qweight", padding=0)),
    "four values in a byte": ("nvfp4", "tp=1", changed("weight", axes=(ROW(), COLUMN(per=4)))),
    "scales of whole rows": (
        "nvfp4",
        "tp=2",
        changed("weight_scale", axes=(ROW(), COLUMN(per=16, whole=True))),
    ),
    "groups of 16": ("mxfp4", "tp=1", changed("weight_scale", axes=(ROW(), COLUMN(per=16)))),
    "padding that is NaN": ("mxfp4", "tp=8,dp=2", changed("weight_scale", padding=255)),
    "scale of columns": ("modelslim", "tp=1", changed("weight_scale", axes=(COLUMN(), Axis()))),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_layout_is_noticed(mutant: str):
    name, topology, change = MUTANTS[mutant]
    made = checkpoint(name)
    check(made, topology)
    recipe = made.arch.recipe
    if isinstance(recipe, our_modelslim.Described):
        formats = {module: change(form) for module, form in recipe.formats.items()}
        wrong = replace(recipe, formats=formats)
    else:
        wrong = replace(recipe, quantised=change(recipe.quantised))
    with pytest.raises((AssertionError, ValueError)):
        check(made._replace(arch=replace(made.arch, recipe=wrong)), topology)


# --- other people's arithmetic ---


def test_awq_is_what_sglang_unpacks():
    from sglang.srt.hardware_backend.xpu.quantization.int4pack_utils import unpack_awq_to_codes

    tensors, weight = one_module("awq")
    lines = unpack_awq_to_codes(tensors["qweight"], len(tensors["qweight"])).float()
    zeros = unpack_awq_to_codes(tensors["qzeros"], len(tensors["qzeros"])).float()
    zeros, scales = (t.float().repeat_interleave(64, 0) for t in (zeros, tensors["scales"]))
    assert torch.equal(((lines - zeros) * scales).t(), weight)


@pytest.mark.parametrize("name", ["gptq", "gptq-act-order", "gptq-v2"])
def test_gptq_is_what_sglang_unpacks(name: str):
    from sglang.srt.hardware_backend.xpu.quantization.int4pack_utils import (
        unpack_gptq_qweight,
        unpack_gptq_qzeros,
    )

    tensors, weight = one_module(name)
    zeros = unpack_gptq_qzeros(tensors["qzeros"]) + (name != "gptq-v2")
    assert bool((zeros == 8).all())
    groups = tensors["g_idx"].long()
    lines = unpack_gptq_qweight(tensors["qweight"])
    assert torch.equal(((lines - zeros[groups]) * tensors["scales"].float()[groups]).t(), weight)


def test_nvfp4_is_what_sglang_dequantises():
    from sglang.srt.layers.quantization.dequantization import dequantize_nvfp4

    tensors, weight = one_module("nvfp4")
    found = dequantize_nvfp4(
        tensors["weight"], tensors["weight_scale"], tensors["weight_scale_2"], torch.float32
    )
    assert torch.equal(found, weight)


def test_mxfp4_is_what_sglang_dequantises():
    from sglang.srt.layers.quantization.fp8_utils import dequant_mxfp4

    tensors, weight = one_module("mxfp4")
    packed = tensors["weight"].unflatten(-1, (-1, 16))[None]
    found = dequant_mxfp4(packed, tensors["weight_scale"][None], torch.float32)
    assert torch.equal(found[0], weight)


def test_static_int8_gives_the_product_of_its_weights():
    tensors, weight = one_module("modelslim-static", "model.layers.0.self_attn.q_proj")
    scale, offset = modelslim.INPUT_SCALE, modelslim.INPUT_OFFSET
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)) / 2
    rounded = (x / scale).round()
    quantised = (rounded + offset).clamp(-128, 127)
    assert torch.equal(quantised - offset, rounded)  # nothing saturates
    product = quantised.long() @ tensors["weight"].long().t() + tensors["quant_bias"]
    wanted = (rounded * scale).double() @ weight.double().t()
    # Products of integers are exact; one rounding of deq_scale to fp32.
    torch.testing.assert_close(
        product * tensors["deq_scale"].double(), wanted, rtol=1e-6, atol=1e-9
    )


def one_module(name: str, module: str = "model.layers.1.block_sparse_moe.experts.3.w2"):
    """(stored tensors by kind, dequantised weight)."""
    fixture = FIXTURES[name]()
    tensors = {kind: fixture.tensors[tensor] for tensor, kind in kinds(fixture, module)}
    return tensors, fixture.dequantised[f"{module}.weight"]


def test_words_are_what_the_padding_stands_for():
    sevens, eights = our_gptq.SEVENS, our_gptq.EIGHTS
    assert set(lines_of(torch.tensor([sevens], dtype=torch.int32)).tolist()) == {7}
    assert set(lines_of(torch.tensor([eights], dtype=torch.int32)).tolist()) == {8}
