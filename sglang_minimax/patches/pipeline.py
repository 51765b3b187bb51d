"""Weight updates through pipeline stages: all stages hear of one before the first one answers.

SGLang's stages process a request, then hand it on, so that the first stage would answer an update
before the second one has heard of it. Here an update is handed on first, and all stages meet in it.
A stage may still wait for the outputs of an older batch, which the one before it sends a round
later; so the first stage holds an update back until the pipeline has run dry.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from sglang.srt.managers.io_struct import (
    UpdateWeightFromDiskReqInput,
    UpdateWeightFromDiskReqOutput,
    UpdateWeightsFromDistributedReqInput,
    UpdateWeightsFromDistributedReqOutput,
    UpdateWeightsFromTensorReqInput,
    UpdateWeightsFromTensorReqOutput,
)
from sglang.srt.runtime_context import get_parallel

ANSWERS = {
    UpdateWeightFromDiskReqInput: UpdateWeightFromDiskReqOutput,
    UpdateWeightsFromDistributedReqInput: UpdateWeightsFromDistributedReqOutput,
    UpdateWeightsFromTensorReqInput: UpdateWeightsFromTensorReqOutput,
}
# How long an update waits for requests to leave the stages. SGLang's tokenizer process sends none
# before they are done, except while generation is paused.
PATIENCE = 5.0
BUSY = (
    "requests are still in the pipeline stages; finish or abort them, then call again.\n"
    "Nothing was changed."
)


def hand_updates_on_first(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `Scheduler.process_input_requests(recv_reqs)`, which each stage calls once a round."""

    @functools.wraps(original)
    def process_input_requests(self: Any, recv_reqs: list[Any]) -> None:
        if get_parallel().pp_size == 1 or not _judges_updates(self):
            return original(self, recv_reqs)
        if get_parallel().pp_rank == 0:
            _hold_back_until_dry(self, recv_reqs)
        if not self.pp_group.is_last_rank and _first_update(recv_reqs) is not None:
            self._pp_commit_comm_work(self.send_req_work)
            self.send_req_work = self._pp_send_pyobj_to_next_stage(recv_reqs, async_send=True)
            self._minimax_handed_on = recv_reqs
        return original(self, recv_reqs)

    return process_input_requests


def send_once(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Wrap `SchedulerPPMixin._pp_send_pyobj_to_next_stage`: not again what was handed on above."""

    @functools.wraps(original)
    def _pp_send_pyobj_to_next_stage(self: Any, data: Any, async_send: bool = False) -> list[Any]:
        handed_on = getattr(self, "_minimax_handed_on", None)
        if handed_on is not None and data is handed_on:
            self._minimax_handed_on = None
            return []
        return original(self, data, async_send)

    return _pp_send_pyobj_to_next_stage


def _judges_updates(scheduler: Any) -> bool:
    """Whether the model is ours; others are updated as SGLang does it."""
    return hasattr(scheduler.tp_worker.model_runner.model, "weight_problems")


def _first_update(requests: list[Any]) -> int | None:
    return next((i for i, request in enumerate(requests) if type(request) in ANSWERS), None)


def _hold_back_until_dry(scheduler: Any, requests: list[Any]) -> None:
    """Move an update, and all after it, from `requests` to the next round while stages are busy.

    Outputs travel one stage a round, so the last stage is done as many quiet rounds later.
    """
    quiet = scheduler.is_fully_idle(ignore_waiting=scheduler._engine_paused)
    quiet = quiet and scheduler.pp_outputs is None
    rounds = getattr(scheduler, "_minimax_quiet_rounds", 0) + 1 if quiet else 0
    scheduler._minimax_quiet_rounds = rounds
    first = _first_update(requests)
    if first is None:
        return
    since = getattr(scheduler, "_minimax_held_since", None) or time.monotonic()
    scheduler._minimax_held_since = since
    dry, late = _all_of_stage(
        first == 0 and rounds > get_parallel().pp_size, time.monotonic() - since > PATIENCE
    )
    if dry:
        scheduler._minimax_held_since = None
        return
    if late:
        scheduler._minimax_held_since = None
        request = requests.pop(first)
        answer = ANSWERS[type(request)](success=False, message=BUSY)
        scheduler.send_control_output(answer, request)
    scheduler._deferred_input_requests[:0] = requests[first:]
    del requests[first:]


def _all_of_stage(dry: bool, late: bool) -> tuple[bool, bool]:
    """Whether all ranks of this stage are dry, and whether one of them has waited too long."""
    group = get_parallel().tp_group
    found: list[Any] = [None] * group.world_size
    if group.world_size == 1:
        return dry, late
    dist.all_gather_object(found, (dry, late), group=group.cpu_group)
    return all(rank[0] for rank in found), any(rank[1] for rank in found)
