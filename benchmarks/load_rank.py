"""Rank 0 of a topology in one process, for the loading benchmark (`validation.one_rank`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sglang_minimax.validation import one_rank
from sglang_minimax.validation.one_rank import IN_TREE, OURS, OneRank, Refused, in_child

__all__ = ["IN_TREE", "OURS", "PLACES", "REPLACED", "Place", "Rank", "Refused", "in_child"]

#: What is not as in a server, for the result file.
REPLACED = (
    "process groups: PyTorch's fake backend, one process stands for rank 0 of N; collectives of "
    "loading (agreement of ranks) answer as if every rank said the same",
    "message queue broadcaster of the process groups: off, it waits for the other ranks",
    "our refusals: off for the in-tree loader",
    "DefaultModelLoader.postprocess_weights: left out, FP8 kernels need a GPU",
    "device: parameters lie in host memory, so the copy to a GPU is a copy in memory",
    "torch threads: 1, as SGLang sets it on a GPU; the loaders' own threads are as released",
)


@dataclass(frozen=True)
class Place:
    """A topology, of which rank 0 is measured."""

    name: str
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """The server's command line."""
        return [word for k, v in self.sizes.items() for word in (f"--{k}-size", str(v))]


PLACES = (
    Place("TP1"),
    Place("TP8 EP8", {"tp": 8, "ep": 8}),
    Place("TP8", {"tp": 8}),
    Place("PP2", {"pp": 2}),
)


def preload() -> None:
    """Import once what every child needs."""
    torch.set_num_threads(1)
    one_rank.preload()


class Rank(OneRank):
    """Rank 0 of `place` with the checkpoint in `folder`, ready to build the model and load it."""

    def __init__(self, folder: Path, place: Place, who: str) -> None:
        super().__init__(folder, place.arguments, who=who)

    @property
    def extra(self) -> dict[str, Any]:
        """Figures for the result file, after the load."""
        return {"loader_class": self.loader_class}
