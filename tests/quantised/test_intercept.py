"""SGLang's own layers with our arithmetic: in every format, on every rank, in every dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sglang_minimax.errors import ConfigError
from sglang_minimax.platforms import choice
from sglang_minimax.platforms.cpu.support import QUANTIZATIONS
from tests.quantised import layers
from tests.quantised.cases import (
    CASES,
    INT8,
    INT8_CONFIG,
    TOKEN,
    compressed_tensors,
    modelslim,
)
from tests.quantised.layers import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    TOKENS,
    Case,
    Filled,
    agrees,
    as_rank,
    build,
    config_of,
    inputs,
)

pytestmark = pytest.mark.skipif(not choice.cpu_platform_chosen(), reason="a GPU is present")

PLACES = [
    pytest.param(case, kind, size, size - 1, id=f"{name}-{kind}-tp{size}")
    for name, case in CASES.items()
    for kind in case.kinds
    for size in case.sizes
]


@pytest.fixture(scope="module", autouse=True)
def launched() -> Iterator[None]:
    with layers.published():
        yield


@pytest.mark.parametrize(("case", "kind", "size", "rank"), PLACES)
def test_layer(case: Case, kind: str, size: int, rank: int) -> None:
    """It computes what its codes stand for, and its parameters stay as they were loaded."""
    with as_rank(rank, size):
        filled = Filled(case, kind, rank, size)
        after = dict(filled.layer.named_parameters())
        assert after.keys() == filled.before.keys()
        for name, (parameter, values) in filled.before.items():
            assert after[name] is parameter
            assert torch.equal(
                parameter.view(-1).view(torch.uint8), values.view(-1).view(torch.uint8)
            )
        assert agrees(case, kind, filled)
        # New weights, without a word to the method: as updates and moves of experts come.
        filled.fill(kind)
        assert agrees(case, kind, filled)


@pytest.mark.parametrize("name", ["fp8 blocks", "compressed w4a16", "modelslim"])
def test_other_dtypes_of_inputs(name: str) -> None:
    with as_rank(0, 1):
        filled = Filled(CASES[name], "o", 0, 1)
        for dtype in (torch.bfloat16, torch.float16):
            found = filled.layer.quant_method.apply(filled.layer, inputs(512).to(dtype))
            assert found.dtype == dtype
            assert found.shape == (TOKENS, HIDDEN)


@pytest.mark.parametrize("kind", ["qkv", "experts"])
@pytest.mark.parametrize("name", ["fp8 tensor static", "modelopt fp8", "nvfp4"])
def test_largest_static_scale(name: str, kind: str) -> None:
    """Fused matrices, and the experts of a rank, share the largest of their scales."""
    with as_rank(0, 1):
        filled = Filled(CASES[name], kind, 0, 1)
        for parameter, _ in (v for k, v in filled.before.items() if k.endswith("input_scale")):
            parameter.data.view(-1)[1:] = torch.linspace(0.001, 0.002, parameter.numel() - 1)
        assert agrees(CASES[name], kind, filled)


def test_static_quant_bias_is_added_once() -> None:
    """The ranks of o_proj add up to what one rank computes, a bias beyond the offset included."""

    def outputs(size: int) -> torch.Tensor:
        total = torch.zeros(())
        for rank in range(size):
            with as_rank(rank, size):
                filled = Filled(CASES["modelslim static"], "o", rank, size)
                filled.layer.quant_bias.data += 1000
                columns = inputs(HEADS * HEAD_DIM).chunk(size, 1)[rank]
                total = total + filled.layer.quant_method.apply(filled.layer, columns)
        return total

    alone = outputs(1)
    assert torch.allclose(outputs(2), alone, rtol=1e-5, atol=1e-5 * alone.abs().max().item())


@pytest.mark.parametrize("method", QUANTIZATIONS)
def test_config_keeps_its_name(method: str) -> None:
    """SGLang and its plugins go by names."""
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS

    from sglang_minimax.platforms.cpu.platform import MinimaxCpuPlatform
    from sglang_minimax.platforms.cpu.quantised.intercept import ON_CUDA

    made = MinimaxCpuPlatform().get_quantization_config(method)
    original = QUANTIZATION_METHODS[ON_CUDA.get(method, method)]
    assert made is not original
    assert issubclass(made, original)
    assert made.__name__ == original.__name__
    assert torch.float32 in made.get_supported_act_dtypes()


def test_other_formats_keep_sglangs() -> None:
    from sglang_minimax.platforms.cpu.platform import MinimaxCpuPlatform

    assert MinimaxCpuPlatform().get_quantization_config("bitsandbytes") is None


def test_methods_keep_their_names() -> None:
    """A linear layer's loader is chosen by the name of its method's class."""
    from sglang.srt.layers.linear import WEIGHT_LOADER_V2_SUPPORTED
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod, Fp8MoEMethod

    config = config_of("fp8", CASES["fp8 blocks"].config)
    with as_rank(0, 1):
        linear, moe = build(config, "o").quant_method, build(config, "experts").quant_method
    assert type(linear) is not Fp8LinearMethod
    assert isinstance(linear, Fp8LinearMethod)
    assert type(linear).__name__ in WEIGHT_LOADER_V2_SUPPORTED
    assert isinstance(moe, Fp8MoEMethod)
    assert type(moe).__name__ == "Fp8MoEMethod"


def test_excluded_layers_stay_plain() -> None:
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    config = CASES["fp8 blocks"].config | {"modules_to_not_convert": ["self_attn"]}
    with as_rank(0, 1):
        layer = build(config_of("fp8", config), "o")
    assert type(layer.quant_method) is UnquantizedLinearMethod


def test_fp8_cache_is_not_chosen_by_a_checkpoint() -> None:
    """The attention here would not apply its scales; their parameters exist all the same."""
    config = CASES["modelopt fp8"].config | {"kv_cache_quant_algo": "FP8"}
    assert config_of("modelopt_fp8", config).kv_cache_quant_algo == "auto"


def test_awq_config_of_its_own_file() -> None:
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True}
    assert config_of("awq", config).group_size == 64


@pytest.mark.parametrize(
    ("method", "config", "kind", "words"),
    [
        ("compressed-tensors", INT8_CONFIG, "experts", "start with --quantization w8a8_int8."),
        ("fp8", {"quant_method": "other", "activation_scheme": "dynamic"}, "o", "would quantise"),
        (
            "compressed-tensors",
            compressed_tensors(
                "int-quantized", INT8 | {"strategy": "channel"}, TOKEN | {"symmetric": False}
            ),
            "o",
            "asymmetric activations",
        ),
        (
            "modelslim",
            modelslim("W4A4_DYNAMIC"),
            "o",
            "ModelSlimW4A4Int4, which the CPU platform cannot compute",
        ),
    ],
    ids=["int8 experts", "online", "asymmetric", "unknown scheme"],
)
def test_refused(method: str, config: dict[str, Any], kind: str, words: str) -> None:
    with as_rank(0, 1), pytest.raises(ConfigError, match=words):
        build(config_of(method, config), kind)
