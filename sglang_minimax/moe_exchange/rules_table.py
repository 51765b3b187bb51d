"""The tables of docs/communication.md: `python -m sglang_minimax.moe_exchange.rules_table`.

Each cell is what `plan_for` and `moves` make of a launch, with published sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sglang_minimax.config import Architecture
from sglang_minimax.loading.formats.table import markdown
from sglang_minimax.moe_exchange import report
from sglang_minimax.moe_exchange.plan import default_of_sglang, plan_for
from sglang_minimax.support import Launch, refusals
from sglang_minimax.topology import Topology

#: Checkpoint -> its quantisation config.
CHECKPOINTS: Mapping[str, Mapping[str, Any] | None] = {
    "FP8 in 128x128 blocks": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "FP8 per tensor": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "NVFP4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "AWQ": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    "BF16": None,
}
GPUS = (80, 90, 100, 120)
TOPOLOGIES = tuple(
    map(
        Topology.parse,
        (
            *("tp=8", "tp=16,nodes=2", "tp=8,dp=8,ep=8", "tp=8,dp=4,ep=8"),
            *("tp=16,dp=2,ep=16,nodes=2", "tp=16,dp=16,ep=16,nodes=2"),
        ),
    )
)


def _arch(config: Mapping[str, Any] | None) -> Architecture:
    quantised = {"quantization_config": config} if config else {}
    return Architecture.from_config({"head_dim": 128, **quantised})


def _launch(arch: Architecture, topology: Topology, capability: int | None) -> Launch:
    """capability: None for the CPU platform."""
    return Launch(
        tp=topology.tp,
        dp=topology.dp,
        ep=topology.ep,
        nodes=topology.nodes,
        hardware="cpu" if capability is None else "cuda",
        capability=capability,
        quantization=arch.recipe.method,
    )


def defaults() -> str:
    """Path and runner with attention DP, by checkpoint and GPU."""
    header = ("experts", *(f"compute capability {gpu / 10:.1f}" for gpu in GPUS), "CPU platform")
    return markdown(header, (tuple(_defaults(name)) for name in CHECKPOINTS))


def _defaults(name: str) -> Iterator[str]:
    arch, topology = _arch(CHECKPOINTS[name]), Topology(tp=8, dp=8, ep=8)
    yield name
    for gpu in (*GPUS, None):
        launch = _launch(arch, topology, gpu)
        if refusals(arch, launch):
            yield "no kernels"
        else:
            plan = plan_for(arch, launch)
            yield f"`{plan.path.name}`, {plan.runner}"


def received() -> str:
    """Bytes that reach a rank in a layer for each token, ours and SGLang's, FP8 on Hopper."""
    header = ("topology", "path", "decode", "prefill", "SGLang's decode", "SGLang's prefill")
    return markdown(header, (tuple(_received(topology)) for topology in TOPOLOGIES))


def _received(topology: Topology) -> Iterator[str]:
    arch = _arch(CHECKPOINTS["FP8 in 128x128 blocks"])
    launch = _launch(arch, topology, 90)
    yield str(topology)
    ours = plan_for(arch, launch)
    yield f"`{ours.path.name}`"
    for plan in (ours, default_of_sglang(arch, launch)):
        for _, batch in report.batches(topology):
            each = report.per_token(plan, topology, batch)
            yield "" if each is None else f"{each:,.0f}"


def rendered() -> str:
    """Both tables, in Markdown."""
    return f"{defaults()}\n\n{received()}"


if __name__ == "__main__":
    print(rendered())
