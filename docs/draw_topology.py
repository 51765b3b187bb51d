"""Draw docs/topology.png: what each of 32 ranks owns, with every number from `topology.py`.

python docs/draw_topology.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from sglang_minimax.config import Architecture
from sglang_minimax.topology import RankShare, Topology, rank_shares

PICTURE = Path(__file__).with_name("topology.png")
PUBLISHED = Architecture.from_config({"head_dim": 128})
TOPOLOGY = Topology(tp=32, dp=2, ep=16, nodes=4)
INK = "#22303c"


@dataclass(frozen=True)
class Band:
    """One row of the picture; ranks with the same `owned` get the same shade."""

    title: str
    note: str
    colours: str | None
    owned: Callable[[RankShare], Hashable]
    label: Callable[[RankShare], str]
    # What is counted for "each on N ranks", where it is not `owned` alone.
    element: Callable[[RankShare], Hashable] | None = None


def ends(part: range | None) -> str:
    """First and last, both included."""
    if not part:
        return "-"
    return str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}"


def bands(shares: tuple[RankShare, ...]) -> list[Band]:
    """From the machines down to the vocabulary."""
    one = shares[0]
    attention = one.attention
    reduce = (
        f"QK norm over these {attention.size} ranks: "
        f"sum of q² / {attention.q_divisor}, sum of k² / {attention.k_divisor}"
    )
    embedding, head = one.embedding_rows or range(0), one.head_rows or range(0)
    return [
        Band("node", f"{len(one.groups['node'])} ranks", None, lambda s: s.node,
             lambda s: f"node {s.node}"),
        Band("attention group", "own requests, own KV cache", None, lambda s: s.attention_dp_rank,
             lambda s: f"group {s.attention_dp_rank}.  {reduce}"),
        Band("query heads, q norm", f"{len(attention.q_rows)} rows a rank", "Blues",
             lambda s: s.attention.q_rows, lambda s: ends(s.attention.q_head_ids)),
        Band("KV heads, k norm", f"{len(attention.kv_rows)} rows a rank", "Blues",
             lambda s: s.attention.kv_rows, lambda s: ends(s.attention.kv_head_ids)),
        Band("experts", f"{len(one.experts)} of {PUBLISHED.num_experts} a rank", "Oranges",
             lambda s: s.experts, lambda s: ends(s.experts)),
        Band("rows of an expert", f"{len(one.expert_rows)} of {PUBLISHED.expert_width} a rank",
             "Purples", lambda s: s.expert_rows, lambda s: ends(s.expert_rows),
             lambda s: (s.experts, s.expert_rows)),
        Band("embedding, part", f"{len(embedding):,} rows a rank", "Greens",
             lambda s: s.embedding_rows, lambda s: str(s.attention_tp_rank)),
        Band("head, part", f"{len(head):,} rows a rank", "Greens", lambda s: s.head_rows,
             lambda s: str(s.tp_rank)),
    ]  # fmt: skip


def draw(axes: Axes, shares: tuple[RankShare, ...], rows: list[Band]) -> None:
    """One block for each run of neighbouring ranks that own the same."""
    for y, band in enumerate(rows):
        things = list(dict.fromkeys(band.owned(share) for share in shares))
        for _, run in groupby(shares, key=lambda s, b=band: (s.attention_dp_rank, b.owned(s))):
            members = list(run)
            draw_block(axes, band, members, y, things.index(band.owned(members[0])), len(things))
        axes.text(-0.5, y + 0.42, band.title, ha="right", va="center", weight="bold", fontsize=10)
        axes.text(-0.5, y + 0.72, band.note, ha="right", va="center", fontsize=7.5, color="#66737f")
        if band.colours:
            element = band.element or band.owned
            copies = set(Counter(element(share) for share in shares).values())
            text = (
                f"each on {'/'.join(map(str, sorted(copies)))} rank{'' if copies == {1} else 's'}"
            )
            axes.text(len(shares) + 0.4, y + 0.5, text, va="center", fontsize=8.5)


def draw_block(
    axes: Axes, band: Band, members: list[RankShare], y: int, which: int, of: int
) -> None:
    """The same thing has the same shade wherever it is; light enough for dark print."""
    shade = 0.16 + (0.46 if of > 2 else 0.22) * which / max(of - 1, 1)
    colour = plt.get_cmap(band.colours)(shade) if band.colours else "#eef1f4"
    x, width = members[0].rank, len(members)
    axes.add_patch(Rectangle((x, y + 0.08), width, 0.84, fc=colour, ec="white", lw=1.6))
    tall = width == 1 and len(band.label(members[0])) > 2
    axes.text(
        x + width / 2,
        y + 0.5,
        band.label(members[0]),
        ha="center",
        va="center",
        fontsize=7 if tall else 8.5,
        rotation=90 if tall else 0,
        color=INK,
    )


def main() -> None:
    """Write the picture."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "text.color": INK})
    shares = rank_shares(PUBLISHED, TOPOLOGY)
    rows = bands(shares)
    figure, axes = plt.subplots(figsize=(17, 7.6))
    draw(axes, shares, rows)
    axes.set_xlim(-6.6, len(shares) + 4.2)
    axes.set_ylim(len(rows) + 0.75, -1.1)
    axes.axis("off")
    for share in shares:
        axes.text(share.rank + 0.5, len(rows) + 0.25, str(share.rank), ha="center", fontsize=8)
    axes.text(-0.5, len(rows) + 0.25, "global rank", ha="right", fontsize=10, weight="bold")
    sizes = f"--tp-size {TOPOLOGY.tp} --attn-dp-size {TOPOLOGY.dp} --ep-size {TOPOLOGY.ep}"
    title = f"MiniMax-M2 over {len(shares)} ranks:  {sizes} --nnodes {TOPOLOGY.nodes}"
    axes.text(0, -0.75, title, fontsize=13, weight="bold", va="center")
    legend = (
        "Blocks of the same shade in a row hold the same heads, experts or rows. "
        "All of them count from 0, both ends included."
    )
    axes.text(0, -0.27, legend, fontsize=9, va="center", color="#66737f")
    figure.savefig(PICTURE, dpi=100, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
