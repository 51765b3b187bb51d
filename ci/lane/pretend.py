"""Resolve launches with SGLang's own ServerArgs as if this machine had the lane's devices.

`python -m ci.lane.pretend` reads a JSON list of cases and writes a JSON list of answers. SGLang is
imported once, before anything is pretended: at its import it decides which kernels to load, and
those need a driver. Each case is then a fork in which PyTorch says what a machine with these
devices says, SGLang's cached probes are asked again, and the platform is the one that SGLang would
have chosen. What an argument becomes is decided there and then; what a module decided at its
import is not, and nothing is computed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

#: Seconds for one case; observed 1 to 4.
LIMIT = 120.0
#: What the report shows of the resolved arguments.
FIELDS = (
    *("device", "attention_backend", "moe_runner_backend", "moe_a2a_backend", "kv_cache_dtype"),
    *("tp_size", "pp_size", "dp_size", "attn_dp_size", "ep_size", "mem_fraction_static"),
    *("chunked_prefill_size", "page_size", "speculative_algorithm", "watchdog_timeout"),
)


#: The parallel sizes that a command line names.
SIZES = ("tp_size", "pp_size", "dp_size", "attn_dp_size", "ep_size")


@dataclass(frozen=True)
class Case:
    """One launch. kind, name, capability, gfx, count, nbytes: of the devices of a node."""

    arguments: list[str]
    environment: dict[str, str]
    kind: str
    name: str
    capability: int | None
    gfx: str | None
    count: int
    nbytes: int


@dataclass(frozen=True)
class Answer:
    """What became of a case.

    parsed: whether SGLang's parser takes the arguments; old: those under a name that is not
    SGLang's own; sizes: SIZES as parsed. refused: what ended the resolution, a sentence a line.
    resolved: FIELDS. launch: the plugin's view of the arguments (`support.Launch`), for the checks
    without SGLang.
    """

    parsed: bool
    old: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    refused: str | None = None
    resolved: dict[str, Any] = field(default_factory=dict)
    launch: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Answer the cases on stdin."""
    cases = [Case(**each) for each in json.load(sys.stdin)]
    _import_sglang(all(case.kind == "cpu" for case in cases))
    answers = [_in_a_fork(case) for case in cases]
    json.dump([asdict(answer) for answer in answers], sys.stdout)


def _import_sglang(on_cpu: bool) -> None:
    """Everything that resolution imports later, while the machine is still what it is.

    on_cpu: the CPU platform is chosen by itself; for other lanes it must not be, since it changes
    arguments.
    """
    import torch

    if not on_cpu:
        torch.accelerator.is_available = lambda: True
        torch.accelerator.current_accelerator = lambda *_, **__: torch.device("cuda")
    import sglang.srt.entrypoints.engine
    import sglang.srt.server_args  # noqa: F401


def _in_a_fork(case: Case) -> Answer:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=lambda: there.send(asdict(answered(case))))
    process.start()
    there.close()
    try:
        if not here.poll(LIMIT):
            return Answer(False, refused=f"no answer within {LIMIT:.0f} s")
        return Answer(**here.recv())
    except EOFError:
        process.join(10)
        return Answer(False, refused=f"ended with status {process.exitcode}")
    finally:
        process.kill()
        process.join()


def answered(case: Case) -> Answer:
    """Parse and, unless only that is possible, resolve. To be called in a process of its own."""
    os.environ.update(case.environment)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = _parsed(case.arguments)
    except SystemExit:
        return Answer(False, refused=_last_line(said.getvalue()))
    if case.kind == "npu":
        return found
    if case.kind in ("cuda", "rocm"):
        pretend(case)
    try:
        with contextlib.redirect_stderr(said):
            resolved, launch = _resolved(case.arguments)
    except SystemExit as stop:
        return replace(found, refused=str(stop.code))
    except Exception as error:
        return replace(found, refused=" ".join(f"{type(error).__name__}: {error}".split()))
    return replace(found, resolved=resolved, launch=launch)


def _parsed(arguments: list[str]) -> Answer:
    """What the parser makes of them; SystemExit for what it does not know."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(prog="SGLang", allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    old = []
    for word in arguments:
        action = parser._option_string_actions.get(word)
        if action is None:
            continue
        own = f"--{action.dest.replace('_', '-')}"
        if type(action).__name__.startswith("Deprecated"):
            old.append(f"{word} is deprecated in SGLang")
        elif word != own and own in parser._option_string_actions:
            old.append(f"{word} is another name of {own}")
    with contextlib.redirect_stdout(io.StringIO()):
        parsed = parser.parse_args(arguments)
    return Answer(True, old, {name: getattr(parsed, name) for name in SIZES})


def pretend(case: Case) -> None:
    """Let PyTorch and SGLang's probes say what a machine with these devices would say."""
    import sglang.srt.platforms as platforms
    import torch
    from sglang.srt.utils import common

    assert case.capability is not None  # the schema demands it of CUDA and ROCm devices
    major, minor = divmod(case.capability, 10)
    properties = types.SimpleNamespace(
        name=case.name, total_memory=case.nbytes, major=major, minor=minor, uuid=""
    )
    if case.gfx is not None:
        properties.gcnArchName = case.gfx
    answers: Mapping[str, Any] = {
        "is_available": True,
        "device_count": case.count,
        "current_device": 0,
        "get_device_capability": (major, minor),
        "get_device_name": case.name,
        "get_device_properties": properties,
        "mem_get_info": (case.nbytes, case.nbytes),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    if case.kind == "rocm":
        torch.version.hip, torch.version.cuda = "7.0", None
        common.get_amdgpu_memory_capacity = lambda: case.nbytes / 2**20
    for probe in vars(common).values():
        if hasattr(probe, "cache_clear"):
            probe.cache_clear()
    platforms._current_platform = (
        platforms.RocmSRTPlatform() if case.kind == "rocm" else platforms.CudaSRTPlatform()
    )


def _resolved(arguments: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import prepare_server_args

    from sglang_minimax.patches.arguments import launch_of

    server_args = prepare_server_args(arguments)
    server_args.resolve_once()
    view = resolving_view(server_args)
    launch = asdict(launch_of(server_args))
    launch.pop("facts")
    plain = {name: _plain(getattr(view, name)) for name in FIELDS}
    return plain, launch


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.strip().splitlines()) if line), "no reason given")


if __name__ == "__main__":
    main()
