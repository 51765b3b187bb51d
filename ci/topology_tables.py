"""The tables of docs/choose-a-topology.md: `python -m ci.topology_tables --write`.

Weights and KV cache of a rank by the arithmetic of `sglang-minimax inspect` on the published
configs, and bytes on their way to the experts by the plan that a launch takes. No torch, no SGLang.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from ci.lane.memory import Fit, census_of, fit
from sglang_minimax.cli.topology import architecture
from sglang_minimax.legality import Sizes
from sglang_minimax.loading.formats.table import markdown
from sglang_minimax.loading.report import Placing, spread
from sglang_minimax.moe_exchange import report
from sglang_minimax.moe_exchange.plan import ExchangePlan, default_of_sglang, plan_for
from sglang_minimax.support import Launch, refusals
from sglang_minimax.topology import Topology

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/choose-a-topology.md"
CONFIGS = ROOT / "ci/lanes/configs"
#: Format -> the published config that announces it.
FORMATS: Mapping[str, str] = {
    "FP8": "MiniMax-M2.7",
    "NVFP4": "MiniMax-M2.7-NVFP4",
    "BF16": "MiniMax-M2.7-BF16",
}
SHAPES = (
    *("tp=2", "tp=4", "tp=4,ep=4", "tp=4,dp=4,ep=4", "tp=8", "tp=8,ep=8", "tp=8,dp=8,ep=8"),
    *("tp=8,dp=4,ep=8", "tp=4,pp=2", "tp=16,nodes=2", "tp=16,ep=16,nodes=2"),
    *("tp=16,dp=2,ep=16,nodes=2", "tp=16,dp=16,ep=16,nodes=2", "tp=8,ep=8,pp=2,nodes=2"),
)
#: Memory of a device in GB of 10^9 bytes, and the share of it for weights and KV cache.
DEVICES = (80, 141, 192)
FRACTION = 0.85
HOPPER = 90


def arguments(topology: Topology) -> str:
    """The topology as options of `sglang.launch_server`."""
    options = {
        "--tp-size": topology.tp,
        "--attn-dp-size": topology.dp,
        "--ep-size": topology.ep,
        "--pp-size": topology.pp,
        "--nnodes": topology.nodes,
    }
    named = {name: size for name, size in options.items() if size > 1}
    return " ".join(f"{name} {size}" for name, size in named.items()) or "none"


def _sizes(shape: str) -> Sizes:
    return Sizes(**Topology.parse_sizes(shape))


@cache
def _fit(model: str, shape: str, memory: int) -> Fit:
    return fit(
        CONFIGS / model,
        _sizes(shape),
        memory=memory * 10**9,
        fraction=FRACTION,
        kv_dtype="bfloat16",
        requests=1,
        context=1,
    )


@cache
def memory() -> str:
    """Weights and KV cache of the fullest rank, FP8, and the tokens that all groups hold."""
    header = ("options", "weights", "padding", "KV a token", *(f"{gb} GB" for gb in DEVICES))
    return markdown(header, (tuple(_memory(shape)) for shape in SHAPES))


def _memory(shape: str) -> Iterator[str]:
    topology, model = Topology.parse(shape), FORMATS["FP8"]
    yield f"`{arguments(topology)}`"
    one = _fit(model, shape, DEVICES[0])
    yield f"{one.weights / 1e9:.2f} GB"
    more = _padding(model, shape)
    yield f"+{more:.1f} %" if more else "-"
    yield f"{one.kv_token:,} B"
    for gb in DEVICES:
        room = _fit(model, shape, gb).room * topology.dp
        yield f"{room / 1e6:.2f} M" if room else "no"


def _padding(model: str, shape: str) -> float:
    return spread(census_of(CONFIGS / model), Placing(_sizes(shape), False)).padding_percent


@cache
def formats() -> str:
    """Weights of the fullest rank by format."""
    header = ("options", *FORMATS)
    return markdown(header, (tuple(_formats(shape)) for shape in ("tp=1", *SHAPES)))


def _formats(shape: str) -> Iterator[str]:
    yield f"`{arguments(Topology.parse(shape))}`"
    for model in FORMATS.values():
        yield f"{_fit(model, shape, DEVICES[0]).weights / 1e9:.2f} GB"


@cache
def traffic() -> str:
    """Bytes that reach an average rank for each token in a layer: FP8, compute capability 9.0."""
    header = ("options", "path", "decode", "prefill", "SGLang's decode", "SGLang's prefill")
    return markdown(header, (tuple(_traffic(shape)) for shape in SHAPES))


def _traffic(shape: str) -> Iterator[str]:
    arch, topology = architecture(None), Topology.parse(shape)
    launch = Launch(
        tp=topology.tp,
        dp=topology.dp,
        ep=topology.ep,
        pp=topology.pp,
        nodes=topology.nodes,
        hardware="cuda",
        capability=HOPPER,
        quantization=arch.recipe.method,
    )
    if refused := refusals(arch, launch):
        raise ValueError(f"{shape}: {refused[0]}")
    yield f"`{arguments(topology)}`"
    ours = plan_for(arch, launch)
    yield f"`{ours.path.name}`"
    for plan in (ours, default_of_sglang(arch, launch)):
        yield from _received(plan, topology)


def _received(plan: ExchangePlan, topology: Topology) -> Iterator[str]:
    for _, batch in report.batches(topology):
        each = report.per_token(plan, topology, batch)
        yield "" if each is None else f"{each:,.0f}"


TABLES = {"memory": memory, "formats": formats, "traffic": traffic}


def rendered(page: str) -> str:
    """The page with its tables as the code computes them. ValueError where one has no place."""
    for name, table in TABLES.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(\n?<!-- /{name} -->)", re.DOTALL)
        if not place.search(page):
            raise ValueError(f"{PAGE.name} has no place for the table {name}")
        page = place.sub(rf"\g<1>{table()}\n<!-- /{name} -->", page)
    return page


def main() -> None:
    """Print the tables, or write them into the page."""
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(rendered(PAGE.read_text()))
    else:
        print("\n\n".join(table() for table in TABLES.values()))


if __name__ == "__main__":
    main()
