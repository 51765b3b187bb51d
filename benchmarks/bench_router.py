"""How long does the router take: ours, and as SGLang launches it?

    python -m benchmarks.bench_router           # on a GPU
    python -m benchmarks.bench_router --cpu     # what runs without one

The published shape: bf16 hidden states of 3072, an fp32 gate for 256 experts, top 8. In-tree casts
the hidden states to fp32, multiplies them in TF32 (srt/models/minimax_m2.py; its override of
enable_tf32_matmul in srt/arg_groups/model_overrides/minimax_m2.py), and routes with
kernels/ops/moe/moe_fused_gate.py. The second baseline multiplies in fp32. How a call is timed is in
benchmarks/kernel_timing.py. Each path's experts are compared with those of fp64 before it is timed;
the share of tokens for which it chooses others is a column, since that is what a coarser product
costs.

--cpu compares the reference with in-tree's steps written in PyTorch, on one thread, since neither
our kernel nor in-tree's runs there. It says nothing of a GPU.

Writes results/router_<device>.json and .png.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from benchmarks import common, kernel_timing, prologue_plot
from benchmarks.kernel_timing import COLD, HOT, PROCESS, WALL
from jit_kernels.router import op, reference
from jit_kernels.router import triton as ours
from jit_kernels.router.contract import Call, Request, Routing

EXPERTS, HIDDEN, TOP_K = 256, 3072, 8
TOKENS = (1, 2, 8, 16, 32, 64, 128, 512, 2048, 8192, 16384)
CPU_TOKENS = (1, 16, 128, 512)
#: The aim: so many times as fast as in-tree for up to so many tokens.
FASTER, DECODE_TOKENS = 2.0, 64
#: A path that chooses other experts for more tokens than this computes another function. On these
#: inputs weights rounded to bf16 do for 1.6 % of tokens, to TF32 for 0.2 %, fp32 arithmetic for 0.
MOST_OTHERS = 0.005

IN_TREE, IN_TREE_FP32, STEPS = "in-tree", "in-tree in fp32", "in-tree's steps in PyTorch"
BASELINES = (IN_TREE, IN_TREE_FP32, STEPS)
WHAT = {
    ours.NAME: "two launches: products on tensor cores without loss, then the choice",
    reference.NAME: "plain PyTorch: cast, product, sigmoid, stable sort, gather, division",
    IN_TREE: "what SGLang launches: cast, TF32 product, fused sigmoid and top-k",
    IN_TREE_FP32: "the same with the product in fp32",
    STEPS: "in-tree's native path: cast, product, sigmoid, torch.topk, gather, division",
}

Row = dict[str, Any]


class NotTimed(RuntimeError):
    """The path does not run here; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """One layer's router: hidden [tokens, 3072] bf16, weight [256, 3072] fp32, bias [256] fp32."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    def bytes_moved(self) -> int:
        """The hidden states, the gate and the bias read once; logits, ids and weights written once.

        In-tree leaves the logits behind, and so does our operator in a server.
        """
        gate = self.weight.numel() * 4 + self.bias.numel() * 4
        return self.hidden.numel() * 2 + gate + self.tokens * (EXPERTS * 4 + TOP_K * 8)


def make(tokens: int, device: torch.device) -> Inputs:
    """Random inputs: logits of about 1, scores of 0.3 to 0.7, and a bias of a tenth of that."""
    generator = torch.Generator("cpu").manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    weight = torch.randn(EXPERTS, HIDDEN, generator=generator) * HIDDEN**-0.5
    bias = torch.randn(EXPERTS, generator=generator) * 0.02
    return Inputs(hidden.to(device), weight.to(device), bias.to(device))


Route = Callable[[Inputs], Callable[[], Routing]]


def implementation(name: str) -> Route:
    """One of ours, compiled, with the logits that a server has it fill."""

    def prepared(inputs: Inputs) -> Callable[[], Routing]:
        x = inputs.hidden
        capability = None
        if x.device.type == "cuda" and torch.version.hip is None:
            capability = torch.cuda.get_device_capability(x.device)
        request = Request(x.device.type, x.dtype, EXPERTS, HIDDEN, TOP_K, capability=capability)
        try:
            choice = op.choose(request, name)
        except op.KernelUnavailable as error:
            raise NotTimed(str(error)) from error

        def run() -> Routing:
            logits = x.new_empty((inputs.tokens, EXPERTS), dtype=torch.float32)
            return op.route(choice, x, inputs.weight, inputs.bias, top_k=TOP_K, logits=logits)

        return run

    return prepared


def in_tree(*, tf32: bool) -> Route:
    """SGLang's cast, product and fused gate, which is Triton or CUDA by its own choice."""

    def prepared(inputs: Inputs) -> Callable[[], Routing]:
        try:
            gate = importlib.import_module("sglang.kernels.ops.moe.moe_fused_gate").moe_fused_gate
        except Exception as error:  # imports of a large package fail in many ways
            raise NotTimed(f"{type(error).__name__}: {error}") from error

        def run() -> Routing:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            try:
                logits = F.linear(inputs.hidden.to(torch.float32), inputs.weight)
            finally:
                torch.backends.cuda.matmul.allow_tf32 = False
            return Routing(*gate(logits, inputs.bias, topk=TOP_K, scoring_func="sigmoid"))

        return run

    return prepared


def steps(inputs: Inputs) -> Callable[[], Routing]:
    """What in-tree's native path computes, operation by operation."""

    def run() -> Routing:
        scores = F.linear(inputs.hidden.to(torch.float32), inputs.weight).sigmoid()
        ids = torch.topk(scores + inputs.bias, TOP_K, dim=-1, sorted=False).indices
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(weights, ids.to(torch.int32))

    return run


def paths(device: torch.device) -> dict[str, Route]:
    """The paths that are timed on a device."""
    if device.type == "cpu":
        return {reference.NAME: implementation(reference.NAME), STEPS: steps}
    return {
        ours.NAME: implementation(ours.NAME),
        IN_TREE: in_tree(tf32=True),
        IN_TREE_FP32: in_tree(tf32=False),
    }


def others(found: Routing, inputs: Inputs) -> float:
    """The share of tokens for which fp64 chooses other experts than `found`."""
    call = Call(inputs.hidden, inputs.weight, inputs.bias, TOP_K)
    exact = reference.run(call, torch.float64).ids.long().sort(dim=-1).values
    return float((found.ids.long().sort(dim=-1).values != exact).any(-1).double().mean())


def measure(inputs: Inputs, bandwidth: float, replays: int) -> list[Row]:
    """A row for each path; "refuses" says why where one has no times."""
    device = inputs.hidden.device
    rows: list[Row] = []
    able: list[tuple[Row, Callable[[], Routing]]] = []
    for name, route in paths(device).items():
        row: Row = {"tokens": inputs.tokens, "path": name, "bytes": inputs.bytes_moved()}
        rows.append(row)
        try:
            work = route(inputs)
            row["others"] = others(work(), inputs)
        except NotTimed as refusal:
            row["refuses"] = str(refusal)
            continue
        if row["others"] > max(MOST_OTHERS, 1.5 / inputs.tokens):
            row["refuses"] = f"wrong: other experts for {row['others']:.1%} of tokens"
            continue
        able.append((row, work))
    if device.type == "cuda":
        for row, work in able:
            row["microseconds"] = kernel_timing.time_call(work, device, replays=replays)
    else:
        several = kernel_timing.in_turn([work for _, work in able])
        for (row, _), times in zip(able, several, strict=True):
            row["microseconds"] = times
    finish([row for row, _ in able], bandwidth)
    return rows


def ratios(baseline: kernel_timing.Times, mine: kernel_timing.Times) -> dict[str, float]:
    """How many times as fast ours is, by kind of run."""
    return {kind: round(kernel_timing.ratio(baseline, mine, kind), 3) for kind in mine}


def finish(rows: list[Row], bandwidth: float) -> None:
    """Add rates, and ratios to each baseline, to the timed rows of one number of tokens."""
    times = {row["path"]: row["microseconds"] for row in rows}
    for row in rows:
        mine = times[row["path"]]
        row["gbps"] = {
            kind: round(kernel_timing.gigabytes_per_second(row["bytes"], spread.median), 3)
            for kind, spread in mine.items()
        }
        row["copy_share"] = {kind: round(g / bandwidth, 5) for kind, g in row["gbps"].items()}
        if row["path"] not in BASELINES:
            row["ratio"] = {name: ratios(times[name], mine) for name in BASELINES if name in times}
    for row in rows:
        row["microseconds"] = kernel_timing.rounded(row["microseconds"])


def aim(rows: list[Row]) -> str:
    """The aim, and what was found of it."""
    asked = f"at least {FASTER} times as fast as in-tree for up to {DECODE_TOKENS} tokens"
    found = [
        ratio
        for row in rows
        if row["path"] == ours.NAME and row["tokens"] <= DECODE_TOKENS
        for ratio in row.get("ratio", {}).get(IN_TREE, {}).values()
    ]
    if not found:
        return f"not measured: {asked}"
    verdict = "met" if min(found) >= FASTER else "NOT MET"
    return f"{verdict}: {asked}; {min(found):.2f} times at least"


def table(rows: list[Row], device: torch.device) -> Table:
    """One line for each path and number of tokens."""
    kinds = (HOT, COLD) if device.type == "cuda" else (WALL, PROCESS)
    rated = kinds[-1]
    found = Table(
        title=f"router, microseconds, median; rates and ratios {rated}",
        title_justify="left",
        box=box.SIMPLE,
    )
    baselines = [name for name in BASELINES if any(row["path"] == name for row in rows)]
    found.add_column("tokens", justify="right")
    found.add_column("path")
    for name in (*kinds, "GB/s", "of copy", *(f"x {name}" for name in baselines), "others"):
        found.add_column(name, justify="right")
    for row in rows:
        if "refuses" in row:
            found.add_row(str(row["tokens"]), row["path"], "refuses")
            continue
        faster = (row.get("ratio", {}).get(name, {}).get(rated) for name in baselines)
        found.add_row(
            str(row["tokens"]),
            row["path"],
            *(f"{row['microseconds'][kind]['median']:.2f}" for kind in kinds),
            f"{row['gbps'][rated]:,.3g}",
            f"{row['copy_share'][rated]:.0%}",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in faster),
            f"{row['others']:.2%}",
        )
    return found


def draw(path: Path) -> Path:
    """Draw the JSON file at `path`, beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data = json.loads(path.read_text())
    kinds = (HOT, COLD) if data["device"]["type"] == "cuda" else (PROCESS,)
    figure, axes = pyplot.subplots(
        1, len(kinds), figsize=(4.6 * len(kinds), 3.4), layout="constrained", squeeze=False
    )
    for axis, kind in zip(axes.flat, kinds, strict=True):
        lines: dict[str, list[prologue_plot.Point]] = {}
        for row in data["rows"]:
            if times := row.get("microseconds", {}).get(kind):
                point = (row["tokens"], times["median"], times["low"], times["high"])
                lines.setdefault(row["path"], []).append(point)
        prologue_plot.times(axis, lines)
        axis.set_title(f"{kind}{' L2' if kind in (HOT, COLD) else ' time'}", fontsize=9)
    machine = f"{data['device']['name']}, {data['provenance']['date']}"
    figure.suptitle(f"router; {machine}", fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    pyplot.close(figure)
    return path.with_suffix(".png")


def main(
    cpu: Annotated[bool, typer.Option("--cpu", help="Compare what runs without a GPU.")] = False,
    tokens: Annotated[list[int] | None, typer.Option(help="Repeatable.")] = None,
    replays: Annotated[int, typer.Option(help="Of each graph.")] = kernel_timing.REPLAYS,
    results: Annotated[Path, typer.Option(help="Folder of what is written.")] = common.RESULTS,
) -> None:
    """Measure, print the table, write the JSON and its plot."""
    console = Console(width=max(Console().width, 140))
    device = kernel_timing.device_of_run(cpu)
    bandwidth = kernel_timing.copy_bandwidth(device)
    rows: list[Row] = []
    with torch.inference_mode():
        for count in tokens or (CPU_TOKENS if cpu else TOKENS):
            rows += measure(make(count, device), bandwidth, replays)
    console.print(table(rows, device))
    for line in {f"{row['path']}: {row['refuses']}": None for row in rows if "refuses" in row}:
        console.print(line, soft_wrap=True, markup=False)
    if not cpu:
        console.print(aim(rows), soft_wrap=True)
    if results == common.RESULTS and tokens:
        console.print("nothing written: a part is not a result, unless --results names a folder")
        return
    written = common.write(
        f"router_{kernel_timing.slug(device)}",
        rows,
        folder=results,
        device=kernel_timing.device_facts(device),
        copy_gbps=round(bandwidth, 1),
        replays=kernel_timing.CPU_RUNS if cpu else replays,
        bytes=" ".join((Inputs.bytes_moved.__doc__ or "").split()),
        paths={name: WHAT[name] for name in paths(device)},
        aim=None if cpu else aim(rows),
    )
    console.print(written.name, draw(written).name)


if __name__ == "__main__":
    typer.run(main)
