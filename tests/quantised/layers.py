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

import torch
from torch.nn import functional as F

from sglang_minimax import TINY_M2
from tests.quantised import matrices
from tests.quantised.matrices import Draw

HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, TOP_K, TOKENS = 256, 512, 4, 2, 128, 4, 2, 6
LAYER = "model.layers.0"
PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "experts": ["experts.0.w1", "experts.0.w2", "experts.0.w3"],
}

Round = Callable[[torch.Tensor], torch.Tensor]


def same(x: torch.Tensor) -> torch.Tensor:
    return x


@dataclass(frozen=True)
class Case:
    """One format: SGLang's name, the quantization_config, its matrices, rounding of inputs.

    kinds: which layers it can have. sizes: of tensor parallelism.
    """

    method: str
    config: dict[str, Any]
    matrix: Callable[[Draw, int, int], matrices.Stored]
    linear: Round = same
    experts: Round = same
    kinds: tuple[str, ...] = ("qkv", "o", "experts")
    sizes: tuple[int, ...] = (1, 2)


# --- SGLang's context, as far as layers ask for it ----------------------------------------------


@contextlib.contextmanager
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
    first: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every chosen expert for every token; all of the second inputs are rounded at once.

    first: what is multiplied first, where that is not x rounded.
    """
    places = [(t, e, s) for t in range(TOKENS) for s, e in enumerate(ids[t].tolist()) if e >= 0]
    first = rounded(x) if first is None else first
    inner = []
    for token, expert, _ in places:
        gate, up = F.linear(first[token], weights[2 * expert]).chunk(2)
        inner.append(F.silu(gate) * up)
    second = rounded(torch.stack(inner))
    total = torch.zeros_like(x)
    for row, (token, expert, slot) in zip(second, places, strict=True):
        total[token] += scores[token, slot] * F.linear(row, weights[2 * expert + 1])
    return total


def choices() -> Any:
    """Experts of every token, of which some are elsewhere, as SGLang's top-k hands them over."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    ids = torch.tensor([[0, 1], [1, 3], [3, 2], [-1, 0], [2, 1], [-1, -1]])
    scores = torch.rand(TOKENS, TOP_K, generator=torch.Generator().manual_seed(4))
    return StandardTopKOutput(scores, ids, scores)


def run_experts(layer: Any, x: torch.Tensor, chosen: Any, **quantised: Any) -> torch.Tensor:
    """What the layer's method makes of rows as a dispatcher hands them over."""
    from sglang.srt.layers.moe.token_dispatcher import StandardDispatchOutput

    dispatched = StandardDispatchOutput(
        **{"hidden_states": x, "hidden_states_scale": None, "topk_output": chosen, **quantised}
    )
    return layer.quant_method.apply(layer, dispatched).hidden_states


def agrees(case: Case, kind: str, filled: Filled) -> bool:
    """The layer's output against the dense one, in fp32; sums may differ in their order."""
    method = filled.layer.quant_method
    if kind != "experts":
        x = inputs(filled.weights[0].shape[1])
        found = method.apply(filled.layer, x)
        expected = F.linear(case.linear(x), filled.weights[0])
    else:
        x, chosen = inputs(HIDDEN), choices()
        found = run_experts(filled.layer, x, chosen)
        expected = dense(x, filled.weights, chosen.topk_ids, chosen.topk_weights, case.experts)
    return close(found, expected)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """fp32 sums of up to 512 products, in two orders; a rounding that tips over would be 2**-4."""
    return torch.allclose(found, expected, rtol=2e-5, atol=2e-5 * expected.abs().max().item())
