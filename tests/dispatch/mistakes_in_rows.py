"""Plausible mistakes in what travels: padding, scales, ids, weights, and how rows are rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput

from jit_kernels.row_quant.reference import fp8_groups, fp8_rows
from sglang_minimax.layers.dispatch import codecs, dispatcher, factory, gather, packing
from sglang_minimax.layers.dispatch.packing import Parcel
from sglang_minimax.layers.dispatch.rows import RowCounts
from sglang_minimax.moe_exchange.paths import Movement, Path, Rows
from sglang_minimax.moe_exchange.payload import FP8_GROUP, Payload
from tests.dispatch import test_dispatch_paths as paths
from tests.dispatch.mistakes_in_moving import attention_tp_major

Patch = pytest.MonkeyPatch


# --- padding ---


def _on_arrival(patch: Patch, change: Callable[[Parcel], Parcel]) -> None:
    """Something done to what has arrived, before anybody reads it."""
    original = dispatcher.unpack
    patch.setattr(dispatcher, "unpack", lambda *arguments: change(original(*arguments)))


def weights_of_padding_stay(patch: Patch) -> None:
    """Id -1 becomes expert 0, with the weight that it had."""
    _on_arrival(patch, lambda parcel: parcel._replace(ids=parcel.ids.clamp_min(0)))


def ids_of_padding_stay(patch: Patch) -> None:
    """Id -1 goes to a runner whose kernels take it as an index."""

    def unwrap(self: Any, packed: torch.Tensor) -> StandardDispatchOutput:
        parcel = packing.unpack(self._payload, packed, self._codec.types)
        hidden_states, more = self._codec.hand_over(parcel.values, parcel.scales)
        chosen = StandardTopKOutput(parcel.weights, parcel.ids, parcel.weights[:0, 0])
        return self._standard.dispatch(hidden_states, chosen)._replace(**more)

    patch.setattr(dispatcher.RowDispatcher, "unwrap", unwrap)


def one_scale_for_the_batch(patch: Patch) -> None:
    """The scale of FP8 rows is of all of a rank's, so that what pads them decides it."""

    def encode(self: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scale = fp8_groups(rows.reshape(1, -1), max(rows.numel(), 1))
        groups = rows.shape[1] // FP8_GROUP
        return codes.view(rows.shape), scale.expand(rows.shape[0], groups).contiguous()

    patch.setattr(codecs.Fp8Codec, "encode", encode)


# --- scales, ids and weights ---


def scales_in_another_order(patch: Patch) -> None:
    """Codes are gathered over TP, their scales by attention-TP first."""
    original = gather.gather_rows

    def gather_rows(mine: torch.Tensor, counts: RowCounts) -> torch.Tensor:
        found = original(mine, counts)
        payload = Payload(Rows.FP8, paths.HIDDEN, paths.TOP_K, item_bytes=4)
        part = slice(payload.values, payload.values + payload.scales)
        found[:, part] = attention_tp_major(found[:, part].clone(), counts)
        return found

    patch.setattr(gather, "gather_rows", gather_rows)


def scales_gathered_by_column(patch: Patch) -> None:
    """Scales travel as they lie in memory, column by column, and are taken for one such tensor."""

    def columns(parcel: Parcel) -> Parcel:
        assert parcel.scales is not None
        ranks = parcel.scales.chunk(gather.get_parallel().tp_size)
        lying = torch.cat([each.t() for each in ranks]).reshape(parcel.scales.shape[::-1])
        return parcel._replace(scales=lying.t().contiguous())

    _on_arrival(patch, columns)


def routed_on_rounded_rows(patch: Patch) -> None:
    """Rows are routed where they arrive, as SGLang's opt-in FP8 gather does it."""

    def again(parcel: Parcel) -> Parcel:
        values = parcel.values
        if parcel.scales is not None:
            values = fp8_rows(values, parcel.scales)
        ids, weights = paths.routed(values)
        return parcel._replace(ids=ids, weights=weights)

    _on_arrival(patch, again)


def _before_packing(patch: Patch, change: Callable[[Parcel], Parcel]) -> None:
    original = dispatcher.pack
    patch.setattr(dispatcher, "pack", lambda payload, parcel: original(payload, change(parcel)))


def ids_in_one_byte(patch: Patch) -> None:
    """There are no more than 256 experts, but there is also id -1."""
    _before_packing(patch, lambda parcel: parcel._replace(ids=parcel.ids.to(torch.uint8)))


def ids_among_the_weights(patch: Patch) -> None:
    """Ids and weights travel in one fp32 tensor, and ids are read again as integers."""
    _before_packing(patch, lambda parcel: parcel._replace(ids=parcel.ids.float().view(torch.int32)))


def weights_in_bf16(patch: Patch) -> None:
    """Weights travel in 16 bits, like the rows of a server."""
    _on_arrival(patch, lambda parcel: parcel._replace(weights=parcel.weights.bfloat16().float()))


def weights_of_a_rank_sum_to_one(patch: Patch) -> None:
    """Weights are normalised again where they arrive, over the experts that the rank holds."""
    original = dispatcher.RowDispatcher.unwrap

    def unwrap(self: Any, packed: torch.Tensor) -> StandardDispatchOutput:
        came = original(self, packed)
        weights, ids, logits = came.topk_output
        held = weights.masked_fill(ids < 0, 0.0)
        held = held / held.sum(-1, keepdim=True).clamp_min(1e-20)
        return came._replace(topk_output=StandardTopKOutput(held, ids, logits))

    patch.setattr(dispatcher.RowDispatcher, "unwrap", unwrap)


def ids_of_all_ranks(patch: Patch) -> None:
    """SGLang's dispatcher, which turns ids into those of a rank's experts, is passed by."""

    def unwrap(self: Any, packed: torch.Tensor) -> StandardDispatchOutput:
        parcel = packing.unpack(self._payload, packed, self._codec.types)
        hidden_states, more = self._codec.hand_over(parcel.values, parcel.scales)
        chosen = StandardTopKOutput(parcel.weights, parcel.ids, parcel.weights[:0, 0])
        return StandardDispatchOutput(hidden_states, None, chosen)._replace(**more)

    patch.setattr(dispatcher.RowDispatcher, "unwrap", unwrap)


# --- rounding ---


def scale_of_the_whole_row(patch: Patch) -> None:
    """One e4m3 scale a row, repeated for its groups."""

    def encode(self: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = fp8_groups(rows, rows.shape[1])
        return codes, scales.expand(-1, rows.shape[1] // FP8_GROUP).contiguous()

    patch.setattr(codecs.Fp8Codec, "encode", encode)


def scale_that_rounds_instead_of_the_one_that_gives_back(patch: Patch) -> None:
    """The factor by which values became codes is sent, not its inverse."""
    original = codecs.Fp8Codec.encode

    def encode(self: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = original(self, rows)
        return codes, scales.reciprocal()

    patch.setattr(codecs.Fp8Codec, "encode", encode)


def rounded_on_arrival(patch: Patch) -> None:
    """Rows travel plain and are quantised by every rank: the same numbers, twice the bytes."""
    original = factory.dispatcher_for

    def dispatcher_for(path: Path, config: Any) -> Any:
        made: Any = original(Path(Movement.GATHER), config)

        def hand_over(values: torch.Tensor, scales: None) -> tuple[torch.Tensor, dict[str, Any]]:
            return values, {"hidden_states_pre_quant": fp8_groups(values)}

        made._codec.hand_over = hand_over
        return made

    patch.setattr(factory, "dispatcher_for", dispatcher_for)


def fp4_scale_of_own_experts(patch: Patch) -> None:
    """The global scale of FP4 rows is that of the experts that the rank holds."""
    original = codecs.Fp4Codec.__init__

    def __init__(self: Any, layer: Any) -> None:
        parallel = gather.get_parallel()
        own = layer.w13_input_scale.chunk(parallel.moe_ep_size)[parallel.moe_ep_rank]
        layer.w13_input_scale = own
        original(self, layer)

    patch.setattr(codecs.Fp4Codec, "__init__", __init__)


def fp4_scale_upside_down(patch: Patch) -> None:
    """The checkpoint's scale of the input is taken for the factor that makes codes."""
    patch.setattr(
        codecs, "fp4_blocks", lambda rows, scale, blocks=codecs.fp4_blocks: blocks(rows, 1 / scale)
    )
