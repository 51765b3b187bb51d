"""Weight updates of a running engine: a call is judged on all ranks before its first byte is
written, and one that does not fit changes nothing and answers with the list.

SGLang's loaders pad what is short and report success; each of its ranks decides alone; and an
exception ends the scheduler. The three functions here take the place of the scheduler's handlers
and keep their effects: the session, the weight version, the flush of the cache. A draft keeps its
weights, which are of another checkpoint, unless a call asks for it by name.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import msgspec
from sglang.srt.managers.io_struct import (
    InitWeightsUpdateGroupReqOutput,
    UpdateWeightFromDiskReqOutput,
    UpdateWeightsFromDistributedReqOutput,
    UpdateWeightsFromTensorReqOutput,
)
from sglang.srt.runtime_context import get_parallel

from sglang_minimax.errors import LoadError
from sglang_minimax.loading.direct import direct_problems
from sglang_minimax.loading.problems import Problems
from sglang_minimax.patches import disk_updates
from sglang_minimax.patches.agreement import reason_not_to_meet, together
from sglang_minimax.patches.incoming import (
    DIRECT,
    DISK_FORMATS,
    GROUP_FORMATS,
    TENSOR_FORMATS,
    Pairs,
    check_format,
    from_announcement,
    from_payload,
)

logger = logging.getLogger(__name__)

Runners = list[tuple[str, Any]]
Answer = tuple[bool, str]

UNCHANGED = "Nothing was changed."
UNCHANGED_HERE = (
    "Nothing was changed on this replica; another one may have taken the call, so repeat it."
)
PARTLY = (
    "Some of the call's weights may have been written; repeat the call, or update from a "
    "checkpoint on disk, before the next request."
)


def our_models(runners: Runners) -> list[Any]:
    """The models among them that can judge weights before they are written."""
    models = [runner.weight_updater.get_model() for _, runner in runners]
    return [model for model in models if hasattr(model, "weight_problems")]


def _refusal(problems: Problems) -> Answer:
    unchanged = UNCHANGED_HERE if get_parallel().dp_size > 1 else UNCHANGED
    message = f"{problems.error()}\n{unchanged}"
    logger.error("weight update refused: %s", message)
    return False, message


def _if_ranks_can_meet(
    update: Callable[[Any, Any, Runners], Answer], manager: Any, request: Any, runners: Runners
) -> Answer:
    """Run `update`, unless the ranks hear of a call at different times."""
    if reason := reason_not_to_meet():
        return False, f"{reason}\n{UNCHANGED}"
    return update(manager, request, runners)


def _check_idle(manager: Any, request: Any) -> None:
    """Raise LoadError where the cache could not be flushed afterwards; SGLang finds out too late.

    Cached keys and values of old weights would be used with new ones.
    """
    scheduler = manager.scheduler
    if not request.flush_cache or scheduler is None:
        return
    if not manager.is_fully_idle(ignore_waiting=scheduler._engine_paused):
        raise LoadError(
            "requests are still running or queued, so that the cache cannot be flushed after the "
            "update; wait for them, or pass flush_cache=false."
        )


def _write(manager: Any, request: Any, runners: Runners, load: Callable[[Any], Answer]) -> Answer:
    """Load what all ranks have found right into each runner, and answer for all ranks."""

    def step(problems: Problems) -> None:
        for _, runner in runners:
            success, message = load(runner.weight_updater)
            if not success:
                problems.say(message)
                return

    _, failed = together(step)
    if failed:
        message = f"{failed.error()}\n{PARTLY}"
        logger.error("weight update failed: %s", message)
        # Whatever was written, what is cached was computed with other weights.
        manager.flush_cache_after_weight_update(request, True, message)
        return False, message
    manager._session = msgspec.structs.replace(manager._session, loaded_weights=True)
    manager.record_weight_version_after_update(request.weight_version)
    return manager.flush_cache_after_weight_update(
        request, True, "Succeeded to update parameter online."
    )


def _judge(problems: Problems, runners: Runners, pairs: Pairs, load_format: str | None) -> None:
    for model in our_models(runners):
        if load_format == DIRECT:
            problems.take(direct_problems(dict(model.named_parameters()), pairs))
        else:
            problems.take(model.weight_problems(pairs))


def leave_drafts_alone(original: Callable[..., Runners]) -> Callable[..., Runners]:
    """Wrap `SchedulerWeightUpdaterManager._select_runners(selector)`.

    By default SGLang loads what the target gets into its draft too, which is right for drafts that
    come in the target's checkpoint. An Eagle3 draft has its own, and some of its tensors have the
    same names: it would take the target's final norm, and stop at the head.
    """

    @functools.wraps(original)
    def _select_runners(self: Any, selector: str = "all") -> Runners:
        runners = original(self, selector)
        if selector == "all" and our_models(runners):
            return [(role, runner) for role, runner in runners if role != "draft"]
        return runners

    return _select_runners


# --- from tensors ---


def judge_tensors_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace `SchedulerWeightUpdaterManager.update_weights_from_tensor(recv_req)` for ours."""

    @functools.wraps(original)
    def update_weights_from_tensor(self: Any, recv_req: Any) -> Any:
        runners = self._select_runners(recv_req.selector)
        if self._session is None or not our_models(runners):
            return original(self, recv_req)
        with self._observe_weight_load("tensor"):
            success, message = _if_ranks_can_meet(_from_tensor, self, recv_req, runners)
            return UpdateWeightsFromTensorReqOutput(success=success, message=message)

    return update_weights_from_tensor


def _from_tensor(manager: Any, request: Any, runners: Runners) -> Answer:
    load_format = request.load_format

    def look(problems: Problems) -> Pairs:
        _check_idle(manager, request)
        check_format(load_format, TENSOR_FORMATS)
        if load_format == DIRECT and get_parallel().pp_size > 1:
            raise LoadError(
                "load_format 'direct' looks for each parameter on each pipeline stage; use none."
            )
        payload = _open_payload(manager.tp_worker, request.serialized_named_tensors)
        pairs = from_payload(payload, load_format, get_parallel().tp_rank)
        _judge(problems, runners, pairs, load_format)
        return pairs

    pairs, refused = together(look)
    if refused:
        return _refusal(refused)
    # A bucket has been unpacked.
    known = load_format if load_format == DIRECT else None

    def load(updater: Any) -> Answer:
        if known == DIRECT:
            # The copies do not come through the model, which keeps account.
            for model in our_models(runners):
                model.post_load_weights()
        return updater.update_weights_from_tensor(named_tensors=pairs, load_format=known)

    return _write(manager, request, runners, load)


def _open_payload(worker: Any, payloads: list[bytes]) -> Any:
    """This rank's payload, opened; once only, because its producer counts. Raises LoadError.

    payloads: one for each rank, those of the first pipeline stage first; or one for each TP rank,
    which every stage opens, if it is of a kind that can be opened more than once.
    """
    parallel = get_parallel()
    tp, ranks = parallel.tp_size, parallel.tp_size * parallel.pp_size
    if len(payloads) not in (tp, ranks):
        raise LoadError(
            f"the call brings tensors for {len(payloads)} ranks, but there are {ranks}; send one "
            "payload for each."
        )
    stage = parallel.pp_rank if len(payloads) == ranks else 0
    try:
        return worker.deserialize_own_rank(payloads[stage * tp : (stage + 1) * tp])
    except Exception as error:
        hint = f"; send {ranks}, one for each rank" if len(payloads) < ranks else ""
        raise LoadError(
            f"the tensors of this rank cannot be unpacked ({type(error).__name__}: {error}){hint}."
        ) from error


# --- from a process group ---


def judge_announcement_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace `SchedulerWeightUpdaterManager.update_weights_from_distributed(recv_req)` for ours.

    What does not fit is received all the same and dropped: the sender is in the middle of its
    broadcasts, and would wait for us, or give the next call the tensors of this one. Only what
    cannot be received (no such group, no type of that name) is refused without.
    """

    @functools.wraps(original)
    def update_weights_from_distributed(self: Any, recv_req: Any) -> Any:
        runners = self._select_runners(recv_req.selector)
        if self._session is None or not our_models(runners):
            return original(self, recv_req)
        with self._observe_weight_load("distributed"):
            success, message = _if_ranks_can_meet(_from_distributed, self, recv_req, runners)
            return UpdateWeightsFromDistributedReqOutput(success=success, message=message)

    return update_weights_from_distributed


def _from_distributed(manager: Any, request: Any, runners: Runners) -> Answer:
    receiver = manager.tp_worker.model_runner.weight_updater

    def announce(problems: Problems) -> Pairs:
        check_format(request.load_format, GROUP_FORMATS)
        if request.group_name not in receiver._model_update_group:
            raise LoadError(
                f"there is no group {request.group_name!r}; call init_weights_update_group first."
            )
        return from_announcement(request.names, request.dtypes, request.shapes)

    announced, unreceivable = together(announce)
    if unreceivable:
        unreceivable.say("Nothing was received: the sender has to destroy the group if it waits.")
        return _refusal(unreceivable)

    def look(problems: Problems) -> None:
        _check_idle(manager, request)
        _judge(problems, runners, announced or [], None)

    _, refused = together(look)

    def receive(problems: Problems) -> Pairs:
        weights = receiver.receive_weights_from_distributed(
            names=request.names,
            dtypes=request.dtypes,
            shapes=request.shapes,
            group_name=request.group_name,
            load_format=request.load_format,
        )
        if not refused:
            # Again, because only now there are values.
            _judge(problems, runners, weights, None)
        return weights

    weights, failed = together(receive)
    if refused or failed:
        return _refusal(refused or failed)
    return _write(
        manager, request, runners, lambda updater: updater.load_weights_from_distributed(weights)
    )


def refuse_a_group_of_stages(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `SchedulerWeightUpdaterManager.init_weights_update_group(recv_req)`.

    SGLang gives the ranks of every pipeline stage the same numbers in the group, so that the first
    stage joins and the second one waits until it is killed.
    """

    @functools.wraps(original)
    def init_weights_update_group(self: Any, recv_req: Any) -> Any:
        stages = get_parallel().pp_size
        if not our_models(self._select_runners()):
            return original(self, recv_req)
        try:
            if stages == 1:
                return original(self, recv_req)
            message = (
                f"SGLang cannot number the ranks of {stages} pipeline stages in one group; use "
                "update_weights_from_tensor or _from_disk, or --pp-size 1."
            )
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        logger.error("no group for weight updates: %s", message)
        return InitWeightsUpdateGroupReqOutput(success=False, message=message)

    return init_weights_update_group


# --- from disk ---


def judge_checkpoint_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace `SchedulerWeightUpdaterManager.update_weights_from_disk(recv_req)` for our model."""

    @functools.wraps(original)
    def update_weights_from_disk(self: Any, recv_req: Any) -> Any:
        runners = self._select_runners()
        if not our_models(runners):
            return original(self, recv_req)
        with self._observe_weight_load("disk"):
            success, message = _if_ranks_can_meet(_from_disk, self, recv_req, runners)
            return UpdateWeightFromDiskReqOutput(
                success=success, message=message, num_paused_requests=0
            )

    return update_weights_from_disk


def _from_disk(manager: Any, request: Any, runners: Runners) -> Answer:
    path, load_format = request.model_path, request.load_format

    def look(problems: Problems) -> None:
        _check_idle(manager, request)
        check_format(load_format, DISK_FORMATS)
        for _, runner in runners:
            problems.take(disk_updates.problems_of(runner.weight_updater, path, load_format))

    _, refused = together(look)
    if refused:
        return _refusal(refused)
    recapture = request.recapture_cuda_graph
    success, message, flush = True, "", False
    for _, runner in runners:
        success, message, flush = disk_updates.load_or_go_back(
            runner.weight_updater, path, load_format, recapture
        )
    if success:
        manager.record_weight_version_after_update(request.weight_version)
    if flush:
        success, message = manager.flush_cache_after_weight_update(request, success, message)
    if not success:
        logger.error(message)
    return success, message
