"""Write the README's measured tables from the committed result files, and the list of shapes.

    python -m benchmarks.readme

Each table stands between two comments, `<!-- name -->` and `<!-- /name -->`. A test fails when the
README and the result files disagree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import accuracy_table, moe_comm_table, parser_table, prologue_table
from benchmarks.common import RESULTS

README = Path(__file__).parents[1] / "README.md"
VALIDATION = README.parent / "docs/validation.md"
ACCURACY = README.parent / "docs/benchmarks-accuracy.md"
Result = dict[str, Any]


def topologies() -> str:
    """Every shape of the list, in-tree and here, against transformers."""
    data = _read("topologies")
    rows = [
        (f"`{row['shape']}`", row["why"], _agreed(row["in_tree"]), _agreed(row["ours"]))
        for row in data["rows"]
    ]
    head = ("shape", "", "SGLang in-tree", "sglang-minimax")
    return _table(head, rows) + _source("topologies", data["provenance"])


def _agreed(found: Result) -> str:
    """The largest difference, with the layers of KV cache where stages share them."""
    if found["max_error"] is None:
        return f"**ends**: `{found['ends'].rpartition('status -9: ')[2][:80].strip()}`"
    layers = found.get("kv_layers") or []
    stages = f"; KV cache for {', '.join(map(str, layers))} layers" if len(layers) > 1 else ""
    other = "" if found["tokens_equal"] else "**other tokens**, "
    return f"{other}{found['max_error']:.1e}{stages}"


def startup() -> str:
    """Seconds until a server answers, spawned and forked."""
    data = _read("startup")
    rows = []
    for spawn, fork in zip(data["rows"][::2], data["rows"][1::2], strict=True):
        ratio = spawn["seconds"] / fork["seconds"]
        rows.append(
            (
                f"TP{spawn['ranks']}",
                f"{spawn['seconds']:.0f} s",
                f"{fork['seconds']:.0f} s",
                f"{ratio:.1f}x",
                f"{spawn['cpu_seconds']:.0f} s",
                f"{fork['cpu_seconds']:.0f} s",
            )
        )
    head = ("", "spawn", "fork", "ratio", "spawn, CPU time", "fork, CPU time")
    return _table(head, rows) + _source("startup", data["provenance"])


def tiny() -> str:
    """What tiny-m2 gets right, and what planted mistakes leave of it."""
    data = _read("tiny_m2_accuracy")
    accuracy = data["accuracy"]
    rows = [
        (name.replace("_", " "), f"{100 * entry['share']:.1f} %", str(entry["asked"]))
        for name, entry in accuracy["categories"].items()
    ]
    table = _table(("held-out questions, temperature 0", "right", "asked"), rows)
    return table + _source("tiny_m2_accuracy", accuracy)


def strictness() -> str:
    """What a broken or differently spelt checkpoint leads to, in-tree and here."""
    data = _read("strictness")
    rows = [
        (
            row["case"],
            f"**starts with {row['in_tree_holds']}**"
            if row["in_tree_holds"]
            else _shown(row["in_tree"]),
            _shown(row["ours"]),
        )
        for row in data["rows"]
    ]
    table = _table(("tiny-m2 with one change", "SGLang in-tree", "sglang-minimax"), rows)
    return table + _source("strictness", data["provenance"])


def _shown(outcome: str) -> str:
    return outcome if outcome == "starts" else f"refused: `{outcome[:140].replace('|', '/')}`"


def load() -> str:
    """What a rank's load costs: all names with small matrices, and few of full size."""
    data = _read("load")
    names, sizes = (_pairs(data["rows"], which) for which in ("names", "bytes"))
    cpu = [
        (
            place,
            *(f"{row['warm']['cpu_seconds']['median']:.1f} s" for row in both),
            *(f"{row['names_seconds']['median']:.2f} s" for row in both),
            *(f"{row['tensors_opened']:,}" for row in both),
        )
        for place, both in names.items()
    ]
    disk = [
        (
            place,
            *(_cold(row, "seconds", 1, "s") for row in both),
            *(_cold(row, "storage_bytes", 1e-6, "MB") for row in both),
            f"{both[1]['bytes_owned'] / 1e6:.0f} MB",
        )
        for place, both in sizes.items()
    ]
    counts = [data["checkpoints"][which]["tensors"] for which in ("names", "bytes")]
    head = (
        "rank 0 of",
        "CPU, in-tree",
        "ours",
        "for names, in-tree",
        "ours",
        "opened, in-tree",
        "ours",
    )
    second = ("rank 0 of", "cold, in-tree", "ours", "from disk, in-tree", "ours", "held")
    return (
        f"{counts[0]:,} tensors, small:\n\n{_table(head, cpu)}\n\n"
        f"{counts[1]} tensors of full size:\n\n{_table(second, disk)}"
        + _source("load", data["provenance"])
    )


def prologue() -> str:
    """The attention prologue on each GPU that it was measured on."""
    found = prologue_table.gpu_results()
    if not found:
        return prologue_table.NOT_YET
    parts = []
    for path in found:
        data = prologue_table.read(path)
        table = _table(prologue_table.HEAD, prologue_table.rows(data))
        title = f"{data['device']['name']}, TP1, bf16"
        aims = prologue_table.aims(data)
        parts.append(f"{title}:\n\n{table}\n\n{aims}" + _source(path.stem, data["provenance"]))
    return "\n\n".join(parts)


def parsers() -> str:
    """A long tool argument, streamed through in-tree's parser and through ours."""
    data = _read("parsers")
    shown = (parser_table.CONTENT, parser_table.CHUNK)
    rows = [row for row in data["rows"] if (row["content"], row["chunk"]) == shown]
    table = _table(parser_table.HEAD, parser_table.lines(rows, data["budget"]))
    return table + _source("parsers", data["provenance"])


def communication() -> str:
    """Bytes to the experts and back with attention DP and an FP8 checkpoint."""
    data = _read("moe_comm")
    table = _table(moe_comm_table.SHORT_HEAD, moe_comm_table.short_lines(data["rows"]))
    return table + _source("moe_comm", data["provenance"])


def _pairs(rows: list[Result], checkpoint: str) -> dict[str, tuple[Result, Result]]:
    """topology -> the rows of both loaders, in-tree first."""
    found = {
        (row["topology"], row["loader"]): row for row in rows if row["checkpoint"] == checkpoint
    }
    places = dict.fromkeys(place for place, _ in found)
    return {place: (found[place, "in-tree"], found[place, "ours"]) for place in places}


def _cold(row: Result, figure: str, factor: float, unit: str) -> str:
    if "refuses" in row:
        return "refuses"
    value = row["cold"][figure]["median"] * factor
    return f"{value:.2f} {unit}" if unit == "s" else f"{value:.0f} {unit}"


TABLES: dict[str, Callable[[], str]] = {
    "topologies": topologies,
    "startup": startup,
    "strictness": strictness,
    "load": load,
    "prologue": prologue,
    "parsers": parsers,
    "communication": communication,
    "tiny": tiny,
}


def rendered(text: str) -> str:
    """`text` with every table between its comments replaced by what the result files say."""
    for name, table in TABLES.items():
        pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
        if not re.search(pattern, text, flags=re.DOTALL):
            raise ValueError(f"the README has no place for the table {name!r}")
        block = f"<!-- {name} -->\n{table()}\n<!-- /{name} -->"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


def _read(name: str) -> Result:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _source(name: str, provenance: Result, root: str = "") -> str:
    return (
        f"\n\n{provenance['date']}, {provenance['machine']}, `{provenance['command']}`, "
        f"[{name}.json]({root}benchmarks/results/{name}.json)."
    )


def with_the_list(text: str) -> str:
    """docs/validation.md with the table of ci/topologies.yaml between its comments."""
    from sglang_minimax.validation.report import topology_table
    from sglang_minimax.validation.shapes import catalogue

    block = f"<!-- list -->\n{topology_table(catalogue())}\n<!-- /list -->"
    return re.sub(r"<!-- list -->.*?<!-- /list -->", lambda _: block, text, flags=re.DOTALL)


def with_the_matrix(text: str) -> str:
    """docs/benchmarks-accuracy.md with both tables of the matrix between their comments."""
    data = _read("accuracy_matrix")
    source = _source("accuracy_matrix", data["provenance"], root="../")
    shapes = _table(accuracy_table.SHAPES_HEAD, accuracy_table.shapes(data["rows"]))
    mistakes = _table(accuracy_table.MISTAKES_HEAD, accuracy_table.mistakes(data["rows"]))
    blocks = {
        "shapes": f"{shapes}\n\n{accuracy_table.notes(data)}{source}",
        "mistakes": mistakes + source,
    }
    for name, found in blocks.items():
        block = f"<!-- {name} -->\n{found}\n<!-- /{name} -->"
        pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
    VALIDATION.write_text(with_the_list(VALIDATION.read_text()))
    ACCURACY.write_text(with_the_matrix(ACCURACY.read_text()))
