"""What bench_moe_comm compares: topologies, batches, and the ways in which a layer's rows can move.

Bytes come from sglang_minimax.moe_exchange.moves, for the published shape; two ways of SGLang that
it does not offer for comparison are added here: its opt-in FP8 gather, and its FP4 all-gather.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import links
from sglang_minimax.moe_exchange.moves import Batch, Move, moves
from sglang_minimax.moe_exchange.paths import SGLANG, Movement, Path, Rows
from sglang_minimax.moe_exchange.payload import FP8_GROUP, Payload
from sglang_minimax.shards import ceil_div, exact_div
from sglang_minimax.topology import Topology

Row = dict[str, Any]

#: The published shape: hidden size, experts a token, layers, width of an expert.
HIDDEN, TOP_K, LAYERS, EXPERT_WIDTH = 3072, 8, 62, 1536
#: Columns of an expert that an FP8 checkpoint's block takes; SGLang refuses to cut one.
BLOCK = 128

TOPOLOGIES = {
    "TP8": Topology(tp=8),
    "TP16, two nodes": Topology(tp=16, nodes=2),
    "DP8 EP8": Topology(tp=8, dp=8, ep=8),
    "DP4 x TP2 EP8": Topology(tp=8, dp=4, ep=8),
    "DP8 without EP": Topology(tp=8, dp=8),
    "EP16, two nodes": Topology(tp=16, dp=16, ep=16, nodes=2),
}
CHECKPOINTS = {"BF16": Rows.PLAIN, "FP8": Rows.FP8, "NVFP4": Rows.FP4}
IN_TREE, OURS = "in-tree", "ours"
SMALL = "in-tree, one all-reduce"
OPT_IN = "in-tree, opt-in FP8"
FP4 = "in-tree, FP4 all-gather"

MAX_LEN, SUM_LEN = "MAX_LEN", "SUM_LEN"


@dataclass(frozen=True, slots=True)
class Load:
    """Tokens of each attention-DP group in one forward, and how SGLang pads them.

    padding: of get_dp_padding_mode (srt/layers/dp_attention.py), which takes MAX_LEN for a decode
    whose padded rows are at most twice the tokens, and SUM_LEN for a prefill. graph: whether a CUDA
    graph is replayed, in which every group has the captured number of rows in either mode
    (srt/model_executor/runner/decode_cuda_graph_runner.py); taken to be that of the longest group.
    """

    name: str
    padding: str
    tokens: Callable[[Topology], tuple[int, ...]]
    graph: bool = False

    def batch(self, topology: Topology, padding: str | None = None) -> Batch:
        """The padded rows: to the longest group, or each to a multiple of attention-TP."""
        tokens = self.tokens(topology)
        if topology.dp == 1:
            return Batch(tokens)
        padding = padding or self.padding
        share = topology.attention_tp
        aligned = [share * ceil_div(each, share) for each in tokens]
        if padding == MAX_LEN or self.graph:
            aligned = [max(aligned)] * len(aligned)
        return Batch(tuple(aligned), padding)


def _even(topology: Topology) -> tuple[int, ...]:
    """16 tokens a rank."""
    return (16 * topology.attention_tp,) * topology.dp


def _lopsided(topology: Topology) -> tuple[int, ...]:
    """A long group, and others so short that half of what SGLang pads to is padding."""
    if topology.dp == 1:
        return _even(topology)
    scale = max(1, 30 // (2 * topology.dp - 2))
    return (2 * (topology.dp - 1) * scale, *[(topology.dp - 2) * scale] * (topology.dp - 1))


def _ramp(topology: Topology) -> tuple[int, ...]:
    """Groups from none to about 1024 tokens; without attention DP as many together."""
    step = 1024 // max(topology.dp, 4)
    return tuple(step * group for group in range(topology.dp)) if topology.dp > 1 else (4096,)


DECODE, LOPSIDED, EAGER, PREFILL = "decode", "lopsided decode", "the same, no graph", "prefill"
LOADS = (
    Load(DECODE, MAX_LEN, _even, graph=True),
    Load(LOPSIDED, MAX_LEN, _lopsided, graph=True),
    Load(EAGER, MAX_LEN, _lopsided),
    Load(PREFILL, SUM_LEN, _ramp),
)


@dataclass(frozen=True, slots=True)
class Way:
    """One way of one launch: who moves rows, in which form, after which padding."""

    name: str
    path: str
    batch: Batch
    moves: Callable[[int], list[Move]]


def ours_for(topology: Topology, checkpoint: str) -> Path:
    """Our default: nothing to gain without attention DP, else the fewest bytes of the format."""
    return SGLANG if topology.dp == 1 else Path(Movement.GATHER, CHECKPOINTS[checkpoint])


def payload_of(
    path: Path, item_bytes: int = 2, hidden: int = HIDDEN, top_k: int = TOP_K
) -> Payload:
    """What travels to the experts on a path, for the published shape unless said otherwise."""
    return Payload(path.rows, hidden, top_k, item_bytes)


def ways(topology: Topology, checkpoint: str, load: Load) -> Iterator[Way]:
    """In-tree at the same arguments, what SGLang can be asked for there, and ours."""

    def of(name: str, path: Path, batch: Batch) -> Way:
        payload = payload_of(path)
        return Way(
            name, path.name, batch, lambda group: moves(topology, path, payload, batch, group)
        )

    padded = load.batch(topology)
    yield of(IN_TREE, SGLANG, padded)
    summed = padded
    if small_decode(topology, load):
        summed = load.batch(topology, SUM_LEN)
        yield of(SMALL, SGLANG, summed)
    if checkpoint == "FP8" and opt_in_applies(topology, summed):
        plain = payload_of(SGLANG)
        yield Way(
            OPT_IN, "opt-in", summed, lambda group: opt_in_moves(topology, plain, summed, group)
        )
    if checkpoint == "NVFP4" and fp4_applies(topology):
        yield Way(FP4, "FP4 all-gather", summed, lambda group: fp4_moves(topology, summed, group))
    yield of(OURS, ours_for(topology, checkpoint), padded)


def small_decode(topology: Topology, load: Load) -> bool:
    """Whether SGLang gathers a decode's rows by an all-reduce (SUM_LEN) instead of padding them.

    srt/layers/dp_attention.py, _decode_sum_len_fits_custom_all_reduce: every group has tokens, the
    GPUs have full NVLink, the rows of all fit SGLang's own all-reduce, nothing is speculated, and
    no dispatcher is behind --moe-a2a-backend; behind `customized`, ours is.
    """
    tokens = load.tokens(topology)
    fits = 2 * HIDDEN * sum(load.batch(topology, SUM_LEN).groups) <= links.CUSTOM_MOST
    return (
        topology.dp > 1 and topology.nodes == 1 and load.padding == MAX_LEN and min(tokens) > 0
    ) and fits


def opt_in_applies(topology: Topology, batch: Batch) -> bool:
    """Whether SGLANG_DP_USE_GATHERV and SGLANG_ENABLE_DP_GATHER_FP8 change anything.

    srt/layers/dp_attention.py, is_dp_gatherv_active: SUM_LEN, and attention-TP 1.
    """
    return topology.dp > 1 and topology.attention_tp == 1 and batch.padding == SUM_LEN


def opt_in_moves(topology: Topology, payload: Payload, batch: Batch, group: int) -> list[Move]:
    """The moves where the opt-in applies: its two gathers, then whatever SGLang does without it.

    srt/layers/dp_attention.py, _dp_gather_via_all_gatherv_fp8: codes, then an fp32 scale for each
    128 columns. Ids and weights do not travel: every rank routes the rows of all, as rounded.
    """
    default = moves(topology, SGLANG, payload, batch, group)
    scales = 4 * exact_div(payload.hidden, FP8_GROUP, "columns over columns a scale")
    gathers = [
        Move("boundary", "all_gatherv", "tp", batch.groups[group] * size, batch.rows * size)
        for size in (payload.hidden, scales)
    ]
    return [*gathers, *default[1:]]


def fp4_applies(topology: Topology) -> bool:
    """Whether SGLang gathers FP4 rows under --moe-runner-backend flashinfer_cutlass.

    srt/layers/moe/utils.py, should_use_flashinfer_cutlass_moe_fp4_allgather: EP as wide as
    attention DP. With attention-TP on top it ends in an assertion, and is not among TOPOLOGIES.
    """
    return topology.dp > 1 and topology.ep == topology.dp and topology.attention_tp == 1


def fp4_moves(topology: Topology, batch: Batch, group: int) -> list[Move]:
    """The moves of SGLang's FP4 all-gather: four tensors in one call, then a reduce-scatter.

    srt/layers/moe/token_dispatcher/standard.py, StandardDispatcher.dispatch and combine.
    """
    made = moves(topology, SGLANG, Payload(Rows.FP4, HIDDEN, TOP_K), batch, group)
    gathers = [move for move in made if move.operation == "all_gatherv"]
    given, whole = (sum(getattr(move, key) for move in gathers) for key in ("given", "whole"))
    together = Move("experts", "all_gatherv", "tp", int(given), whole)
    return [together, *(move for move in made if move not in gathers)]


def refused_in_tree(topology: Topology, checkpoint: str) -> bool:
    """Whether SGLang refuses the checkpoint there: an expert's share cuts a block.

    srt/layers/quantization/fp8.py, Fp8MoEMethod.create_weights.
    """
    return checkpoint == "FP8" and (EXPERT_WIDTH // topology.moe_tp) % BLOCK != 0


def parts(topology: Topology, made: list[Move]) -> dict[str, float]:
    """Bytes that reach the rank, by what the collective is for: attention, gather, combine.

    attention: over attention-TP, or the sum of attention's outputs where there is no attention DP.
    Where an all-reduce gathers the rows of groups it also adds attention's outputs up: gather.
    """
    found = {"attention": 0.0, "gather": 0.0, "combine": 0.0}
    over_tp = [move for move in made if move.kind == "tp"]
    for move in made:
        if move.kind == "attention_tp":
            name = "attention"
        elif move is over_tp[-1]:
            name = "combine"
        else:
            name = "attention" if topology.dp == 1 else "gather"
        found[name] += move.received(topology)
    return found


def row(name: str, topology: Topology, checkpoint: str, load: Load, way: Way) -> Row:
    """A row of the result: a mean over the ranks, for each token; the model is of the slowest."""
    tokens = load.tokens(topology)
    made = [way.moves(group) for group in range(topology.dp)]
    split = [parts(topology, each) for each in made]
    mean = {key: sum(each[key] for each in split) / len(split) / sum(tokens) for key in split[0]}
    times = [links.expected(topology, each) for each in made]
    return {
        "topology": name,
        "sizes": str(topology),
        "checkpoint": checkpoint,
        "load": load.name,
        "way": way.name,
        "path": way.path,
        "padding": way.batch.padding,
        "tokens": sum(tokens),
        "rows": way.batch.rows,
        "collectives": max(map(len, made)),
        "operations": [move.operation for move in max(made, key=len)],
        "bytes_a_token_a_layer": {**mean, "total": sum(mean.values())},
        "model_microseconds_a_layer": list(map(max, zip(*times, strict=True))),
        "refused_in_tree": way.name.startswith(IN_TREE) and refused_in_tree(topology, checkpoint),
    }


def rows() -> list[Row]:
    """Every row, by topology, checkpoint, load and way."""
    return [
        row(name, topology, checkpoint, load, way)
        for name, topology in TOPOLOGIES.items()
        for checkpoint in CHECKPOINTS
        for load in LOADS
        if topology.dp > 1 or load.name in (DECODE, PREFILL)
        for way in ways(topology, checkpoint, load)
    ]
