"""A channel over the attention-TP group, where its devices share one NVLink domain.

One channel serves all layers of a process: they run one after the other on one stream. It is
opened where the first layer is built, which all ranks of a group do in the same order, and lives
until the process ends, when the driver takes it back.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.distributed.device_communicators.custom_all_reduce_utils import (
    is_full_nvlink,
    is_one_nvlink_clique,
)
from sglang.srt.distributed.parallel_state import in_the_same_node_as
from sglang.srt.environ import envs
from sglang.srt.runtime_context import get_exec, get_parallel, get_server_args

from jit_kernels.choice import KernelUnavailable
from jit_kernels.qk_norm_rope.channel import open_channel
from sglang_minimax.layers.agreeing import Gather, first_problem
from sglang_minimax.layers.path import Opening
from sglang_minimax.moe_exchange.paths import CUSTOMIZED


def open_to_peers(device: torch.device, gather: Gather[Any]) -> Opening:
    """A channel over the attention-TP group, or why there is none. Collective.

    device: this rank's CUDA device.
    """
    if get_server_args().enable_pdmux:
        return Opening(None, "--enable-pdmux runs prefill and decode on two streams at once")
    group = get_parallel().attn_tp_group
    reason = _outside_one_domain(device, group.cpu_group, gather)
    if reason:
        return Opening(None, reason)
    backend = get_exec().moe.moe_a2a_backend
    try:
        channel = open_channel(
            group.device_group,
            first_problem(gather),
            device,
            alone=_alone(get_server_args(), backend),
        )
    except KernelUnavailable as error:
        return Opening(None, str(error), failed=True)
    return Opening(channel, "")


def _alone(arguments: Any, backend: str) -> bool:
    """Whether nothing beside the exchange waits for a peer: kernels on other streams need room.

    Pipeline stages send and receive, EPLB moves experts, SGLang's dispatch backends poll, and
    disaggregated servers hand caches over while batches run, and schedulers can be told to agree on
    the next batch by NCCL meanwhile. Collectives of the forward itself, our dispatchers' among
    them, come after it on the same stream.

    backend: --moe-a2a-backend as resolved; an option for something else may have asked for DeepEP.
    """
    return (
        arguments.pp_size == 1
        and not arguments.enable_eplb
        and backend in ("none", CUSTOMIZED)
        and arguments.disaggregation_mode == "null"
        and not envs.SGLANG_NCCL_ALL_GATHER_IN_OVERLAP_SCHEDULER_SYNC_BATCH.get()
    )


def _outside_one_domain(device: torch.device, cpu_group: Any, gather: Gather[Any]) -> str:
    """Why the group is not one NVLink domain, the same answer on all ranks; empty where it is.

    Stores over PCIe would arrive too, but slower than the two launches they replace.
    """
    if not all(in_the_same_node_as(cpu_group, source_rank=0)):
        one = is_one_nvlink_clique(cpu_group, device)
        return "" if one else "the attention-TP group spans NVLink domains"
    try:
        own: int | str = torch.cuda._get_nvml_device_index(device)
    except Exception as error:  # no NVML, or devices that it cannot tell apart
        own = f"NVML does not know this device ({error})"
    ids = gather(own)
    linked, problem = False, next((each for each in ids if isinstance(each, str)), "")
    if not problem:
        try:
            linked = is_full_nvlink(ids, len(ids))
        except Exception as error:
            problem = f"NVML does not tell how devices are linked ({error})"
    if not linked and not problem:
        problem = "the devices of the attention-TP group are not linked by NVLink"
    return first_problem(gather)(problem)
