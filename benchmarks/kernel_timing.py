"""How long a kernel, or a sequence of kernels, takes: under CUDA graph, with hot and with cold L2.

    times = time_call(work, device)          # {"hot": Spread, "cold": Spread} in microseconds
    times = time_call(work, cpu)             # {"wall": Spread, "process": Spread}

`work` takes nothing and only launches: it must not allocate what it keeps, read results back or
synchronise. It is called some times first, so that whatever compiles on first use has compiled.

hot: one graph of many calls on the same buffers; its time over the number of calls. What the calls
touch stays in L2 as far as it fits, and the gaps between launches are those of a graph, as in a
server's decode step.
cold: a graph of [flush, call] pairs less a graph of the flushes alone, replayed in turn, over the
number of calls. The flush writes a buffer several times the size of L2, so a call finds none of its
operands there and pays for the eviction of written lines, as after a layer's other work.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import typer

from benchmarks.common import processor, version

Work = Callable[[], object]

HOT, COLD, EAGER, WALL, PROCESS = "hot", "cold", "eager", "wall", "process"
#: Calls before the first timed one: compilers, handles, allocator.
WARM_UP = 3
#: A graph lasts at least so long, so that what starts a replay is under a percent of it.
GRAPH_MICROSECONDS = 1000.0
MOST_CALLS = 400
COLD_CALLS = 20
REPLAYS = 31
#: The flush is so many times as large as L2: a cache is not replaced in strict order.
FLUSH_FACTOR = 4
#: A run on the CPU repeats a short call until it lasts so long.
RUN_SECONDS = 0.005
CPU_RUNS = 31


class Uncapturable(RuntimeError):
    """The work cannot be captured in a CUDA graph; the message says what the driver said."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, 10th and 90th percentile of some runs, each the mean of one run's calls."""

    median: float
    low: float
    high: float
    runs: int

    def rounded(self) -> dict[str, float]:
        """What the JSON holds; a tenth of a nanosecond is below every clock used here."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


Times = dict[str, Spread]


def spread(values: list[float]) -> Spread:
    """The spread of at least one value."""
    ordered = sorted(values)
    tenth = (len(ordered) - 1) // 10
    return Spread(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], len(ordered))


def time_call(work: Work, device: torch.device, *, replays: int = REPLAYS) -> Times:
    """Microseconds of a call of `work` on `device`; the keys are as the module says.

    Raises Uncapturable where a CUDA graph cannot hold the work.
    """
    if device.type != "cuda":
        return on_cpu(work)
    with torch.cuda.device(device):
        return {HOT: hot(work, replays), COLD: cold(work, replays)}


def hot(work: Work, replays: int = REPLAYS) -> Spread:
    """Microseconds of a call among calls on the same buffers."""
    few = capture(work, COLD_CALLS)
    estimate = statistics.median(replayed([few], 5)[0]) / COLD_CALLS
    calls = max(WARM_UP, min(MOST_CALLS, round(GRAPH_MICROSECONDS / max(estimate, 0.1))))
    (times,) = replayed([capture(work, calls)], replays)
    return spread([t / calls for t in times])


def cold(work: Work, replays: int = REPLAYS, calls: int = COLD_CALLS) -> Spread:
    """Microseconds of a call that finds nothing of its operands in L2."""
    buffer = flush_buffer()

    def flush() -> None:
        # Not zeros: PyTorch makes a memset of those, which need not pass through L2.
        buffer.fill_(1)

    def flushed() -> None:
        flush()
        work()

    both, alone = replayed([capture(flushed, calls), capture(flush, calls)], replays)
    return spread(differences(both, alone, calls))


def eager(work: Work, runs: int = CPU_RUNS, calls: int = 20) -> Times:
    """{"eager": Spread}: calls launched one by one, for work that no graph can hold."""
    for _ in range(WARM_UP):
        work()
    values: list[float] = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        values.append(1000 * start.elapsed_time(end) / calls)
    return {EAGER: spread(values)}


def differences(both: list[float], alone: list[float], calls: int) -> list[float]:
    """Time of a call in each pair of replays, with and without it.

    >>> differences([110.0, 130.0], [100.0, 110.0], 10)
    [1.0, 2.0]
    """
    return [(a - b) / calls for a, b in zip(both, alone, strict=True)]


def flush_buffer() -> torch.Tensor:
    """A buffer to write that replaces all of L2."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(FLUSH_FACTOR * max(size, 2**24) // 4, dtype=torch.int32, device="cuda")


def capture(work: Work, calls: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `calls` calls, warmed up before and replayed once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        # On the stream of the warm-up: what belongs to a stream must not be made in a capture.
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                work()
    except RuntimeError as error:
        torch.cuda.synchronize()
        raise Uncapturable(str(error).splitlines()[0]) from error
    graph.replay()
    torch.cuda.synchronize()
    return graph


def replayed(graphs: list[torch.cuda.CUDAGraph], replays: int) -> list[list[float]]:
    """Microseconds of each replay of each graph; in turn, so that a drift of clocks meets all.

    All are queued before any is awaited: the device never waits for the host between two.
    """
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2 * replays)] for _ in graphs]
    for turn in range(replays):
        for graph, events in zip(graphs, marks, strict=True):
            events[2 * turn].record()
            graph.replay()
            events[2 * turn + 1].record()
    torch.cuda.synchronize()
    return [
        [1000 * events[2 * n].elapsed_time(events[2 * n + 1]) for n in range(replays)]
        for events in marks
    ]


def on_cpu(work: Work, runs: int = CPU_RUNS) -> Times:
    """Microseconds of a call on the host: on the wall, and of the process's processor time."""
    return in_turn([work], runs)[0]


def in_turn(works: Sequence[Work], runs: int = CPU_RUNS) -> list[Times]:
    """Times of each work on the host, run in turn, so that what else the machine does meets all."""
    calls = [_calls_a_run(work) for work in works]
    wall: list[list[float]] = [[] for _ in works]
    process: list[list[float]] = [[] for _ in works]
    for _ in range(runs):
        for n, work in enumerate(works):
            started, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls[n]):
                work()
            process[n].append((time.process_time() - cpu) / calls[n] * 1e6)
            wall[n].append((time.perf_counter() - started) / calls[n] * 1e6)
    return [{WALL: spread(w), PROCESS: spread(p)} for w, p in zip(wall, process, strict=True)]


def _calls_a_run(work: Work) -> int:
    """How many calls a run needs to last long enough for the clocks."""
    work()
    start = time.perf_counter()
    work()
    return max(1, round(RUN_SECONDS / max(time.perf_counter() - start, 1e-7)))


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """GB/s of a copy from memory to memory on `device`, read plus written bytes, measured.

    size: bytes of the copied buffer; by default far more than any cache holds.
    """
    size = size or (2**32 if device.type == "cuda" else 2**28)
    source = torch.empty(size // 2, dtype=torch.int16, device=device).random_()
    target = torch.empty_like(source)
    if device.type != "cuda":
        return gigabytes_per_second(2 * size, on_cpu(lambda: target.copy_(source), 5)[WALL].median)
    # Not hot(): its graphs would hold many copies of gigabytes; a few last long enough.
    with torch.cuda.device(device):
        (times,) = replayed([capture(lambda: target.copy_(source), 1)], 11)
    return gigabytes_per_second(2 * size, statistics.median(times))


def gigabytes_per_second(count: int, microseconds: float) -> float:
    """Bytes and microseconds as GB/s (10^9 bytes).

    >>> gigabytes_per_second(4_000_000, 1.0)
    4000.0
    """
    return count / microseconds / 1e3


def ratio(baseline: Times, ours: Times, which: str) -> float:
    """How many times as fast ours is: medians of one kind of run.

    >>> ratio({"hot": spread([6.0])}, {"hot": spread([2.0])}, "hot")
    3.0
    """
    return baseline[which].median / ours[which].median


def rounded(times: Times) -> dict[str, dict[str, float]]:
    """Times as the JSON holds them: {"hot": {"median", "low", "high", "runs"}, ...}."""
    return {name: value.rounded() for name, value in times.items()}


def device_of_run(cpu: bool) -> torch.device:
    """The current CUDA device, or the CPU and one of its cores where `--cpu` asks for it.

    Raises typer.BadParameter where there is no GPU.
    """
    if cpu:
        torch.set_num_threads(1)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device here; --cpu compares what runs without one")
    return torch.device("cuda", torch.cuda.current_device())


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name, size and versions of what the figures were measured on."""
    facts: dict[str, Any] = {"type": device.type, "triton": version("triton")}
    if device.type != "cuda":
        return {"name": processor(), "threads": torch.get_num_threads(), **facts}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "tvm_ffi": version("apache-tvm-ffi"),
        **facts,
    }


def slug(device: torch.device) -> str:
    """The part of a result file's name that tells the device: "cpu", or e.g. "nvidia-h200".

    >>> slug(torch.device("cpu"))
    'cpu'
    """
    if device.type != "cuda":
        return device.type
    return slug_of(torch.cuda.get_device_properties(device).name)


def slug_of(name: str) -> str:
    """A device's name in lower case, words joined by hyphens.

    >>> slug_of("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
