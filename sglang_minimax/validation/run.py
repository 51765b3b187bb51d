"""Run one shape: start its engine, send the workload, judge replies and what the ranks recorded."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from sglang_minimax.config import Architecture
from sglang_minimax.errors import MinimaxError
from sglang_minimax.moe_exchange.plan import plan_for
from sglang_minimax.moe_exchange.rules import CPU, VARIABLE
from sglang_minimax.platforms import choice
from sglang_minimax.support import Launch
from sglang_minimax.topology import RankShare, Topology, rank_shares
from sglang_minimax.validation import (
    expectations,
    hosts,
    ledger,
    observations,
    ownership,
    probe,
    workloads,
)
from sglang_minimax.validation.engine_process import EngineFailed, EngineProcess
from sglang_minimax.validation.judge import Verdict, judge
from sglang_minimax.validation.observations import RankRecord, Window
from sglang_minimax.validation.shapes import Refused, Shape, arguments
from sglang_minimax.validation.subject import Subject, refuse_what_does_not_fit
from sglang_minimax.validation.workloads import Step

Status = Literal["ok", "failed", "refused", "not run"]

#: The last line of a stack trace.
_ERROR = re.compile(r"[\w.]*(Error|Exception)\b")

#: Seconds that an engine may take to start, or to answer a step.
TIMEOUT = 300.0


@dataclass(frozen=True, slots=True)
class ShapeResult:
    """Everything that is known of one shape after it ran.

    status: "ok", "failed" (see shortcomings), "refused" (at launch) or "not run"; reason: why, for
    the last two. max_error: the largest difference of a log-probability from transformers'.
    collectives: a layer, of a decode step on the busiest rank; bytes_a_token: what that rank gives
    to collectives for one token of such a step, over all layers and the head. idle: step -> ranks
    without tokens. kv_layers: of each pipeline stage.
    """

    topology: str
    model: str
    status: Status
    reason: str = ""
    expected: bool = True
    max_error: float | None = None
    tolerance: float | None = None
    batch_difference: float | None = None
    tokens_equal: bool | None = None
    distributions: int = 0
    near_ties: int = 0
    collectives: float | None = None
    bytes_a_token: float | None = None
    idle: dict[str, list[int]] = field(default_factory=dict)
    kv_layers: tuple[int, ...] = ()
    operations: dict[str, int] = field(default_factory=dict)
    parameters_compared: int = 0
    seconds: float = 0.0
    shortcomings: tuple[str, ...] = ()

    @property
    def falls_short(self) -> bool:
        """Whether this result makes a run fail: it failed, or was refused unexpectedly."""
        return self.status == "failed" or not self.expected


def refusal(shape: Shape, arch: Architecture) -> str | None:
    """Why `arch` cannot run in this shape, in one sentence; nothing is started to find out."""
    try:
        topology = shape.sizes()
        rank_shares(arch, topology)
        refuse_what_does_not_fit(arch, topology)
        if arch.max_position < workloads.LONGEST:
            return (
                f"config: max_position_embeddings is {arch.max_position}, but the longest request "
                f"here takes {workloads.LONGEST} tokens; use that many."
            )
    except MinimaxError as error:
        return str(error)
    return None


def run_shape(
    shape: Shape,
    subject: Subject,
    *,
    before: Callable[[], None] | None = None,
    timeout: float = TIMEOUT,
) -> ShapeResult:
    """Run `shape` with `subject` and say how it did; never raises for what an engine does.

    `refusal` and `why_not_here` have been asked before. before: called in the engine's process
    before it is built, to plant a mistake for example.
    """
    began = time.monotonic()
    blank = ShapeResult(topology=shape.name, model=subject.name, status="ok")
    topology = shape.sizes()
    shares = rank_shares(subject.arch, topology, dp_lm_head="dp_lm_head" in shape.switches)
    with tempfile.TemporaryDirectory(prefix="minimax-validate-") as folder:
        run = _Run(shape, subject, topology, shares, Path(folder), before, timeout)
        try:
            result = run.result(blank)
        except EngineFailed as error:
            result = _engine_failed(blank, error)
            if result.status == "failed":
                seen = tuple(run.astray())
                result = replace(result, shortcomings=(*result.shortcomings, *seen))
    return replace(result, seconds=time.monotonic() - began)


def run_refused(place: Refused, subject: Subject, *, timeout: float = TIMEOUT) -> ShapeResult:
    """Start a shape that must be refused; the sentence that refuses it is the reason."""
    began = time.monotonic()
    blank = ShapeResult(topology=place.label, model=subject.name, status="refused")
    try:
        force = partial(_force, forced_path(place))
        with EngineProcess(before=force, timeout=timeout, **_arguments(place, subject)):
            result = replace(
                blank, status="failed", shortcomings=("started, although it should be refused",)
            )
    except EngineFailed as error:
        result = _engine_failed(blank, error)
        if result.status == "refused":
            as_listed = place.says in result.reason
            wrong = () if as_listed else (f"refused without the words {place.says!r}",)
            result = replace(result, expected=as_listed, shortcomings=wrong)
    return replace(result, seconds=time.monotonic() - began)


def why_not_here(topology: Topology) -> str | None:
    """Why this machine cannot run a topology, None if it can."""
    on_cpu = choice.cpu_platform_chosen()
    if topology.nodes > 2 or (topology.nodes == 2 and not on_cpu):
        return f"{topology.nodes} hosts: this command makes two at most, on the CPU platform"
    if topology.nodes == 2 and (reason := hosts.reason_not_to()):
        return f"two hosts: {reason}"
    if on_cpu:
        return None
    devices = torch.accelerator.device_count()
    if topology.world_size > devices:
        return f"{topology.world_size} ranks on a machine with {devices} GPUs"
    return None


def forced_path(place: Shape | Refused) -> str | None:
    """The path to the experts that a place names, or else this process's environment."""
    return place.exchange or os.environ.get(VARIABLE) or None


def _force(path: str | None) -> None:
    if path is not None:
        os.environ[VARIABLE] = path


def _engine_failed(blank: ShapeResult, error: EngineFailed) -> ShapeResult:
    """A refusal, where the process left with sentences of ours; else a failure."""
    said = [line for line in error.log.splitlines() if line.startswith("sglang-minimax: ")]
    if error.exit_code and said and "Traceback" not in error.log:
        reason = " ".join(line.removeprefix("sglang-minimax: ") for line in said)
        return replace(blank, status="refused", reason=reason, expected=False)
    first, *_ = str(error).splitlines()
    said = [line.strip() for line in error.log.splitlines() if _ERROR.match(line)]
    # A rank that ends takes the others with it, and their complaint about that says nothing.
    cause = [line for line in said if "Connection closed by peer" not in line] or said
    return replace(blank, status="failed", shortcomings=(": ".join((first, *cause[:1])),))


def _arguments(place: Shape | Refused, subject: Subject) -> dict[str, Any]:
    """SGLang's arguments for every shape; it divides the chunk by the attention-DP groups."""
    groups = place.sizes_or_none()
    found = {
        "model_path": str(subject.folder),
        "skip_tokenizer_init": True,
        "log_level": "info",
        "chunked_prefill_size": workloads.CHUNK * (groups.dp if groups else 1),
        "enable_mixed_chunk": True,
        "max_running_requests": 32,
        "enable_return_hidden_states": groups is not None and groups.pp == 1,
        "max_total_tokens": 2048,
        **arguments(place),
        **place.arguments,
    }
    # Attention kernels of GPUs want 16 bits.
    found["dtype"] = "float32" if choice.cpu_platform_chosen() else "bfloat16"
    return found


@dataclass(frozen=True, slots=True)
class _Run:
    """One engine's life."""

    shape: Shape
    subject: Subject
    topology: Topology
    shares: tuple[RankShare, ...]
    folder: Path
    before: Callable[[], None] | None
    timeout: float

    def result(self, blank: ShapeResult) -> ShapeResult:
        """Start, ask, stop, judge."""
        steps = workloads.plan(
            self.subject.arch.vocab_size, self.topology.dp, capture=bool(self.captured)
        )
        replies, windows = self._ask(steps)
        records = observations.read(self.folder)
        verdict = judge(self.subject, replies, self._dtype(), self.captured)
        timed = list(zip(steps, windows, strict=True))
        traffic = _traffic(records, windows[1])
        shortcomings = [*verdict.shortcomings, *self._inside(records, timed)]
        return replace(
            _numbers(blank, verdict),
            status="failed" if shortcomings else "ok",
            shortcomings=tuple(shortcomings),
            idle=expectations.idle_ranks(records, timed),
            kv_layers=tuple(
                record.kv_layers for record in records if record.rank % self.topology.tp == 0
            ),
            operations=_operations(records),
            parameters_compared=sum(record.weights["parameters"] for record in records),
            collectives=traffic[0],
            bytes_a_token=traffic[1],
        )

    @property
    def exchange(self) -> ledger.Exchange:
        """How rows move on the CPU platform by the plan, made here again from the shape alone."""
        launch = Launch(
            **asdict(self.topology),
            quantization=self.subject.arch.recipe.method,
            moe_exchange=forced_path(self.shape),
            hardware=CPU,
        )
        plan = plan_for(self.subject.arch, launch)
        payload = replace(plan.payload, item_bytes=self._dtype().itemsize)
        return ledger.Exchange(self.topology, plan.path, payload)

    @property
    def captured(self) -> tuple[int, ...]:
        """The layers whose outputs are captured: all, unless stages share them."""
        return tuple(self.shares[0].layers) if self.topology.pp == 1 else ()

    def _ask(
        self, steps: Sequence[Step]
    ) -> tuple[list[tuple[Step, list[dict[str, Any]]]], list[Window]]:
        expectation = self.folder / "expectation.json"
        ownership.Expectation(
            checkpoint=str(self.subject.folder),
            topology=str(self.topology),
            dp_lm_head="dp_lm_head" in self.shape.switches,
            captured=self.captured,
        ).write(expectation)
        replies, windows = [], []
        vocabulary = self.subject.arch.vocab_size
        with self._engine(
            before=partial(
                _in_turn,
                partial(_force, forced_path(self.shape)),
                self.before,
                probe.watch(self.folder, expectation),
            ),
            timeout=self.timeout,
            **_arguments(self.shape, self.subject),
        ) as engine:
            for step in steps:
                began = time.monotonic()
                requests = [each.arguments(vocabulary, self.topology.dp) for each in step.requests]
                replies.append((step, engine.generate_together(requests)))
                windows.append(Window(step.name, began, time.monotonic()))
        return replies, windows

    def _engine(self, **arguments: Any) -> AbstractContextManager[EngineProcess]:
        """The engine, or the first host of it where there are two."""
        return (hosts.two_hosts if self.topology.nodes == 2 else EngineProcess)(**arguments)

    def _inside(
        self, records: Sequence[RankRecord], steps: Sequence[tuple[Step, Window]]
    ) -> Iterator[str]:
        yield from observations.misplaced(records, self.shares)
        yield from expectations.zero_tokens(self.shares, records, steps)
        yield from expectations.chunks(self.shares, records, steps)
        if self.shape.combine:
            yield from expectations.combine(self.shape.combine, records)
        for record in records:
            yield from expectations.stages(self.shares[record.rank], record.forwards)
        if not choice.cpu_platform_chosen():
            return  # a GPU has faster ways, which fuse or replace these collectives
        for record in records:
            if record.path != self.exchange.path.name:
                yield (
                    f"rank {record.rank} takes the path {record.path} to the experts, but the plan "
                    f"says {self.exchange.path.name}"
                )
            yield from ledger.collectives(
                self.exchange,
                self.shares[record.rank],
                record.forwards,
                dp_lm_head="dp_lm_head" in self.shape.switches,
            )

    def astray(self) -> Iterator[str]:
        """What the ranks of an engine that ended had asked of groups that they should not."""
        if not choice.cpu_platform_chosen():
            return
        for record in observations.read(self.folder):
            yield from ledger.astray(self.exchange, self.shares[record.rank], record.forwards)

    def _dtype(self) -> torch.dtype:
        if choice.cpu_platform_chosen():
            return torch.float32
        return torch.bfloat16


def _in_turn(*hooks: Callable[[], None] | None) -> None:
    """The caller's hook first, so that the probe counts what it leads to."""
    for hook in hooks:
        if hook is not None:
            hook()


def _numbers(blank: ShapeResult, verdict: Verdict) -> ShapeResult:
    return replace(
        blank,
        max_error=verdict.max_error,
        tolerance=verdict.tolerance,
        batch_difference=verdict.batch_difference,
        tokens_equal=verdict.tokens_equal,
        distributions=verdict.distributions,
        near_ties=verdict.near_ties,
    )


def _operations(records: Sequence[RankRecord]) -> dict[str, int]:
    """Calls of each operation inside layers, over all ranks and forwards."""
    found: dict[str, int] = {}
    for record in records:
        for forward in record.forwards:
            for each in forward.collectives:
                if each.in_a_layer:
                    found[each.operation] = found.get(each.operation, 0) + each.calls
    return found


def _traffic(records: Sequence[RankRecord], alone: Window) -> tuple[float, float]:
    """(collectives a layer, bytes a token) of a lone decode, on the rank that needs most."""
    collectives, traffic = 0.0, 0.0
    for record in records:
        for forward in alone.of(record.forwards):
            if forward.mode == "DECODE" and forward.tokens:
                calls = sum(each.calls for each in forward.collectives if each.in_a_layer)
                given = sum(each.bytes for each in forward.collectives)
                collectives = max(collectives, calls / len(record.layers))
                traffic = max(traffic, given / forward.tokens)
    return collectives, traffic
