"""SGLang's own layers with our arithmetic: built, filled by its loaders, applied.

Each is compared with the dense product of what the codes stand for, its input rounded by the second
implementation in `rounding`. No process group: a rank is one that the context says it is.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sglang_minimax import TINY_M2
from sglang_minimax.errors import ConfigError
from sglang_minimax.platforms import choice
from sglang_minimax.platforms.cpu.support import QUANTIZATIONS
from tests.quantised import matrices, rounding
from tests.quantised.matrices import Draw

pytestmark = pytest.mark.skipif(not choice.cpu_platform_chosen(), reason="a GPU is present")

HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, TOP_K, TOKENS = 256, 512, 4, 2, 128, 4, 2, 6
LAYER = "model.layers.0"
PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "experts": ["experts.0.w1", "experts.0.w2", "experts.0.w3"],
}

Round = Callable[[torch.Tensor], torch.Tensor]


def _compressed_tensors(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> Any:
    common = {"symmetric": True, "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": common | weights,
        "input_activations": inputs and common | weights | {"num_bits": 8} | inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }


FLOAT8, INT8, INT4 = ({"num_bits": n, "type": t} for n, t in ((8, "float"), (8, "int"), (4, "int")))
W4 = INT4 | {"strategy": "group", "group_size": 128}
FP8 = {"quant_method": "fp8", "fmt": "float8_e4m3fn"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "lm_head": False}
_FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
QUARK = {
    "quant_method": "quark",
    "export": {"kv_cache_group": [], "pack_method": "reorder"},
    "global_quant_config": {
        "weight": {**_FP4, "is_dynamic": False},
        "input_tensors": {**_FP4, "is_dynamic": True},
        "output_tensors": None,
        "bias": None,
    },
    "exclude": ["lm_head"],
    "layer_quant_config": {},
    "layer_type_quant_config": {},
}
_MODULES = [f"self_attn.{name}_proj" for name in "qkvo"]
_W123 = [f"block_sparse_moe.experts.0.w{i}" for i in (1, 2, 3)]


def _modelslim(attention: str) -> dict[str, str]:
    described = {f"{LAYER}.{name}.weight": attention for name in _MODULES}
    return described | {f"{LAYER}.{name}.weight": "W8A8_DYNAMIC" for name in _W123}


def _groups(x: torch.Tensor) -> torch.Tensor:
    return rounding.by_row(x, lambda row: rounding.fp8_group(row, 128))


def _tokens(x: torch.Tensor) -> torch.Tensor:
    return rounding.by_row(x, rounding.fp8_token)


def _tensor(x: torch.Tensor) -> torch.Tensor:
    return rounding.by_row(x, lambda row: rounding.fp8_given(row, rounding.largest(x)))


def _static(x: torch.Tensor) -> torch.Tensor:
    return rounding.by_row(x, lambda row: rounding.fp8_given(row, np.float32(0.0123)))


def _int8(x: torch.Tensor) -> torch.Tensor:
    return rounding.by_row(x, rounding.int8_token)


def _ascend(x: torch.Tensor) -> torch.Tensor:
    return rounding.by_row(x, rounding.ascend_token)


def _ascend_static(x: torch.Tensor) -> torch.Tensor:
    scale, offset = np.float32(1 / 16), np.float32(3)
    return rounding.by_row(x, lambda row: rounding.ascend_given(row, scale, offset))


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


@dataclass(frozen=True)
class Case:
    """One format: SGLang's name, the quantization_config, its matrices, rounding of inputs.

    kinds: which layers it can have. sizes: of tensor parallelism.
    """

    method: str
    config: dict[str, Any]
    matrix: Callable[[Draw, int, int], matrices.Stored]
    linear: Round = _same
    experts: Round = _same
    kinds: tuple[str, ...] = ("qkv", "o", "experts")
    sizes: tuple[int, ...] = (1, 2)


def _per_tensor(static: bool, shape: tuple[int, ...] = ()) -> Callable[..., matrices.Stored]:
    return lambda *a: matrices.fp8_tensor(*a, static=static, shape=shape)


_FP8_CT = "float-quantized"
_TENSOR, _TOKEN = {"strategy": "tensor"}, {"strategy": "token", "dynamic": True}
_INT8_CONFIG = _compressed_tensors("int-quantized", INT8 | {"strategy": "channel"}, _TOKEN)

CASES = {
    "fp8 blocks": Case(
        "fp8",
        FP8 | {"activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        matrices.fp8_blocks,
        _groups,
        _groups,
    ),
    "fp8 tensor dynamic": Case(
        "fp8", FP8 | {"activation_scheme": "dynamic"}, _per_tensor(False), _tokens, _tensor
    ),
    "fp8 tensor static": Case(
        "fp8", FP8 | {"activation_scheme": "static"}, _per_tensor(True), _static, _static
    ),
    "modelopt fp8": Case(
        "modelopt_fp8",
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
        _per_tensor(True),
        _static,
        _static,
    ),
    "compressed fp8 blocks": Case(
        "compressed-tensors",
        _compressed_tensors(
            _FP8_CT,
            FLOAT8 | {"strategy": "block", "block_structure": [128, 128]},
            {"strategy": "group", "group_size": 128, "dynamic": True, "block_structure": None},
        ),
        lambda *a: matrices.fp8_blocks(*a, name="weight_scale"),
        _groups,
        _groups,
    ),
    "compressed fp8 channels": Case(
        "compressed-tensors",
        _compressed_tensors(_FP8_CT, FLOAT8 | {"strategy": "channel"}, _TOKEN),
        lambda *a: matrices.channels(*a, integer=False),
        _tokens,
        _tokens,
    ),
    "compressed fp8 tensor static": Case(
        "compressed-tensors",
        _compressed_tensors(_FP8_CT, FLOAT8 | _TENSOR, _TENSOR),
        _per_tensor(True, (1,)),
        _static,
        _static,
    ),
    "compressed fp8 tensor dynamic": Case(
        "compressed-tensors",
        _compressed_tensors(_FP8_CT, FLOAT8 | _TENSOR, _TENSOR | {"dynamic": True}),
        _per_tensor(False, (1,)),
        _tokens,
        _tensor,
    ),
    "compressed w4a16": Case(
        "compressed-tensors",
        _compressed_tensors("pack-quantized", W4, None),
        matrices.compressed,
    ),
    "compressed w4a16 act-order": Case(
        "compressed-tensors",
        _compressed_tensors("pack-quantized", W4 | {"actorder": "group"}, None),
        lambda *a: matrices.compressed(*a, ordered=True),
        sizes=(1,),
    ),
    "compressed w4a16 zero points": Case(
        "compressed-tensors",
        _compressed_tensors("pack-quantized", W4 | {"symmetric": False}, None),
        lambda *a: matrices.compressed(*a, zeros=True),
        kinds=("qkv", "o"),
    ),
    "w8a8 int8": Case(
        "w8a8_int8",
        _INT8_CONFIG,
        lambda *a: matrices.channels(*a, integer=True),
        _int8,
        _int8,
    ),
    "compressed int8": Case(
        "compressed-tensors",
        _INT8_CONFIG,
        lambda *a: matrices.channels(*a, integer=True),
        _int8,
        kinds=("qkv", "o"),
    ),
    "awq": Case(
        "awq",
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
        matrices.awq,
        sizes=(1, 2),
    ),
    "awq as moe_wna16": Case(  # experts that Marlin cannot cut
        "awq",
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
        matrices.awq,
        kinds=("experts",),
        sizes=(8,),
    ),
    "gptq": Case(
        "gptq_marlin",
        GPTQ | {"desc_act": False},
        matrices.gptq,
    ),
    "gptq act-order": Case(
        "gptq_marlin",
        GPTQ | {"desc_act": True},
        lambda *a: matrices.gptq(*a, ordered=True),
        sizes=(1,),
    ),
    "nvfp4": Case(
        "modelopt_fp4",
        {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "config_groups": {"group_0": {"weights": {"group_size": 16}, "targets": ["Linear"]}},
            "ignore": ["lm_head"],
        },
        matrices.nvfp4,
    ),
    "mxfp4": Case("quark", QUARK, matrices.mxfp4),
    "modelslim": Case(
        "modelslim", _modelslim("W8A8_DYNAMIC"), matrices.modelslim, _ascend, _ascend
    ),
    "modelslim static": Case(
        "modelslim",
        _modelslim("W8A8"),
        matrices.modelslim_static,
        _ascend_static,
        kinds=("qkv", "o"),
        sizes=(1,),  # a rank's share of o_proj is no product: see the test of quant_bias
    ),
}
PLACES = [
    pytest.param(case, kind, size, size - 1, id=f"{name}-{kind}-tp{size}")
    for name, case in CASES.items()
    for kind in case.kinds
    for size in case.sizes
]


# --- SGLang's context, as far as layers ask for it ----------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def published() -> Iterator[None]:
    """SGLang's configuration of a launch, which is taken back afterwards."""
    from sglang.srt import runtime_context
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.server_args import ServerArgs

    before = runtime_context.snapshot_context()
    arguments = ServerArgs(model_path=str(TINY_M2), log_level="warning")
    runtime_context.publish(arguments, role="scheduler")
    initialize_moe_config()
    yield
    runtime_context.restore_context(before)


@contextlib.contextmanager
def as_rank(rank: int, size: int) -> Iterator[None]:
    """Rank `rank` of `size` of attention and experts, without a process group."""
    from sglang.srt.runtime_context import get_parallel

    group = SimpleNamespace(world_size=size, rank_in_group=rank, device=torch.device("cpu"))
    alone = SimpleNamespace(world_size=1, rank_in_group=0)
    with get_parallel().override(
        **dict.fromkeys(("attn_tp_size", "tp_size", "moe_tp_size"), size),
        **dict.fromkeys(("attn_tp_rank", "tp_rank", "moe_tp_rank"), rank),
        **dict.fromkeys(("attn_tp_group", "tp_group", "moe_tp_group"), group),
        **dict.fromkeys(("attn_dp_size", "attn_cp_size", "moe_dp_size", "moe_ep_size"), 1),
        **dict.fromkeys(("attn_dp_rank", "attn_cp_rank", "moe_ep_rank"), 0),
        moe_ep_group=alone,
    ):
        yield


def config_of(method: str, config: dict[str, Any]) -> Any:
    """A config of ours, made as SGLang's loader makes it."""
    from sglang_minimax.platforms.cpu.platform import MinimaxCpuPlatform

    made = MinimaxCpuPlatform().get_quantization_config(method)
    mapping = {"packed_modules_mapping": copy.deepcopy(PACKED)}
    return made.from_config(copy.deepcopy(config) | mapping)


def build(config: Any, kind: str) -> torch.nn.Module:
    """One of SGLang's layers."""
    from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
    from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class

    common = {"quant_config": config, "params_dtype": torch.bfloat16}
    group = {"bias": False, "parallel_group": "attn_tp"}
    if kind == "qkv":
        prefix = f"{LAYER}.self_attn.qkv_proj"
        sizes = (HIDDEN, HEAD_DIM, HEADS, KV_HEADS)
        return QKVParallelLinear(*sizes, prefix=prefix, **group, **common)
    if kind == "o":
        prefix = f"{LAYER}.self_attn.o_proj"
        sizes = (HEADS * HEAD_DIM, HIDDEN)
        return RowParallelLinear(*sizes, prefix=prefix, reduce_results=False, **group, **common)
    return get_moe_impl_class(config)(
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        layer_id=0,
        prefix=f"{LAYER}.block_sparse_moe.experts",
        **common,
    )


class Filled:
    """A layer with random weights, and this rank's share of what they stand for.

    weights: one matrix of a linear layer; w13 and w2 of each expert otherwise.
    """

    def __init__(self, case: Case, kind: str, rank: int, size: int) -> None:
        self._case, self._rank, self._size = case, rank, size
        self._draw = Draw(7)
        self.layer = build(config_of(case.method, case.config), kind)
        self._parameters = dict(self.layer.named_parameters())
        self.lost: set[str] = set()
        self.fill(kind)
        self.before = {name: (p, p.clone()) for name, p in self._parameters.items()}
        self.layer.quant_method.process_weights_after_loading(self.layer)

    def fill(self, kind: str) -> None:
        """Draw weights and give them to SGLang's loaders; may be called again."""
        if kind == "qkv":
            rows = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
            self.weights = [
                torch.cat([self._cut(self._load(n, HIDDEN, s)) for s, n in rows.items()])
            ]
        elif kind == "o":
            self.weights = [self._cut(self._load(HIDDEN, HEADS * HEAD_DIM), 1)]
        else:
            self.weights = [matrix for e in range(EXPERTS) for matrix in self._expert(e)]

    def _expert(self, expert: int) -> list[torch.Tensor]:
        gate, up, down = (
            self._load(*shape, name, expert)
            for name, shape in zip(
                ("w1", "w3", "w2"), ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)), strict=True
            )
        )
        return [torch.cat([self._cut(gate), self._cut(up)]), self._cut(down, 1)]

    def _load(self, rows: int, columns: int, shard: str = "", expert: int = -1) -> torch.Tensor:
        tensors, weight = self._case.matrix(self._draw, rows, columns)
        for kind, tensor in tensors.items():
            name = {"w1": "w13_", "w3": "w13_", "w2": "w2_"}.get(shard, "") + kind
            parameter = self._parameters.get(name)
            if parameter is None:
                self.lost.add(kind)
            elif expert >= 0:
                parameter.weight_loader(parameter, tensor, f"experts.{name}", shard, expert)
            else:
                parameter.weight_loader(parameter, tensor, *([shard] if shard else []))
        return weight

    def _cut(self, weight: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return weight.chunk(self._size, dim)[self._rank]


def inputs(columns: int) -> torch.Tensor:
    x = torch.randn(TOKENS, columns, generator=torch.Generator().manual_seed(3))
    x[2] = 0
    return x


def dense(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    ids: torch.Tensor,
    scores: torch.Tensor,
    rounded: Round,
) -> torch.Tensor:
    """Every chosen expert for every token; all of the second inputs are rounded at once."""
    places = [(t, e, s) for t in range(TOKENS) for s, e in enumerate(ids[t].tolist()) if e >= 0]
    first = rounded(x)
    inner = []
    for token, expert, _ in places:
        gate, up = F.linear(first[token], weights[2 * expert]).chunk(2)
        inner.append(F.silu(gate) * up)
    second = rounded(torch.stack(inner))
    total = torch.zeros_like(x)
    for row, (token, expert, slot) in zip(second, places, strict=True):
        total[token] += scores[token, slot] * F.linear(row, weights[2 * expert + 1])
    return total


def agrees(case: Case, kind: str, filled: Filled) -> bool:
    """The layer's output against the dense one, in fp32; sums may differ in their order."""
    method = filled.layer.quant_method
    if kind != "experts":
        x = inputs(filled.weights[0].shape[1])
        found = method.apply(filled.layer, x)
        expected = F.linear(case.linear(x), filled.weights[0])
    else:
        x, ids = inputs(HIDDEN), torch.tensor([[0, 1], [1, 3], [3, 2], [-1, 0], [2, 1], [-1, -1]])
        scores = torch.rand(TOKENS, TOP_K, generator=torch.Generator().manual_seed(4))
        dispatched = SimpleNamespace(hidden_states=x, topk_output=(scores, ids, None))
        found = method.apply(filled.layer, dispatched).hidden_states
        expected = dense(x, filled.weights, ids, scores, case.experts)
    # fp32 sums of up to 512 products, in two orders; a rounding that tips over would be 2**-4.
    return torch.allclose(found, expected, rtol=2e-5, atol=2e-5 * expected.abs().max().item())


# --- the tests ----------------------------------------------------------------------------------


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
@pytest.mark.parametrize("name", ["fp8 tensor static", "modelopt fp8"])
def test_largest_static_scale(name: str, kind: str) -> None:
    """Fused matrices, and the experts of a rank, share the largest of their scales."""
    with as_rank(0, 1):
        filled = Filled(CASES[name], kind, 0, 1)
        for parameter, _ in (v for k, v in filled.before.items() if k.endswith("input_scale")):
            parameter.data[1:] = torch.linspace(0.001, 0.002, parameter.numel() - 1)
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
        ("compressed-tensors", _INT8_CONFIG, "experts", "start with --quantization w8a8_int8."),
        ("fp8", {"quant_method": "other", "activation_scheme": "dynamic"}, "o", "would quantise"),
        (
            "compressed-tensors",
            _compressed_tensors(
                "int-quantized", INT8 | {"strategy": "channel"}, _TOKEN | {"symmetric": False}
            ),
            "o",
            "asymmetric activations",
        ),
        (
            "modelslim",
            _modelslim("W4A4_DYNAMIC"),
            "o",
            "ModelSlimW4A4Int4, which the CPU platform cannot compute",
        ),
    ],
    ids=["int8 experts", "online", "asymmetric", "unknown scheme"],
)
def test_refused(method: str, config: dict[str, Any], kind: str, words: str) -> None:
    with as_rank(0, 1), pytest.raises(ConfigError, match=words):
        build(config_of(method, config), kind)
