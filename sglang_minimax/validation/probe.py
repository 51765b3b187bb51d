"""Counts, inside each rank of an engine, what the outside cannot see; one JSON line a forward.

Installed in a rank's process before SGLang's scheduler is built (`watch`), whether that process
was forked or spawned. A record costs a few microseconds a collective and a line of text a forward,
since the ranks of a test share two cores. `observations` reads the lines again.

A collective is counted where the model asks for it, at SGLang's `GroupCoordinator`; what one of
those calls in its turn is not counted again.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

#: Environment variables by which a rank learns where to write, and what to compare itself with.
FOLDER = "SGLANG_MINIMAX_PROBE"
EXPECTATION = "SGLANG_MINIMAX_PROBE_EXPECTATION"

#: The methods of a group that move tensors, and which argument is what a rank gives.
OPERATIONS = {
    "all_reduce": 0,
    "reduce_scatter_tensor": 1,
    "reduce_scatterv": 0,
    "reduce_scatter": 1,
    "all_gather_into_tensor": 1,
    "all_gather": 0,
    "all_gatherv": 0,
    "all_to_all_single": 1,
    "broadcast": 0,
    "send_tensor_dict": 0,
    "recv_tensor_dict": 0,
    "_all_reduce_in_place": 0,
}


def watch(folder: Path, expectation: Path) -> Callable[[], None]:
    """A `before` for EngineProcess: each rank of the engine writes its records to `folder`.

    expectation: a JSON file for `ownership.check`: what each rank's weights are compared with.
    """

    return functools.partial(_watch, str(folder), str(expectation))


def _watch(folder: str, expectation: str) -> None:
    from sglang.srt.entrypoints.engine import Engine

    os.environ[FOLDER] = folder
    os.environ[EXPECTATION] = expectation
    Engine.run_scheduler_process_func = staticmethod(run_watched_scheduler)


def run_watched_scheduler(*arguments: Any, **keywords: Any) -> None:
    """SGLang's `run_scheduler_process` with the probe in place; a spawned rank finds it by name."""
    from sglang.srt.managers import scheduler

    Probe(Path(os.environ[FOLDER])).install()
    scheduler.run_scheduler_process(*arguments, **keywords)


class Probe:
    """The records of one rank."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: TextIO | None = None
        self._sites = ["scheduler"]
        self._inside = False
        self._counts: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
        self._sizes: set[tuple[int, ...]] = set()
        self._mixed = 0
        self._captured: tuple[int, ...] = ()

    def install(self) -> None:
        """Wrap SGLang's groups and scheduler, and our model, in this process."""
        from sglang.srt.distributed.parallel_state import GroupCoordinator
        from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
        from sglang.srt.managers.schedule_batch import ScheduleBatch
        from sglang.srt.managers.scheduler import Scheduler

        from sglang_minimax.layers.attention import MiniMaxM2Attention
        from sglang_minimax.layers.dispatch import all_to_all
        from sglang_minimax.layers.moe import MiniMaxM2MoE
        from sglang_minimax.models.minimax_m2 import MiniMaxM2DecoderLayer, MiniMaxM2ForCausalLM

        for operation, argument in OPERATIONS.items():
            self._count(GroupCoordinator, operation, argument)
        self._count(all_to_all, "all_to_all_single", OPERATIONS["all_to_all_single"])
        for owner, function, site in (
            (MiniMaxM2DecoderLayer, "forward", "boundary"),
            # What the last layer of a stage leaves to its successor is settled here instead.
            (residual_batch, "to_pp", "boundary"),
            (MiniMaxM2Attention, "forward", "qk_norm"),
            (MiniMaxM2MoE, "forward", "experts"),
        ):
            self._name_site(owner, function, site)
        self._record_forward(MiniMaxM2ForCausalLM)
        self._notice_mixing(ScheduleBatch)
        self._describe_when_ready(Scheduler)

    # --- collectives ---

    def _count(self, owner: Any, operation: str, argument: int) -> None:
        original = getattr(owner, operation)
        name = operation.removeprefix("_").removesuffix("_in_place")

        @functools.wraps(original)
        def counted(group: Any, *arguments: Any, **keywords: Any) -> Any:
            if self._inside or group.world_size == 1:
                return original(group, *arguments, **keywords)
            self._inside = True
            try:
                return original(group, *arguments, **keywords)
            finally:
                self._inside = False
                entry = self._counts.setdefault((self._sites[-1], name, tuple(group.ranks)), [0, 0])
                entry[0] += 1
                if len(arguments) > argument and hasattr(arguments[argument], "numel"):
                    given = arguments[argument]
                    entry[1] += given.numel() * given.element_size()
                if sizes := keywords.get("sizes"):
                    self._sizes.add(tuple(sizes))

        setattr(owner, operation, counted)

    def _name_site(self, owner: Any, function: str, site: str) -> None:
        original = getattr(owner, function)

        @functools.wraps(original)
        def named(*arguments: Any, **keywords: Any) -> Any:
            self._sites.append(site)
            try:
                return original(*arguments, **keywords)
            finally:
                self._sites.pop()

        setattr(owner, function, named)

    # --- forwards ---

    def _record_forward(self, owner: type) -> None:
        original = owner.forward  # type: ignore[attr-defined]
        switchable = isinstance(getattr(owner, "capture_aux_hidden_states", None), property)

        @functools.wraps(original)
        def forward(module: Any, input_ids: Any, positions: Any, batch: Any, *rest: Any, **kw: Any):
            began = time.monotonic()
            before = self._take()
            self._sites.append("model")
            if switchable:
                # As a server without a draft, except for requests that want what is captured.
                wanted = batch.capture_hidden_mode.need_capture()
                module.model.layers_to_capture = self._captured if wanted else ()
            try:
                return original(module, input_ids, positions, batch, *rest, **kw)
            finally:
                self._sites.pop()
                self._write(
                    {
                        "began": began,
                        **_batch(batch, positions),
                        "captured": list(getattr(module.model, "layers_to_capture", ())),
                        "mixed": self._mixed,
                        "sizes": sorted(self._sizes),
                        "outside": before,
                        "collectives": self._take(),
                    }
                )
                self._sizes.clear()
                self._mixed = 0

        owner.forward = forward  # type: ignore[attr-defined]

    def _take(self) -> list[list[Any]]:
        """[[site, operation, ranks, calls, bytes], ...] since the last time."""
        taken = [[site, op, ranks, *numbers] for (site, op, ranks), numbers in self._counts.items()]
        self._counts.clear()
        return taken

    def _notice_mixing(self, owner: type) -> None:
        """By the time of the forward a mixed batch looks like any other prefill."""
        original = owner.mix_with_running  # type: ignore[attr-defined]

        @functools.wraps(original)
        def mix_with_running(batch: Any, running: Any) -> None:
            self._mixed = len(running.reqs)
            original(batch, running)

        owner.mix_with_running = mix_with_running  # type: ignore[attr-defined]

    # --- the rank itself ---

    def _describe_when_ready(self, owner: type) -> None:
        original = owner.init_model_worker  # type: ignore[attr-defined]

        @functools.wraps(original)
        def init_model_worker(scheduler: Any) -> None:
            original(scheduler)
            self._counts.clear()
            runner = scheduler.tp_worker.model_runner
            self._write(_rank(runner))
            if captured := _expectation().captured:
                runner.model.set_eagle3_layers_to_capture(captured)
                self._captured = runner.model.model.layers_to_capture

        owner.init_model_worker = init_model_worker  # type: ignore[attr-defined]

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            import torch.distributed

            path = self._folder / f"rank-{torch.distributed.get_rank()}.jsonl"
            # Line by line: what a rank has seen outlives it, however it ends.
            self._file = path.open("a", buffering=1)
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")


def _batch(batch: Any, positions: Any) -> dict[str, Any]:
    """What this forward is for. tokens: of this rank's requests; rows: with padding."""
    from sglang.srt.runtime_context import get_parallel

    everyone = batch.original_global_num_tokens_cpu
    rows = int(positions.shape[-1])
    tokens = rows
    if everyone is not None:
        tokens = everyone[get_parallel().attn_dp_rank]
    padding = batch.dp_padding_mode
    padded = batch.global_num_tokens_padded_cpu
    return {
        "mode": batch.forward_mode.name,
        "tokens": tokens,
        "rows": rows,
        "groups": [rows] if padded is None else list(padded),
        "padding": None if padding is None else padding.name,
    }


def _expectation() -> Any:
    from sglang_minimax.validation import ownership

    return ownership.Expectation.read(Path(os.environ[EXPECTATION]))


def _rank(runner: Any) -> dict[str, Any]:
    """This rank's place in each group, its KV layers, and how its weights compare."""
    import torch.distributed
    from sglang.srt.runtime_context import get_parallel

    from sglang_minimax.layers.plan import plan_here
    from sglang_minimax.validation import ownership

    parallel = get_parallel()
    groups = {
        "tp": parallel.tp_group,
        "attention_tp": parallel.attn_tp_group,
        "moe_ep": parallel.moe_ep_group,
        "moe_tp": parallel.moe_tp_group,
        "pp": parallel.pp_group,
    }
    rank = torch.distributed.get_rank()
    return {
        "rank": rank,
        "groups": {kind: list(group.ranks) for kind, group in groups.items()},
        # A model that does not name its layers is taken to have all, as SGLang takes it.
        "layers": [
            getattr(runner.model, "start_layer", 0),
            getattr(runner.model, "end_layer", runner.model_config.num_hidden_layers),
        ],
        "kv_layers": runner.token_to_kv_pool.layer_num,
        "path": plan_here().path.name,
        "weights": ownership.check(runner.model, rank, Path(os.environ[EXPECTATION])),
    }
