"""Whether a lane's launches would start, as far as a machine without its devices can tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ci.lane import LaneError
from ci.lane.launch import arguments_to_check, config_folder
from ci.lane.memory import Fit, fit
from ci.lane.pretend import Answer, Case
from ci.lane.schema import Lane
from sglang_minimax.cli.topology import architecture
from sglang_minimax.config import Architecture
from sglang_minimax.legality import Sizes
from sglang_minimax.moe_exchange.plan import plan_for
from sglang_minimax.support import Launch, notes, refusals

#: Seconds for all cases; the import of SGLang is most of it.
LIMIT = 900.0
HARDWARE = {"npu": "ascend"}  # `support.Launch` says ascend
UNCHECKED = (
    "unchecked here: everything that depends on the GPU generation beyond SGLang's own choice of "
    "arguments (kernels, CUDA graphs, NCCL, collectives over several devices), and the memory that "
    "these take"
)
DRAFT = "the draft's own weights and cache are not in the arithmetic of memory"
PARSED_ONLY = "only parsed: SGLang resolves arguments for an NPU with torch_npu alone"


@dataclass
class Finding:
    """What is known of one variant: `problems` speak against it, `unchecked` is what is not."""

    lane: str
    variant: str
    answer: Answer
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    exchange: str = ""
    fit: Fit | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "room": self.fit.room if self.fit else None}


def check(lanes: Sequence[Lane]) -> list[Finding]:
    """Look at every variant of the lanes. Raises LaneError where SGLang cannot be asked."""
    pairs = [(lane, variant) for lane in lanes for variant in lane.variants]
    cases = [case_of(lane, variant) for lane, variant in pairs]
    answers = ask(cases)
    return [
        finding(lane, variant, answer)
        for (lane, variant), answer in zip(pairs, answers, strict=True)
    ]


def case_of(lane: Lane, variant: str) -> Case:
    """What `pretend` is asked of a variant."""
    hardware = lane.hardware
    return Case(
        arguments=arguments_to_check(lane, variant),
        environment=lane.environment_of(variant),
        kind=hardware.kind,
        name=hardware.device,
        capability=hardware.version,
        gfx=hardware.gfx,
        count=hardware.per_node,
        nbytes=int(hardware.memory_gb * 1e9),
    )


def ask(cases: Sequence[Case]) -> list[Answer]:
    """SGLang's answers, in order; CPU lanes are asked in a process of their own."""
    answers: dict[int, Answer] = {}
    for on_cpu in (False, True):
        mine = [(i, case) for i, case in enumerate(cases) if (case.kind == "cpu") == on_cpu]
        if mine:
            found = _ask([case for _, case in mine])
            answers.update({i: answer for (i, _), answer in zip(mine, found, strict=True)})
    return [answers[i] for i in range(len(cases))]


def _ask(cases: list[Case]) -> list[Answer]:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ci.lane.pretend"],
            input=json.dumps([asdict(case) for case in cases]),
            capture_output=True,
            text=True,
            timeout=LIMIT,
            cwd=Path(__file__).parents[2],
            # What decides the platform is read when SGLang is imported.
            env={**os.environ, **(cases[0].environment if cases[0].kind == "cpu" else {})},
        )
    except subprocess.TimeoutExpired as error:
        raise LaneError(f"SGLang's arguments were not resolved within {LIMIT:.0f} s.") from error
    try:
        return [Answer(**each) for each in json.loads(done.stdout.strip().splitlines()[-1])]
    except (ValueError, IndexError) as error:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise LaneError(f"SGLang's arguments could not be asked for; it said: {last}") from error


def finding(lane: Lane, variant: str, answer: Answer) -> Finding:
    """Judge a variant by SGLang's answer, the plan, and the arithmetic of memory."""
    found = Finding(lane.name, variant, answer)
    found.problems += _sentences(answer)
    if not answer.parsed:
        return found
    found.problems += _ranks(lane, answer)
    if lane.hardware.kind == "npu":
        found.unchecked.append(PARSED_ONLY)
    elif lane.hardware.kind != "cpu":
        found.unchecked.append(UNCHECKED)
    if lane.draft is not None:
        found.unchecked.append(DRAFT)
    folder = config_folder(lane.model)
    arch = architecture(folder)
    launch = launch_of(lane, arch, answer)
    obstacles = refusals(arch, launch)
    # SGLang's resolution runs the same checks with what it has decided, and says so first.
    if answer.refused is None:
        found.problems += obstacles
    if not obstacles:
        plan = plan_for(arch, launch)
        found.exchange = f"{plan.path.name}, experts by {plan.runner}"
        found.notes += notes(arch, launch)
        found.notes += _changed(lane, variant, answer)
        found.fit = _fit(lane, variant, folder, launch, answer)
        if complaint := found.fit.complaint:
            found.problems.append(complaint)
    return found


def _sentences(answer: Answer) -> Iterator[str]:
    for name in answer.old:
        yield f"{name}; use SGLang's own name for it."
    step = "resolve" if answer.parsed else "parse"
    for line in (answer.refused or "").splitlines():
        yield f"SGLang does not {step} these arguments: {line}"


def _changed(lane: Lane, variant: str, answer: Answer) -> Iterator[str]:
    """What SGLang makes another number of, which a reader of the lane file would not expect."""
    asked: Any = lane.options_of(variant).get("mem-fraction-static")
    found = answer.resolved.get("mem_fraction_static")
    if asked and found and abs(asked - found) > 1e-6:
        yield f"SGLang makes {found:.4g} of --mem-fraction-static {asked:g} with these arguments."


def _ranks(lane: Lane, answer: Answer) -> Iterator[str]:
    """SGLang would only find out while it starts ranks on devices that are not there."""
    tp, pp, replicas = (answer.sizes[f"{name}_size"] for name in ("tp", "pp", "dp"))
    ranks = tp * pp * replicas
    devices = lane.hardware.per_node * lane.hardware.nodes
    if lane.hardware.kind != "cpu" and ranks != devices:
        yield (
            f"the launch has {ranks} ranks (TP {tp} x PP {pp} x {replicas} replicas), and the lane "
            f"{devices} devices; make them equal."
        )


def launch_of(lane: Lane, arch: Architecture, answer: Answer) -> Launch:
    """The launch as SGLang resolved it; where it did not, as it was asked for."""
    known = {each.name for each in fields(Launch)} - {"facts"}
    values = {k: v for k, v in answer.launch.items() if k in known}
    if "needs_sglang" in values:
        values["needs_sglang"] = tuple(values["needs_sglang"])
    if values:
        return Launch(**values)
    return Launch(
        tp=answer.sizes["tp_size"],
        pp=answer.sizes["pp_size"],
        dp=answer.sizes["attn_dp_size"],
        ep=answer.sizes["ep_size"],
        nodes=lane.hardware.nodes,
        quantization=arch.recipe.method,
        hardware=HARDWARE.get(lane.hardware.kind, lane.hardware.kind),
        capability=lane.hardware.capability,
    )


def _fit(lane: Lane, variant: str, folder: Path, launch: Launch, answer: Answer) -> Fit:
    options = lane.options_of(variant)
    fraction: Any = answer.resolved.get("mem_fraction_static")
    fraction = fraction or options.get("mem-fraction-static") or 0.8
    named: Any = options.get("kv-cache-dtype", "auto")
    return fit(
        folder,
        Sizes(launch.tp, launch.dp, launch.ep, launch.pp, launch.nodes),
        memory=int(lane.hardware.memory_gb * 1e9),
        fraction=float(fraction),
        kv_dtype=str(answer.resolved.get("kv_cache_dtype", named)),
        requests=lane.load.requests,
        context=lane.load.context,
        dp_lm_head=bool(options.get("enable-dp-lm-head")),
    )
