"""A pipeline stage whose ranks are threads: groups really exchange, and experts compute.

What a test changes in one rank's dispatcher is seen by the others as in a server, without starting
one. The dispatchers, SGLang's standard one among them, are the real ones.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.moe.token_dispatcher import standard
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
from sglang.srt.layers.moe.topk import StandardTopKOutput

from sglang_minimax.layers.dispatch import all_to_all, dispatcher, factory, gather, rows
from sglang_minimax.moe_exchange.paths import Path, Rows
from sglang_minimax.platforms.cpu.experts import local_experts
from sglang_minimax.topology import Topology
from tests.ranks import own_rank, together

HIDDEN, WIDTH, EXPERTS, TOP_K = 256, 96, 8, 3


class Group:
    """SGLang's GroupCoordinator over `together`'s gather, as far as dispatchers use it."""

    def __init__(self, rank: int, size: int, exchange: Any) -> None:
        self.rank_in_group, self.world_size, self._exchange = rank, size, exchange
        self.device_group = self
        #: (operation, bytes given, rows of all ranks or sizes)
        self.calls: list[tuple[str, int]] = []

    def all_gather_into_tensor(self, output: torch.Tensor, mine: torch.Tensor) -> None:
        found = self._all("all_gather_into_tensor", mine)
        assert len({each.shape for each in found}) == 1
        output.copy_(torch.cat(found))

    def all_gatherv(self, mine: torch.Tensor, sizes: list[int], output: torch.Tensor) -> None:
        found = self._all("all_gatherv", mine)
        assert [len(each) for each in found] == sizes
        output.copy_(torch.cat(found))

    def reduce_scatter_tensor(self, output: torch.Tensor, given: torch.Tensor) -> None:
        sums = self._sum("reduce_scatter_tensor", given)
        output.copy_(sums.chunk(self.world_size)[self.rank_in_group])

    def reduce_scatterv(self, given: torch.Tensor, output: torch.Tensor, sizes: list[int]) -> None:
        sums = self._sum("reduce_scatterv", given)
        output.copy_(sums.split(sizes)[self.rank_in_group])

    def all_to_all(
        self, output: torch.Tensor, given: torch.Tensor, received: Any = None, sent: Any = None
    ) -> None:
        pieces = given.split(sent) if sent is not None else given.chunk(self.world_size)
        found = self._exchange([piece.clone() for piece in pieces])
        self.calls.append(("all_to_all_single", given.numel() * given.element_size()))
        output.copy_(torch.cat([pieces[self.rank_in_group] for pieces in found]))

    def _all(self, operation: str, mine: torch.Tensor) -> list[torch.Tensor]:
        self.calls.append((operation, mine.numel() * mine.element_size()))
        return self._exchange(mine.clone())

    def _sum(self, operation: str, given: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._all(operation, given)).double().sum(0).to(given.dtype)


@dataclass
class Model:
    """One layer of experts and the choices of all rows. Everything fp32."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor

    @classmethod
    def random(cls, count: int, seed: int = 0) -> Model:
        """`count` rows."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        ids = torch.rand((count, EXPERTS), generator=generator).topk(TOP_K).indices
        return cls(
            hidden=normal(count, HIDDEN),
            ids=ids.to(torch.int32),
            weights=torch.rand((count, TOP_K), generator=generator),
            w13=normal(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5,
            w2=normal(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5,
        )

    def outputs(self, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """What the layer computes of each row, in fp64, row by row. hidden: instead of its own."""
        result = torch.zeros(self.hidden.shape, dtype=torch.float64)
        for row, x in enumerate((self.hidden if hidden is None else hidden).double()):
            for slot, expert in enumerate(self.ids[row].tolist()):
                if expert < 0:
                    continue
                gate, up = (self.w13[expert].double() @ x).chunk(2)
                inner = gate * torch.sigmoid(gate) * up
                weight = self.weights[row, slot].double()
                result[row] += weight * (self.w2[expert].double() @ inner)
        return result


@dataclass
class Stage:
    """Ranks of one topology that run one layer of `model` on a path.

    groups: rows of each attention-DP group as SGLang padded them; the model's rows are theirs in
    order.
    """

    topology: Topology
    path: Path
    groups: tuple[int, ...]
    monkeypatch: pytest.MonkeyPatch

    def run(self, model: Model) -> list[torch.Tensor]:
        """The outputs of each rank's own rows; raises what a rank raised."""
        self.arrived: dict[int, Any] = {}
        self.calls: dict[int, list[tuple[str, int]]] = {}
        found = together(lambda rank, exchange: self._rank(rank, exchange, model), self.topology.tp)
        for each in found:
            if isinstance(each, Exception):
                raise each
        return found

    def rows_of(self, rank: int) -> range:
        """The model's rows that are this rank's."""
        place = self.topology.coordinates(rank)
        share = self.groups[place.attention_dp_rank] // self.topology.attention_tp
        start = sum(self.groups[: place.attention_dp_rank]) + place.attention_tp_rank * share
        return range(start, start + share)

    def patch(self) -> None:
        """Let SGLang's state be that of the thread's rank. Once a test."""
        self._parallels: dict[int, Any] = {}
        patch = self.monkeypatch.setattr
        for module in (gather, rows, all_to_all, dispatcher, standard):
            patch(module, "get_parallel", lambda: self._parallels[own_rank()])
        patch(rows, "is_dp_attention_enabled", lambda: self.topology.dp > 1)
        patch(rows, "get_dp_global_num_tokens", lambda: list(self.groups))
        patch(gather, "use_symmetric_memory", lambda *_, **__: nullcontext())
        patch(gather, "is_allocation_symmetric", lambda: False)
        patch(standard, "get_device", lambda: "cpu")
        patch(standard, "should_use_flashinfer_cutlass_moe_fp4_allgather", lambda: False)
        patch(
            all_to_all.dist,
            "all_to_all_single",
            lambda *arguments, group: group.all_to_all(*arguments),
        )

    def _rank(self, rank: int, exchange: Any, model: Model) -> torch.Tensor:
        topology, place = self.topology, self.topology.coordinates(rank)
        group = Group(rank, topology.tp, exchange)
        self._parallels[rank] = SimpleNamespace(
            tp_group=group,
            tp_size=topology.tp,
            tp_rank=rank,
            attn_tp_size=topology.attention_tp,
            moe_ep_size=topology.ep,
            moe_ep_rank=place.moe_ep_rank,
        )
        held = EXPERTS // topology.ep
        width = WIDTH // topology.moe_tp
        experts = slice(place.moe_ep_rank * held, (place.moe_ep_rank + 1) * held)
        cut = slice(place.moe_tp_rank * width, (place.moe_tp_rank + 1) * width)
        gate, up = model.w13[experts].chunk(2, dim=1)
        w13 = torch.cat([gate[:, cut], up[:, cut]], dim=1)
        w2 = model.w2[experts][:, :, cut]

        scales = torch.full((EXPERTS, 2), 2.0**-9)
        layer = SimpleNamespace(w13_input_scale=scales, is_draft=False)
        made = factory.dispatcher_for(self.path, self._config(layer))
        mine = self.rows_of(rank)
        part = slice(mine.start, mine.stop)
        chosen = StandardTopKOutput(model.weights[part], model.ids[part], torch.empty(0))
        came = made.dispatch(model.hidden[part], chosen)
        self.arrived[rank] = came
        weights, ids, _ = came.topk_output
        x = self._decoded(came)
        outputs = local_experts(x, w13, w2, weights, ids)
        result = made.combine(StandardCombineInput(outputs))
        self.calls[rank] = group.calls
        return result

    def _config(self, layer: Any) -> Any:
        return SimpleNamespace(
            num_experts=EXPERTS,
            num_local_experts=EXPERTS // self.topology.ep,
            num_fused_shared_experts=0,
            hidden_size=HIDDEN,
            top_k=TOP_K,
            params_dtype=torch.float32,
            runner_backend=None,
            layer=layer,
        )

    def _decoded(self, came: Any) -> torch.Tensor:
        """The rows that the runner computes with, in fp32."""
        from jit_kernels.row_quant.reference import fp4_rows, fp8_rows

        if self.path.rows is Rows.FP8:
            return fp8_rows(*came.hidden_states_pre_quant)
        if self.path.rows is Rows.FP4:
            scale = torch.tensor(2.0**9)
            return fp4_rows(came.hidden_states, came.hidden_states_scale, scale)
        return came.hidden_states
