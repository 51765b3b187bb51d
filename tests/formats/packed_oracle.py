"""What every rank holds of a packed checkpoint, cut by hand: no Axis, no Cut."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from sglang_minimax.config import Architecture
from sglang_minimax.loading.formats import quantisation_config, recipe_of
from sglang_minimax.loading.plan import Plan, plan_of_rank
from sglang_minimax.loading.shares import share_of
from sglang_minimax.loading.values import TYPES
from sglang_minimax.topology import Topology
from tests.formats import awq, gptq, modelslim, mxfp4, nvfp4
from tests.formats.base import EXPERTS, LAYERS, WIDTH, Fixture, quantised_modules, write

MODULES = (awq, gptq, nvfp4, mxfp4, modelslim)
FIXTURES = {name: made for module in MODULES for name, made in module.FIXTURES.items()}
DEQUANTISE = {name: module.dequantise for module in MODULES for name in module.FIXTURES}

#: Removed when the process ends.
_FOLDERS: list[TemporaryDirectory[str]] = []

ALL = slice(None)
#: format -> kind -> its dimensions as (r or c, lines of one element), ALL where it is not cut.
LAYOUT: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "awq": {
        "qweight": (("c", 1), ("r", 8)),
        "qzeros": (("c", 64), ("r", 8)),
        "scales": (("c", 64), ("r", 1)),
    },
    "gptq": {
        "qweight": (("c", 8), ("r", 1)),
        "qzeros": (("c", 64), ("r", 8)),
        "scales": (("c", 64), ("r", 1)),
        "g_idx": (("c", 1),),
    },
    "gptq-act-order": {
        "qweight": (("c", 8), ("r", 1)),
        "qzeros": (ALL, ("r", 8)),
        "scales": (ALL, ("r", 1)),
        "g_idx": (("c", 1),),
    },
    "nvfp4": {
        "weight": (("r", 1), ("c", 2)),
        "weight_scale": (("r", 1), ("c", 16)),
        "weight_scale_2": (),
        "input_scale": (),
    },
    "mxfp4": {"weight": (("r", 1), ("c", 2)), "weight_scale": (("r", 1), ("c", 32))},
    "modelslim": {
        "weight": (("r", 1), ("c", 1)),
        "weight_scale": (("r", 1), ALL),
        "weight_offset": (("r", 1), ALL),
        "input_scale": (ALL,),
        "input_offset": (ALL,),
        "quant_bias": (("r", 1),),
        "deq_scale": (("r", 1),),
    },
}
#: Lines of an expert's width that stay together.
UNIT = {"awq": 64, "gptq": 64, "gptq-act-order": 8, "nvfp4": 16, "mxfp4": 32, "modelslim": 1}


def layout_of(name: str) -> str:
    """The row of LAYOUT for a fixture."""
    if name in ("gptq-whole-rows", "gptq-act-order"):
        return "gptq-act-order"  # one scale a row is all of them, too
    return name.split("-")[0]


class Checkpoint(NamedTuple):
    """A fixture on disk, and what we read from its config."""

    fixture: Fixture
    folder: Path
    arch: Architecture


@lru_cache(maxsize=2)
def checkpoint(name: str) -> Checkpoint:
    """The fixture, written once for all tests of it, which come one after the other."""
    return written(FIXTURES[name]())


def written(fixture: Fixture) -> Checkpoint:
    """A fixture in a folder of its own."""
    _FOLDERS.append(TemporaryDirectory(prefix="formats-"))
    folder = write(fixture, Path(_FOLDERS[-1].name))
    config = json.loads((folder / "config.json").read_text())
    recipe = recipe_of(quantisation_config(folder, config))
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return Checkpoint(fixture, folder, replace(Architecture.from_config(plain), recipe=recipe))


def plan(made: Checkpoint, topology: str = "tp=1", rank: int = 0) -> Plan:
    """The plan of a rank."""
    files = [made.folder / "model.safetensors"]
    return plan_of_rank(files, made.arch, Topology.parse(topology), rank)


# --- the oracle ---


class Held(NamedTuple):
    """What one rank holds, by hand."""

    layers: list[int]
    experts: list[int]
    q: range
    kv: range
    width: range
    width_in_memory: int


def part(total: int, size: int, rank: int) -> range:
    return range(total // size * rank, total // size * (rank + 1))


def held_by(topology: Topology, rank: int, unit: int) -> Held:
    stage, in_stage = divmod(rank, topology.tp)
    attention_tp, moe_tp = topology.tp // topology.dp, topology.tp // topology.ep
    counts = [0] * moe_tp
    for card in range(WIDTH // unit):  # dealt one by one
        counts[card % moe_tp] += 1
    mine = in_stage % moe_tp
    first = sum(counts[:mine]) * unit
    return Held(
        layers=list(range(LAYERS)) if topology.pp == 1 else [[0], [1, 2]][stage],
        experts=list(part(EXPERTS, topology.ep, in_stage // moe_tp)),
        q=part(512, attention_tp, in_stage % attention_tp),
        kv=part(256, attention_tp, in_stage % attention_tp),
        width=range(first, first + counts[mine] * unit),
        width_in_memory=max(counts) * unit,
    )


def matrix_part(module: str, held: Held) -> tuple[range, range] | None:
    """(rows, columns) of a matrix that a rank holds; None where it has none of it."""
    parts = module.split(".")
    if int(parts[2]) not in held.layers:
        return None
    hidden, last = range(128), parts[-1]
    if ".experts." in module:
        if int(parts[-2]) not in held.experts:
            return None
        return (hidden, held.width) if last == "w2" else (held.width, hidden)
    if last == "o_proj":
        return hidden, held.q
    return (held.q if last == "q_proj" else held.kv), hidden


def everywhere(name: str, module: str, kind: str, held: Held) -> bool:
    """Whether every rank needs a tensor: SGLang takes the largest `input_scale` of all experts."""
    needed = name.startswith("nvfp4") and kind == "input_scale" and ".experts." in module
    return needed and int(module.split(".")[2]) in held.layers


def cut(tensor: torch.Tensor, dimensions: tuple[Any, ...], rows: range, columns: range):
    """The part of a stored tensor that goes with part of its matrix."""
    index = []
    for dimension in dimensions:
        if dimension is ALL:
            index.append(ALL)
            continue
        along, per = dimension
        lines = rows if along == "r" else columns
        assert lines.start % per == lines.stop % per == 0
        index.append(slice(lines.start // per, lines.stop // per))
    return tensor[tuple(index)]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check(made: Checkpoint, topology_text: str) -> None:
    """Every rank's plan, bytes and dequantised shares, against the oracle. AssertionError."""
    name, topology = made.fixture.name, Topology.parse(topology_text)
    data = (made.folder / "model.safetensors").read_bytes()
    modules = quantised_modules()
    for rank in range(topology.world_size):
        rank_plan = plan(made, topology_text, rank)
        assert not rank_plan.problems, rank_plan.problems
        held = held_by(topology, rank, UNIT[layout_of(name)])
        expected = {
            tensor: (module, kind)
            for module in modules
            for tensor, kind in kinds(made.fixture, module)
            if matrix_part(module, held) is not None or everywhere(name, module, kind, held)
        }
        shares: dict[str, dict[str, torch.Tensor]] = {}
        for read in rank_plan.reads:
            if read.name not in expected:
                assert read.name.rpartition(".")[0] not in modules, read.name
                continue
            module, kind = expected.pop(read.name)
            whole = made.fixture.tensors[read.name]
            plain = kind == "weight" and whole.dtype == torch.bfloat16
            dimensions = (("r", 1), ("c", 1)) if plain else LAYOUT[layout_of(name)][kind]
            rows, columns = matrix_part(module, held) or (range(0), range(0))
            span = bytearray(data[read.offset : read.offset + read.length])
            found = torch.frombuffer(span, dtype=TYPES[read.tensor.kind]) if span else None
            if found is None:
                found = torch.empty(0, dtype=TYPES[read.tensor.kind])
            found = found.reshape(read.shape)[tuple(slice(i.start, i.stop) for i in read.inner)]
            assert raw(found) == raw(cut(whole, dimensions, rows, columns)), (rank, read.name)
            share = share_of(read.placement, found, read.name).held
            if matrix_part(module, held) is None:
                continue
            shares.setdefault(module, {})[kind] = share.reshape(share.shape if whole.dim() else ())
        assert not expected, sorted(expected)[:3]
        for module, tensors in shares.items():
            check_share(made.fixture, module, tensors, held)


def kinds(fixture: Fixture, module: str) -> list[tuple[str, str]]:
    known = {kind for layout in LAYOUT.values() for kind in layout}
    names = ((f"{module}.{kind}", kind) for kind in known)
    return [(name, kind) for name, kind in names if name in fixture.tensors]


def check_share(fixture: Fixture, module: str, tensors: dict[str, Any], held: Held) -> None:
    """A padded share stands for its slice of the weight, and for zeros in the padding."""
    rows, columns = matrix_part(module, held) or (range(0), range(0))
    weight = fixture.dequantised[f"{module}.weight"]
    wide = held.width_in_memory
    shape = [len(rows), len(columns)]
    if ".experts." in module:
        shape[1 if module.endswith("w2") else 0] = wide
    wanted = torch.zeros(shape)
    wanted[: len(rows), : len(columns)] = weight[
        rows.start : rows.stop, columns.start : columns.stop
    ]
    if list(tensors) == ["weight"] and tensors["weight"].dtype == torch.bfloat16:
        found = tensors["weight"].float()
    elif fixture.name.startswith("gptq"):
        found = gptq.dequantise(local(tensors), 2 if fixture.name == "gptq-v2" else 1)
    else:
        found = DEQUANTISE[fixture.name](tensors)
    assert found.shape == wanted.shape, (module, found.shape, wanted.shape)
    assert torch.equal(found, wanted), module


def local(tensors: dict[str, Any]) -> dict[str, Any]:
    """Where scales were cut with the columns, groups are counted from the rank's first."""
    g_idx = tensors["g_idx"]
    if g_idx.max() >= len(tensors["scales"]):
        g_idx = g_idx - g_idx.min()
    return {**tensors, "g_idx": g_idx}
