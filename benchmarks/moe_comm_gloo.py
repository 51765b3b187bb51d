"""The collectives of a layer over gloo on this machine: do more bytes take longer?

A sanity check of the direction, on processes that share a machine's cores and memory. It says
nothing of GPUs, and nothing is asserted of it. Collectives of variable size are a broadcast or a
reduction for each rank, as SGLang's pynccl groups them; gloo's even reduce-scatter is an all-reduce
inside, so that its time does not show that fewer bytes are needed.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.moe_comm_cases import Load, Row, ways
from sglang_minimax.moe_exchange.moves import Move
from sglang_minimax.shards import exact_div
from sglang_minimax.topology import Topology

#: As many ranks as have a chance on a small machine.
TOPOLOGY = Topology(tp=4, dp=4, ep=4)
BACKEND = "gloo"


@dataclass(frozen=True, slots=True)
class Layer:
    """One way's collectives. rows: of each rank; moves: of each rank, in order."""

    rows: tuple[int, ...]
    moves: list[list[Move]]


Plans = dict[str, Layer]


def plans(load: Load, checkpoint: str) -> Plans:
    """Every way of a launch on TOPOLOGY, where attention-TP is 1: a group is a rank."""
    return {
        way.name: Layer(way.batch.groups, [way.moves(group) for group in range(TOPOLOGY.dp)])
        for way in ways(TOPOLOGY, checkpoint, load)
    }


def rows(loads: Sequence[Load], checkpoint: str, runs: int) -> list[Row]:
    """The median time of a layer's collectives for each load and way, and the bytes they carry."""
    found: list[Row] = []
    for load in loads:
        made = plans(load, checkpoint)
        times = measure(made, runs)
        for name, layer in made.items():
            received = [sum(move.received(TOPOLOGY) for move in each) for each in layer.moves]
            milliseconds = [1e3 * each for each in times[name]]
            found.append(
                {
                    "load": load.name,
                    "checkpoint": checkpoint,
                    "sizes": str(TOPOLOGY),
                    "way": name,
                    "bytes_a_layer": statistics.mean(received),
                    "milliseconds": {
                        "median": statistics.median(milliseconds),
                        "least": min(milliseconds),
                        "most": max(milliseconds),
                        "runs": runs,
                    },
                }
            )
    return found


def measure(made: Plans, runs: int) -> dict[str, list[float]]:
    """Seconds of each run of each plan on the slowest rank; the plans take turns."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(folder, made, runs), nprocs=TOPOLOGY.tp)
        return torch.load(Path(folder) / "times.pt", weights_only=True)


def _rank(rank: int, folder: str, made: Plans, runs: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        BACKEND, init_method=f"file://{folder}/meeting", rank=rank, world_size=TOPOLOGY.tp
    )
    layers = {
        name: [prepared(move, layer.rows, rank) for move in layer.moves[rank]]
        for name, layer in made.items()
    }
    times: dict[str, list[float]] = {name: [] for name in made}
    for run in range(runs + 1):
        for name, calls in layers.items():
            dist.barrier()
            began = time.perf_counter()
            for call in calls:
                call()
            took = torch.tensor(time.perf_counter() - began)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if run:  # the first one connects
                times[name].append(took.item())
    if rank == 0:
        torch.save(times, Path(folder) / "times.pt")
    dist.destroy_process_group()


def prepared(move: Move, rows: tuple[int, ...], rank: int) -> Callable[[], Any]:
    """A call that carries as many bytes as the move. rows: of each rank, which share its bytes."""
    whole = int(move.whole)
    if move.operation == "all_reduce":
        summed = torch.zeros(whole // 2, dtype=torch.bfloat16)
        return lambda: dist.all_reduce(summed)
    shares = [exact_div(whole * each, sum(rows), "bytes over rows") for each in rows]
    even = len(set(shares)) == 1
    if move.operation.startswith("all_gather"):
        given = torch.zeros(move.given, dtype=torch.uint8)
        taken = [torch.empty(share, dtype=torch.uint8) for share in shares]
        if even:
            return lambda: dist.all_gather(taken, given)
        taken[rank] = given
        return lambda: [dist.broadcast(part, root) for root, part in enumerate(taken) if len(part)]
    pieces = [torch.zeros(share // 2, dtype=torch.bfloat16) for share in shares]
    if even:
        output = torch.empty_like(pieces[rank])
        return lambda: dist.reduce_scatter(output, pieces)
    return lambda: [dist.reduce(part, root) for root, part in enumerate(pieces) if len(part)]
