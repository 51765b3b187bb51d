"""A model of NVLink and InfiniBand: what the collectives of a layer should take. Not a measurement.

A collective takes a latency and the time of its bytes at a bandwidth. Where SGLang calls NCCL, both
are those of NCCL's own tuner, which chooses the fastest of its algorithms and protocols by them
(src/graph/tuning.cc, NVIDIA/nccl at b647562: baseLat, hwLat, llMaxBws, and the steps of each).
NVLink SHARP is left out. Where SGLang has its own all-reduce (CustomAllReduceV2: one node, up to
16 MB) the latency is that of sgl-project/sglang#2904, and the bandwidth an open question between
two numbers, so that a result is a range.

  constant                     value          source
  NVLink 4, one direction      18 x 20.6 GB/s NCCL src/graph/topo.h, SM90_NVLINK_BW; H100 and H200
                                              data sheets: 900 GB/s both ways, 18 links of 25 GB/s
  InfiniBand NDR, one adapter  47 GB/s        400 Gb/s, of which NVIDIA expects 46 to 48 GB/s
                                              (NVIDIA/nccl-tests#290); DGX H100: one a GPU
  custom all-reduce, latency   2.6 + 1.1 log2(n) us   sglang#2904, H100, 512 bytes:
                                              3.7, 4.8 and 5.9 us on 2, 4 and 8 GPUs
  custom all-reduce, bandwidth 64 GB/s        the same table at 1 MB, as bytes that reach a GPU
                               to NVLink's    what the links could carry; no source for today's
                                              kernel, which is newer than the table. At most NCCL's
                                              time, since SGLang's sizes for it were chosen by that

What it leaves out: the kernels that quantise, pack and unpack, memory traffic, skew between ranks,
and overlap. Collectives of variable size count as their even ones, though NCCL has none and
SGLang's pynccl groups broadcasts or reductions for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from sglang_minimax.moe_exchange.moves import RECEIVED, Move
from sglang_minimax.topology import Topology

#: Bytes a microsecond, that is MB/s over 1000: one direction of one GPU, and of one adapter.
NVLINK = 18 * 20.6e3
INFINIBAND = 47e3
#: SGLang's own all-reduce: what sglang#2904 measured at 1 MB, and from which size on NCCL is used
#: (SGLANG_CUSTOM_ALL_REDUCE_V2_MAX_SIZE_KB).
CUSTOM_AS_MEASURED = 64e3
CUSTOM_MOST = 16 * 2**20
#: Overhead of a step of a ring that crosses nodes, of the tuner's getNetOverhead on Intel hosts.
NETWORK_STEP = 1.0

#: (first, last): the least and the most that the model allows, in microseconds.
Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Protocol:
    """Latencies in microseconds: to begin, of a step inside a node, of one between nodes."""

    begin: float
    inside: float
    between: float
    step_overhead: float = NETWORK_STEP


LL, LL128, SIMPLE = "LL", "LL128", "Simple"
RING = {
    LL: Protocol(6.6, 0.6, 2.7),
    LL128: Protocol(14.0, 1.9, 4.0),
    SIMPLE: Protocol(8.4, 3.4, 14.0, 3 * NETWORK_STEP),
}
TREE = {LL: Protocol(6.8, 0.6, 5.0), LL128: Protocol(14.0, 1.25, 8.5)}
#: The most that protocol LL carries, on one node of Hopper GPUs and on two with Intel hosts.
LL_MOST = {1: 87.7e3, 2: 39.0e3}


def bandwidth(nodes: int, ranks: int) -> float:
    """Bytes a microsecond at which a rank of a ring receives.

    Across nodes NCCL builds a ring for each adapter, so that what enters a node, as much as what
    enters one GPU over NVLink, is spread over all of its adapters.
    """
    if nodes == 1:
        return NVLINK
    return min(NVLINK, ranks / nodes * INFINIBAND)


def nccl(operation: str, whole: float, ranks: int, nodes: int = 1) -> float:
    """Microseconds of a collective over `whole` bytes (see Move), by NCCL's tuner."""
    times = [_ring(name, operation, whole, ranks, nodes) for name in RING]
    if operation == "all_reduce":
        times += [_tree(name, whole, ranks, nodes) for name in TREE]
    return min(times)


def _ring(name: str, operation: str, whole: float, ranks: int, nodes: int) -> float:
    protocol = RING[name]
    reduces = operation == "all_reduce"
    steps = (2 if reduces else 1) * (ranks - 1)
    between = (2 * nodes if reduces else nodes - 1) if nodes > 1 else 0
    inside = protocol.inside if nodes == 1 else max(protocol.inside, protocol.step_overhead)
    latency = protocol.begin + (steps - between) * inside + between * protocol.between
    speed = bandwidth(nodes, ranks)
    if name == LL:
        speed = min(LL_MOST[nodes], speed / (4 if reduces or nodes > 1 else 3))
    elif name == LL128:
        speed *= 0.92
    return latency + RECEIVED[operation](ranks) * whole / speed


def _tree(name: str, whole: float, ranks: int, nodes: int) -> float:
    protocol = TREE[name]
    inside = 2 * (ranks // nodes - 1) * protocol.inside
    latency = protocol.begin + inside + 2 * math.log2(nodes) * protocol.between
    speed = 0.92 * bandwidth(nodes, ranks)
    if name == LL:
        speed = min(LL_MOST[nodes], speed / 3.8)
    else:
        speed *= 7 / 9 if nodes == 1 else 120 / 128
    return latency + 2 * whole / speed


def custom_all_reduce(whole: float, ranks: int) -> Range:
    """Microseconds of SGLang's own all-reduce on one node: at link speed, and as once measured.

    That NCCL is no faster is how SGLang tuned the sizes for which it takes its own
    (srt/distributed/device_communicators/configs/custom_all_reduce_v2.py).
    """
    latency = 2.6 + 1.1 * math.log2(ranks)
    received = RECEIVED["all_reduce"](ranks) * whole
    measured = latency + received / CUSTOM_AS_MEASURED
    return latency + received / NVLINK, min(measured, nccl("all_reduce", whole, ranks))


def collective(operation: str, whole: float, ranks: int, nodes: int = 1) -> Range:
    """Microseconds of one collective as SGLang would run it."""
    if operation == "all_reduce" and nodes == 1 and whole <= CUSTOM_MOST:
        return custom_all_reduce(whole, ranks)
    time = nccl(operation, whole, ranks, nodes)
    return time, time


def nodes_of(topology: Topology, kind: str) -> int:
    """Over how many nodes a group of a kind is spread, the widest one."""
    return max(
        len({topology.coordinates(rank).node for rank in group}) for group in topology.groups(kind)
    )


def expected(topology: Topology, moves: Iterable[Move]) -> Range:
    """Microseconds of the collectives of one layer, one after the other."""
    ranges = [
        collective(
            move.operation,
            move.whole,
            len(topology.groups(move.kind)[0]),
            nodes_of(topology, move.kind),
        )
        for move in moves
    ]
    return sum(low for low, _ in ranges), sum(high for _, high in ranges)


def constants() -> dict[str, float]:
    """What goes into the model, for the record: bandwidths in GB/s, latencies in microseconds."""
    found = {
        "nvlink": NVLINK / 1e3,
        "infiniband": INFINIBAND / 1e3,
        "custom_all_reduce_as_measured": CUSTOM_AS_MEASURED / 1e3,
        "network_step": NETWORK_STEP,
    }
    for algorithm, protocols in (("ring", RING), ("tree", TREE)):
        for name, each in protocols.items():
            for key in ("begin", "inside", "between"):
                found[f"{algorithm} {name} {key}"] = getattr(each, key)
    return found


class Published(NamedTuple):
    """A time that somebody measured of an all-reduce on one node of H100s."""

    source: str
    whole: int
    ranks: int
    microseconds: float

    @property
    def model(self) -> Range:
        """What the model says of it."""
        if self.source == NCCL_TIMES:
            time = nccl("all_reduce", self.whole, self.ranks)
            return time, time
        return custom_all_reduce(self.whole, self.ranks)


CUSTOM_TIMES = "sgl-project/sglang#2904, SGLang's all-reduce of January 2025, without a graph"
NCCL_TIMES = "ByteDance-Seed/Triton-distributed#57, NCCL through PyTorch"
#: What the model can be held against.
PUBLISHED = (
    Published(CUSTOM_TIMES, 512, 8, 5.9),
    Published(CUSTOM_TIMES, 32768, 8, 7.8),
    Published(CUSTOM_TIMES, 262144, 8, 16.7),
    Published(CUSTOM_TIMES, 1048576, 8, 33.8),
    Published(CUSTOM_TIMES, 1048576, 2, 19.9),
    Published(NCCL_TIMES, 128, 8, 19.19),
    Published(NCCL_TIMES, 262144, 8, 24.76),
    Published(NCCL_TIMES, 1048576, 8, 32.42),
    Published(NCCL_TIMES, 4194304, 8, 59.43),
    Published(NCCL_TIMES, 16777216, 8, 135.68),
)
