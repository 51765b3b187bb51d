"""What `sglang-minimax doctor` examines, and how it shows it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import logging
import os
import platform as python_platform
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from sglang_minimax import ARCHITECTURE, SUPPORTED_SGLANG, plugin, upstream
from sglang_minimax.config import Architecture
from sglang_minimax.platforms import choice
from sglang_minimax.topology import AttentionShard

#: Distributions that decide what runs. The first group must be there.
REQUIRED = ("sglang", "torch", "transformers", "safetensors", "triton")
OPTIONAL = ("sglang-kernel", "flashinfer-python", "sgl-deep-ep", "sgl-deep-gemm", "apache-tvm-ffi")
#: Environment that changes how SGLang finds us.
ENVIRONMENT = (
    "SGLANG_MINIMAX",
    "SGLANG_MINIMAX_QK_NORM",
    "SGLANG_MINIMAX_ROUTER",
    "SGLANG_PLATFORM",
    "SGLANG_PLUGINS",
    "SGLANG_EXTERNAL_MODEL_PACKAGE",
    "SGLANG_USE_CPU_ENGINE",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
)


@dataclass
class Report:
    """Everything that doctor found. `problems` are sentences that end with a remedy."""

    versions: dict[str, str | None] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    platform: dict[str, str] = field(default_factory=dict)
    model_class: str | None = None
    kernels: list[dict[str, str]] = field(default_factory=list)
    patches: list[dict[str, str]] = field(default_factory=list)
    moved_symbols: list[dict[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values, with `ok` first."""
        return {"ok": not self.problems, **asdict(self)}


def examine() -> Report:
    """Import SGLang, attach every hook, and report. Nothing is started and nothing listens."""
    report = Report(versions=_versions())
    report.environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    if not plugin.enabled():
        report.problems.append("SGLANG_MINIMAX=0 switches the plugin off; unset it to use it.")
        return report
    if problem := plugin.version_problem():
        report.problems.append(problem)
    missing = [name for name in REQUIRED if report.versions[name] is None]
    if missing:
        report.problems.append(
            f"not installed: {', '.join(missing)}; run `pip install sglang=={SUPPORTED_SGLANG}`."
        )
        return report
    with _quiet():
        report.devices = _devices()
        report.platform = _platform(report)
        report.patches = _patches(report)
        report.moved_symbols = _moved_symbols(report)
        report.model_class = _model_class(report)
        report.kernels = _kernels()
    _check_doors(report)
    return report


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": python_platform.python_version()}
    for name in ("sglang-minimax", *REQUIRED, *OPTIONAL):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _devices() -> list[str]:
    import torch

    kind = choice.accelerator()
    if kind is None:
        return [f"cpu: {len(os.sched_getaffinity(0))} cores"]
    module = torch.get_device_module(kind)
    return [
        f"{kind}:{index}: {module.get_device_name(index)}" for index in range(module.device_count())
    ]


def _platform(report: Report) -> dict[str, str]:
    chosen, why = choice.explain()
    try:
        from sglang.srt.platforms import current_platform
    except Exception as error:
        report.problems.append(f"SGLang finds no platform ({error}); unset SGLANG_PLATFORM.")
        return {"active": "none", "why": str(error)}
    active = type(current_platform).__name__
    if chosen and active != "MinimaxCpuPlatform":
        report.problems.append(
            f"the CPU platform should be active ({why}), but SGLang runs {active}; "
            f"set SGLANG_PLATFORM={choice.PLATFORM_NAME}."
        )
    return {"active": active, "minimax_cpu": "chosen" if chosen else "not chosen", "why": why}


def _patches(report: Report) -> list[dict[str, str]]:
    for entry in upstream.entries():
        with contextlib.suppress(ImportError):
            importlib.import_module(entry.module)
    status = plugin.status()
    report.problems += [p for p in plugin.problems() if p not in report.problems]
    return [
        {
            "target": entry.target,
            "kind": type(entry).__name__.lower(),
            "status": status.get(entry.target, "not needed here"),
            "why": entry.why,
        }
        for entry in upstream.entries()
    ]


def _moved_symbols(report: Report) -> list[dict[str, str]]:
    moved = [
        {"symbol": symbol, "expected": expected, "found": found}
        for symbol, (expected, found) in upstream.moved_symbols().items()
    ]
    if moved:
        report.problems.append(
            f"{len(moved)} SGLang symbols differ from release {SUPPORTED_SGLANG}, the first is "
            f"{moved[0]['symbol']}; run `pip install --force-reinstall sglang=={SUPPORTED_SGLANG}`."
        )
    return moved


def _model_class(report: Report) -> str | None:
    from sglang.srt.models.registry import ModelRegistry

    try:
        found = ModelRegistry.resolve_model_cls([ARCHITECTURE])[0]
    except SystemExit as error:
        report.problems.append(str(error))
        return None
    name = f"{found.__module__}.{found.__name__}"
    if not name.startswith("sglang_minimax."):
        report.problems.append(
            f"SGLang would serve {name}; reinstall sglang-minimax in the server's environment."
        )
    return name


def _kernels() -> list[dict[str, str]]:
    """Which implementation of each operator can serve the published shape on this machine.

    The prologue on one rank, and in a group of the most common size. Nothing is compiled: an
    implementation that is usable may still fall back when a server starts.
    """
    import torch

    from jit_kernels.qk_norm_rope import op as prologue
    from jit_kernels.router import op as router
    from sglang_minimax.layers.agreeing import kind_and_capability
    from sglang_minimax.layers.path import EXCHANGING

    device, capability = kind_and_capability(torch.device(choice.accelerator() or "cpu"))
    # An empty config has the architecture's values.
    arch = Architecture.from_config({})

    def before_attention(size: int) -> prologue.Request:
        shard = AttentionShard(size, 0, arch.head_dim, arch.num_heads, arch.num_kv_heads)
        return prologue.Request(
            device=device,
            dtype=torch.bfloat16,
            q_heads=shard.q_heads,
            kv_heads=shard.kv_heads,
            head_dim=shard.head_dim,
            rotary_dim=arch.rotary_dim,
            cache_dtype=torch.bfloat16,
            group_size=shard.size,
            capability=capability,
        )

    before_experts = router.Request(
        device=device,
        dtype=torch.bfloat16,
        experts=arch.num_experts,
        hidden=arch.hidden_size,
        top_k=arch.top_k,
        capability=capability,
    )
    rows = []
    for size in (1, 8):
        for each in prologue.IMPLEMENTATIONS:
            # Links are known to a server alone.
            yes = "yes, if linked by NVLink" if size > 1 and each.name == EXCHANGING else "yes"
            answer = each.refusal(before_attention(size)) or yes
            rows.append(("qk_norm_rope", f"attention-TP {size}", each.name, answer))
    for route in router.IMPLEMENTATIONS:
        answer = route.refusal(before_experts) or "yes"
        rows.append(("router", "any", route.name, answer))
    columns = ("operator", "ranks", "implementation", "usable")
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _check_doors(report: Report) -> None:
    found = {
        (entry.group, entry.name)
        for entry in importlib.metadata.distribution("sglang-minimax").entry_points
    }
    for door in (
        ("sglang.srt.plugins", "minimax"),
        ("sglang.srt.platforms", "minimax_cpu"),
        ("torch.backends", "sglang_minimax"),
    ):
        if door not in found:
            report.problems.append(
                f"the entry point {door[1]} of group {door[0]} is missing; "
                "reinstall with `pip install --force-reinstall --no-deps sglang-minimax`."
            )
    filtered = "SGLANG_PLUGINS" in report.environment or "SGLANG_PLATFORM" in report.environment
    if report.environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0" and filtered:
        report.problems.append(
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0 together with SGLANG_PLUGINS or SGLANG_PLATFORM can "
            "keep the plugin out of a server; unset the first."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Imports of SGLang print warnings about hardware that is not here."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def show(report: Report) -> None:
    """Print the report as tables, problems last."""
    console = Console()
    console.print(_pairs("versions", {k: v or "-" for k, v in report.versions.items()}))
    if report.environment:
        console.print(_pairs("environment", report.environment))
    facts = {
        "devices": ", ".join(report.devices) or "-",
        "platform": f"{report.platform.get('active', '-')} ({report.platform.get('why', '-')})",
        ARCHITECTURE: report.model_class or "-",
    }
    console.print(_pairs("what runs", facts))
    console.print(_rows("kernels", report.kernels))
    console.print(_rows("hooks into SGLang", report.patches))
    if report.moved_symbols:
        console.print(_rows("SGLang symbols that moved", report.moved_symbols))
    for problem in report.problems:
        console.print(f"[bold red]problem[/] {problem}")
    if not report.problems:
        console.print("[bold green]ok[/] MiniMax-M2 will be served by sglang-minimax")


def _pairs(title: str, values: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in values.items():
        table.add_row(name, value)
    return table


def _rows(title: str, rows: list[dict[str, str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in rows[0] if rows else ():
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    return table
