"""What bench_moe_comm shows of its rows: lines of its tables, and its aims."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks.moe_comm_cases import CHECKPOINTS, FP4, IN_TREE, OURS, SMALL, Row

#: What the FP8 gather may carry of what the default one carries.
AIM_GATHER = 0.55
HEAD = (
    "topology",
    "checkpoint",
    "way",
    "collectives",
    *("attention", "gather", "combine", "together"),
    "of in-tree's",
    "model, us",
)
SHORT_HEAD = (
    "FP8 checkpoint",
    "decode, in-tree",
    "ours",
    "the gather alone",
    "prefill, in-tree",
    "ours",
    "the gather alone",
)
ENGINE_HEAD = (
    "topology",
    "checkpoint",
    "way",
    "path",
    "forwards as computed",
    "collectives a layer",
    "bytes given a row",
)
GLOO_HEAD = ("load", "way", "MB a rank", "median ms", "least", "most")


def launches(rows: Iterable[Row]) -> Iterator[dict[str, Row]]:
    """Way -> row, for every topology, checkpoint and load."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        key = (row["topology"], row["checkpoint"], row["load"])
        found.setdefault(key, {})[row["way"]] = row
    yield from found.values()


def references(launch: dict[str, Row]) -> list[Row]:
    """What SGLang does by default in place of ours, at the same arguments.

    For NVFP4 the arguments are taken to be those with which SGLang gathers FP4 rows where it can
    (--moe-runner-backend flashinfer_cutlass; what it takes by itself on Blackwell does not). In a
    decode both paddings are its default: by hardware, speculation and idle groups.
    """
    if FP4 in launch:
        return [launch[FP4]]
    return [launch[name] for name in (IN_TREE, SMALL) if name in launch]


def total(row: Row) -> float:
    """Bytes a token a layer."""
    return row["bytes_a_token_a_layer"]["total"]


def excesses(rows: Iterable[Row]) -> list[Row]:
    """Where ours carries more than in-tree's least, and by which share."""
    found = []
    for launch in launches(rows):
        least = min(references(launch), key=total)
        share = total(launch[OURS]) / total(least) - 1
        if share > 1e-9:
            names = {key: least[key] for key in ("topology", "checkpoint", "load", "way")}
            found.append(names | {"path": launch[OURS]["path"], "more": share})
    return found


def no_more_bytes(rows: Iterable[Row]) -> str:
    """The first aim, and what was found of it, the worst of each path and load."""
    rows = list(rows)
    asked = "at no topology more bytes than in-tree"
    worst: dict[tuple[str, str, str], Row] = {}
    for each in excesses(rows):
        key = (each["load"], each["path"], each["way"])
        if key not in worst or each["more"] > worst[key]["more"]:
            worst[key] = each
    if not worst:
        return f"met: {asked}; {len(list(launches(rows)))} launches"
    listed = "; ".join(
        f"{load}, {path}: up to {100 * each['more']:.1f} % more than {way} ({each['topology']})"
        for (load, path, way), each in worst.items()
    )
    return f"NOT MET: {asked}: {listed}"


def gather_share(rows: Iterable[Row]) -> str:
    """The second aim: the FP8 gather beside the gather of SGLang's default."""
    asked = (
        "with attention DP and FP8 checkpoints at most "
        f"{100 * AIM_GATHER:.0f} % of the bytes of its default gather"
    )
    shares = [
        launch[OURS]["bytes_a_token_a_layer"]["gather"] / each["bytes_a_token_a_layer"]["gather"]
        for launch in launches(rows)
        for each in references(launch)
        if launch[OURS]["path"] == "gather-fp8"
    ]
    if not shares:
        return f"not computed: {asked}"
    verdict = "met" if max(shares) <= AIM_GATHER else "NOT MET"
    return f"{verdict}: {asked}; {100 * min(shares):.1f} to {100 * max(shares):.1f} %"


def lines(rows: Iterable[Row], load: str) -> list[tuple[str, ...]]:
    """A line for each topology, way and path of a load; checkpoints that share one are named."""
    merged: dict[tuple[str, str, str], tuple[list[str], Row, Row]] = {}
    for launch in launches(rows):
        for way, row in launch.items():
            if row["load"] != load:
                continue
            key = (row["topology"], way, row["path"])
            merged.setdefault(key, ([], row, launch[IN_TREE]))[0].append(row["checkpoint"])
    return [
        (
            row["topology"],
            "all" if len(checkpoints) == len(CHECKPOINTS) else ", ".join(checkpoints),
            way if way != OURS else f"{OURS}: {row['path']}",
            str(row["collectives"]),
            *(f"{row['bytes_a_token_a_layer'][part]:,.0f}" for part in _PARTS),
            f"{100 * total(row) / total(base):.1f} %",
            microseconds(row["model_microseconds_a_layer"]),
        )
        for (_, way, _), (checkpoints, row, base) in merged.items()
    ]


_PARTS = ("attention", "gather", "combine", "total")


def short_lines(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Bytes a token a layer with attention DP and FP8, by topology, decode and prefill."""
    found = {
        (row["topology"], row["load"], row["way"]): row
        for row in rows
        if row["checkpoint"] == "FP8" and row["load"] in ("decode", "prefill")
    }
    lines = []
    for name in dict.fromkeys(topology for topology, _, _ in found):
        if found[name, "decode", "ours"]["path"] == "sglang":
            continue  # without attention DP there is nothing to gather
        cells = []
        for load in ("decode", "prefill"):
            theirs, ours = found[name, load, "in-tree"], found[name, load, "ours"]
            both = [row["bytes_a_token_a_layer"]["gather"] for row in (ours, theirs)]
            refused = theirs["refused_in_tree"]
            cells += [
                "refuses" if refused else f"{total(theirs):,.0f}",
                f"{total(ours):,.0f}",
                "" if refused else f"{100 * both[0] / both[1]:.0f} %",
            ]
        lines.append((name, *cells))
    return lines


def microseconds(ends: Iterable[float]) -> str:
    """One number, or both ends of a range."""
    shown = list(dict.fromkeys(f"{end:.0f}" for end in ends))
    return " to ".join(shown)


def engine_lines(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """A line for each engine."""
    return [
        (
            *(str(row[key]) for key in ("topology", "checkpoint", "way", "path")),
            *(
                (f"ends: {row['ends']}"[:60], "", "")
                if "ends" in row
                else (
                    f"{row['equal']} of {row['forwards']}",
                    _kinds(row, "collectives_a_layer", "g"),
                    _kinds(row, "given_a_row_a_layer", ",.0f"),
                )
            ),
        )
        for row in rows
    ]


def _kinds(row: Row, key: str, form: str) -> str:
    return ", ".join(f"{name} {found[key]:{form}}" for name, found in row["kinds"].items())


def counted_as_computed(rows: Iterable[Row]) -> str:
    """Whether what engines asked of their groups is what the arithmetic says."""
    rows = list(rows)
    asked = "engines move what the arithmetic says"
    if not rows:
        return f"not counted: {asked}"
    wrong = [
        f"{row['topology']} {row['checkpoint']} {row['way']}"
        for row in rows
        if "ends" in row or row["equal"] != row["forwards"]
    ]
    forwards = sum(row.get("forwards", 0) for row in rows)
    if wrong:
        return f"NOT SO: {asked}: {', '.join(wrong)}"
    return f"so: {asked}; {forwards} forwards of ranks in {len(rows)} engines"


def gloo_lines(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """A line for each load and way."""
    return [
        (
            row["load"],
            row["way"],
            f"{row['bytes_a_layer'] / 1e6:.2f}",
            *(f"{row['milliseconds'][key]:.1f}" for key in ("median", "least", "most")),
        )
        for row in rows
    ]
