"""Files of the packed formats that do not fit: every misfit is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sglang_minimax.errors import LoadError
from sglang_minimax.loading.planned import PlannedWeights, ReadOptions
from tests.formats import nvfp4
from tests.formats.packed_oracle import FIXTURES, Checkpoint, checkpoint, plan, written

# --- files that do not fit ---

O1 = "model.layers.1.self_attn.o_proj"
E2 = "model.layers.1.block_sparse_moe.experts.2"
GATE = "model.layers.0.block_sparse_moe.gate"


def half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, : tensor.shape[1] // 2]


WRONG_HEADERS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], str, str]] = {
    "quantised router": (
        "awq",
        lambda t: t.update({f"{GATE}.qweight": t[f"{O1}.qweight"]}),
        "quantised",
        f"{GATE}.qweight",
    ),
    "no zero points": ("awq", lambda t: t.pop(f"{E2}.w1.qzeros"), "missing", f"{E2}.w1.qzeros"),
    "no g_idx": ("gptq-act-order", lambda t: t.pop(f"{O1}.g_idx"), "missing", f"{O1}.g_idx"),
    "wrong pack": (
        "awq",
        lambda t: t.update({f"{O1}.qweight": half(t[f"{O1}.qweight"])}),
        "misshapen",
        f"{O1}.qweight",
    ),
    "one value a byte": (
        "nvfp4",
        lambda t: t.update({f"{E2}.w2.weight": t[f"{E2}.w2.weight"].repeat(1, 2)}),
        "misshapen",
        f"{E2}.w2.weight",
    ),
    "scale of another type": (
        "mxfp4",
        lambda t: t.update({f"{O1}.weight_scale": t[f"{O1}.weight_scale"].float()}),
        "contradictory",
        f"{O1}.weight_scale is F32, expected U8",
    ),
    "no input scale": (
        "nvfp4",
        lambda t: t.pop(f"{E2}.w3.input_scale"),
        "missing",
        f"{E2}.w3.input_scale",
    ),
    "plain in spite of the config": (
        "gptq",
        lambda t: t.update({f"{O1}.weight": torch.zeros(128, 512)}),
        "contradictory",
        f"{O1}.weight",
    ),
}


@pytest.mark.parametrize("case", WRONG_HEADERS)
def test_files_that_do_not_fit_the_config_are_named(case: str):
    name, change, group, line = WRONG_HEADERS[case]
    problems = plan(with_tensors(name, change)).problems
    assert any(line in each for each in problems.groups[group]), problems.groups


def test_quantised_attention_that_the_config_excludes_is_a_contradiction():
    fixture = FIXTURES["nvfp4"]()
    ignored = {"ignore": [*nvfp4.IGNORED, *nvfp4.ATTENTION_IGNORED]}
    fixture.config["quantization_config"] |= ignored
    groups = plan(written(fixture)).problems.groups
    assert any(f"{O1}.weight_scale " in line for line in groups["contradictory"])


def with_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Checkpoint:
    fixture = FIXTURES[name]()
    change(fixture.tensors)
    return written(fixture)


def put(name: str, value: Any, index: Any = ...) -> Callable[[dict[str, torch.Tensor]], None]:
    """One tensor with another value."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name][index] = value

    return change


K1 = O1.replace("o_proj", "k_proj")
WRONG_VALUES = {
    "NaN": ("awq", put(f"{O1}.scales", float("nan"), (0, 0)), f"{O1}.scales has scales from nan"),
    "scale of zero": ("gptq", put(f"{E2}.w1.scales", 0, (0, 0)), f"{E2}.w1.scales has scales"),
    "NaN power": ("mxfp4", put(f"{O1}.weight_scale", 255, (3, 1)), f"{O1}.weight_scale has scales"),
    "asymmetric": ("gptq", put(f"{E2}.w2.qzeros", 5, (0, 0)), f"{E2}.w2.qzeros has other values"),
    "offset": ("modelslim", put(f"{E2}.w3.weight_offset", 1), "weight_offset has other values"),
    "g_idx of w3": (
        "gptq-act-order",
        lambda t: t.update({f"{E2}.w3.g_idx": t[f"{E2}.w3.g_idx"].flip(0)}),
        f"{E2}.w3.g_idx differs from {E2}.w1.g_idx",
    ),
    "g_idx of k": (
        "gptq-act-order",
        lambda t: t.update({f"{K1}.g_idx": t[f"{K1}.g_idx"].flip(0)}),
        "q_proj.g_idx differs from .*k_proj.g_idx",
    ),
    "scale_2 of w3": ("nvfp4", put(f"{E2}.w3.weight_scale_2", 0.5), "w3.weight_scale_2 differs"),
    "scale_2 of k": (
        "nvfp4",
        put(f"{K1}.weight_scale_2", 0.5),
        "weight_scale_2 differs from .*weight_scale_2",
    ),
    "input_scale of w3": ("nvfp4", put(f"{E2}.w3.input_scale", 0.5), "w3.input_scale differs"),
    "input_scale of k": (
        "modelslim-static",
        put(f"{K1}.input_scale", 0.5),
        "input_scale differs from .*input_scale",
    ),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_values_that_sglang_would_take_silently_are_named(case: str):
    name, change, sentence = WRONG_VALUES[case]
    made = with_tensors(name, change)
    with pytest.raises(LoadError, match=sentence):
        list(PlannedWeights(plan(made), ReadOptions(threads=1)))


@pytest.mark.parametrize("name", FIXTURES)
def test_right_values_are_taken(name: str):
    list(PlannedWeights(plan(checkpoint(name)), ReadOptions(threads=1)))
