"""`sglang-minimax inspect`: what a checkpoint holds and whether it loads. No torch, no SGLang."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import typer

from sglang_minimax import ARCHITECTURE
from sglang_minimax.cli import tables
from sglang_minimax.config import Architecture
from sglang_minimax.errors import MinimaxError
from sglang_minimax.legality import Sizes
from sglang_minimax.loading.census import Census, Count, Kind
from sglang_minimax.loading.formats.base import Shape
from sglang_minimax.loading.report import Placing, Ranks, Report, Spread, examine
from sglang_minimax.topology import Topology

# Module -> its group in the table, in the order of the table.
GROUPS = {
    "embed_tokens": "embedding",
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"), "attention"),
    "attn": "KV scales",
    **dict.fromkeys(("q_norm", "k_norm"), "norms"),
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm", "norm"), "norms"),
    "gate": "router",
    "e_score_correction_bias": "router",
    "experts": "experts",
    "lm_head": "head",
}
# Names that would make the table too wide.
SHORT = {"e_score_correction_bias": "bias", "post_attention_layernorm": "post_attention"}
RANGES_SHOWN = 3


def inspect(
    folder: Path, sizes: Sizes, layout: str | None, *, dp_lm_head: bool, as_json: bool
) -> int:
    """Print the facts; 1 where the checkpoint would not load. Raises MinimaxError.

    layout: sizes as one text, in the place of those in `sizes`. With as_json an error is an object
    on stdout as well.
    """
    try:
        if layout is not None:
            sizes = replace(sizes, **Topology.parse_sizes(layout))
        report = examine(folder, Placing(sizes, dp_lm_head))
    except MinimaxError as error:
        if as_json:
            typer.echo(json.dumps({"loads": False, "error": str(error)}, indent=1))
        raise
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        show(report)
    return 0 if report.loads else 1


def show(report: Report) -> None:
    """Print the checkpoint, its tensors, what is wrong with them, and who would hold what."""
    tables.show(tables.pairs(_summary(report)))
    numbers = ("tensors", "bytes")
    rows = _kinds(report.census)
    tables.show(tables.table("part", "tensor", "type", "shape", *numbers, rows=rows, right=numbers))
    if left_out := sorted(report.census.left_out.items()):
        rows = ((why, f"{count.tensors:,}", size(count.nbytes)) for why, count in left_out)
        tables.show(tables.table("left out on purpose", *numbers, rows=rows, right=numbers))
    if problems := report.census.problems:
        typer.echo(f"{problems.error()}\n")
    _show_spread(report.spread)
    numbers = ("memory a rank", "padding of experts")
    titles = ("topology", "fits", *numbers)
    tables.show(tables.table(*titles, rows=map(_overview, report.overview), right=numbers))
    typer.echo(_verdict(report))


# --- the checkpoint ---


def _summary(report: Report) -> Iterator[tuple[str, str]]:
    arch, recipe = report.arch, report.arch.recipe
    yield "checkpoint", str(report.folder)
    beside = f"; {len(report.beside)} more that the index does not name" if report.beside else ""
    files = f"{len(report.files)} file{'' if len(report.files) == 1 else 's'}"
    yield "files", f"{files}, {size(report.file_bytes)}{beside}"
    yield "tensors", f"{report.tensors:,}, {size(report.tensor_bytes)}"
    first, second = _model(arch)
    yield "model", first
    yield "", second
    said = "and the tensors agree" if report.agrees else "but the tensors DISAGREE, see below"
    yield "format", f"{recipe.quantised.title} says {report.format_from}, {said}"


def _model(arch: Architecture) -> tuple[str, str]:
    return (
        f"{ARCHITECTURE}: {arch.num_layers} layers, hidden {arch.hidden_size}, "
        f"vocabulary {arch.vocab_size}",
        f"{arch.num_heads} query and {arch.num_kv_heads} KV heads of {arch.head_dim}, "
        f"{arch.num_experts} experts of {arch.expert_width}, top-{arch.top_k}",
    )


def _kinds(census: Census) -> Iterator[tuple[str, ...]]:
    """One row a kind, in the order of GROUPS; then what is not known."""
    order = {module: number for number, module in enumerate(GROUPS)}
    before = None
    for kind in sorted(census.kinds, key=lambda each: (order[each.module], each)):
        count, group = census.kinds[kind], GROUPS[kind.module]
        yield group if group != before else "", _tensor(kind), kind.type, *_cells(count)
        before = group
    if census.unknown.tensors:
        yield "unknown", "", "", *_cells(census.unknown)


def _tensor(kind: Kind) -> str:
    if kind.module == "experts":
        return f"{kind.projection} {kind.kind}"
    module = SHORT.get(kind.module, kind.module)
    return module if kind.kind == "weight" else f"{module} {kind.kind}"


def _cells(count: Count) -> tuple[str, str, str]:
    return _shape(count.shapes), f"{count.tensors:,}", size(count.nbytes)


def _shape(shapes: Iterable[Shape]) -> str:
    shapes = sorted(shapes)
    if len(shapes) != 1:
        return f"{len(shapes)} shapes" if shapes else ""
    return "x".join(map(str, shapes[0])) or "scalar"


# --- who holds what ---


def _show_spread(spread: Spread) -> None:
    if spread.refusals:
        typer.echo(f"{_name(spread)} does not fit:")
        for sentence in spread.refusals:
            typer.echo(f"  {sentence}")
        typer.echo()
        return
    numbers = ("tensors", "read", "held", "padding")
    titles = ("layers", "experts", "rows", *numbers)
    typer.echo(f"{_name(spread)}: bytes on each rank")
    rows = [_row(each) for each in spread.ranks]
    tables.show(tables.table("ranks", *titles, rows=rows, right=numbers))
    if spread.padding:
        typer.echo(
            "Experts are dealt in whole blocks and padded to the same rows on every rank:\n"
            f"{size(spread.padding)} over all ranks, +{spread.padding_percent:g} % expert memory.\n"
        )


def _row(each: Ranks) -> tuple[str, ...]:
    rows = str(each.rows)
    if each.rows != each.rows_in_memory:
        rows += f" in {each.rows_in_memory}"
    layers = f"{each.layers.start}-{each.layers.stop - 1}"
    load = each.load
    bytes_of = (load.read, load.held, load.padding)
    return (
        _members(each.ranks),
        layers if len(each.layers) > 1 else str(each.layers.start),
        str(each.experts),
        rows,
        f"{load.tensors:,}",
        *(size(number) if number else "-" for number in bytes_of),
    )


def _overview(spread: Spread) -> tuple[str, str, str, str]:
    if spread.refusals:
        return _name(spread), "no", "-", "-"
    padding = f"{size(spread.padding)} (+{spread.padding_percent:g} %)" if spread.padding else "-"
    return _name(spread), "yes", size(spread.most_memory), padding


def _name(spread: Spread) -> str:
    """As --topology reads it, without sizes of 1."""
    sizes = spread.placing.sizes
    named = {name: getattr(sizes, name) for name in ("tp", "dp", "ep", "pp", "nodes")}
    text = [f"{name}={number}" for name, number in named.items() if number != 1] or ["tp=1"]
    if sizes.ep_redundant:
        text.append(f"{sizes.ep_redundant} redundant experts")
    return ",".join(text)


def _verdict(report: Report) -> str:
    if report.loads:
        return f"The checkpoint loads with {_name(report.spread)}."
    reasons = [
        *(["its tensors do not fit the model"] if report.census.problems else []),
        *([f"it does not fit {_name(report.spread)}"] if report.spread.refusals else []),
    ]
    return f"The checkpoint does not load: {' and '.join(reasons)}, see above."


def _members(ranks: Sequence[int]) -> str:
    """Ranks as runs of neighbours; the number of them where there are many runs."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    if len(text) > RANGES_SHOWN:
        return f"{text[0]}, ... ({len(ranks)} ranks)"
    return ", ".join(text)


def size(number: int) -> str:
    """Bytes for people.

    >>> size(230121630720), size(18284), size(12)
    ('230.12 GB', '18.28 kB', '12 B')
    """
    for unit, bytes_a_unit in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= bytes_a_unit:
            return f"{number / bytes_a_unit:.2f} {unit}"
    return f"{number} B"
