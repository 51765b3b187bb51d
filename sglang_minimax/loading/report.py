"""The facts about a checkpoint that `sglang-minimax inspect` prints, from headers alone.

No printing, no torch, no SGLang. Bytes are those of the checkpoint's types, in which SGLang holds
most parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglang_minimax import support
from sglang_minimax.config import Architecture
from sglang_minimax.errors import LoadError
from sglang_minimax.legality import Sizes
from sglang_minimax.loading.census import Census, Kind, Load
from sglang_minimax.loading.files import config_of, weight_files
from sglang_minimax.loading.formats import quantisation_config
from sglang_minimax.loading.headers import Headers, read_headers
from sglang_minimax.loading.problems import LISTED
from sglang_minimax.loading.slots import Stage
from sglang_minimax.topology import RankShare, Topology, rank_shares

#: TP sizes of the overview, each with whole and with shared experts.
OVERVIEW = (1, 2, 4, 8, 16)
#: Problems that mean that config.json and the files speak of different formats.
DISAGREEMENTS = ("contradictory", "invalid", "quantised")


@dataclass(frozen=True, slots=True)
class Placing:
    """How the model is to be spread."""

    sizes: Sizes
    dp_lm_head: bool = False

    @property
    def topology(self) -> Topology:
        """Raises TopologyError for sizes that do not divide."""
        sizes = self.sizes
        return Topology(sizes.tp, sizes.dp, sizes.ep, sizes.pp, sizes.nodes)


@dataclass(frozen=True, slots=True)
class Ranks:
    """Ranks that read and hold equally much of the same layers.

    experts: of each layer, copies included. rows: of each expert, as the checkpoint has them.
    rows_in_memory: with padding.
    """

    ranks: tuple[int, ...]
    layers: range
    experts: int
    rows: int
    rows_in_memory: int
    load: Load

    @property
    def memory(self) -> int:
        """Bytes of weights on each of these ranks."""
        return self.load.held + self.load.padding

    def as_dict(self) -> dict[str, Any]:
        """For JSON; layers as [first, one past the last]."""
        return {
            "ranks": self.ranks,
            "layers": [self.layers.start, self.layers.stop],
            "experts": self.experts,
            "expert_rows": self.rows,
            "expert_rows_in_memory": self.rows_in_memory,
            "tensors": self.load.tensors,
            "bytes_read": self.load.read,
            "bytes_held": self.load.held,
            "padding_bytes": self.load.padding,
            "bytes_in_memory": self.memory,
        }


@dataclass(frozen=True, slots=True)
class Spread:
    """A way to spread the model: why it is refused, or who holds how much."""

    placing: Placing
    refusals: tuple[str, ...]
    ranks: tuple[Ranks, ...]

    @property
    def padding(self) -> int:
        """Bytes by which experts are padded, over all ranks."""
        return sum(len(each.ranks) * each.load.padding for each in self.ranks)

    @property
    def padding_percent(self) -> float:
        """The same in percent of the bytes of experts, over all ranks."""
        experts = sum(len(each.ranks) * each.load.experts for each in self.ranks)
        return round(100 * self.padding / experts, 1) if experts else 0.0

    @property
    def most_memory(self) -> int:
        """Bytes of weights on the fullest rank; 0 where refused."""
        return max((each.memory for each in self.ranks), default=0)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, as an entry of the overview."""
        return {
            "tp": self.placing.sizes.tp,
            "ep": self.placing.sizes.ep,
            "refusals": self.refusals,
            "bytes_in_memory_at_most": self.most_memory,
            "padding_bytes": self.padding,
            "padding_percent": self.padding_percent,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """A checkpoint, and how it would be spread.

    beside: weight files that the index does not name. format_from: the file that says the format.
    """

    folder: Path
    files: tuple[Path, ...]
    beside: tuple[str, ...]
    file_bytes: int
    format_from: str
    arch: Architecture
    census: Census
    tensors: int
    tensor_bytes: int
    spread: Spread
    overview: tuple[Spread, ...]

    @property
    def agrees(self) -> bool:
        """Whether the files are stored in the way that the config says."""
        return not any(group in self.census.problems.groups for group in DISAGREEMENTS)

    @property
    def loads(self) -> bool:
        """Whether a server would load it in this topology."""
        return not self.census.problems and not self.spread.refusals

    def as_dict(self) -> dict[str, Any]:
        """For JSON; docs/inspect.md has the keys."""
        recipe, placing = self.arch.recipe, self.spread.placing
        return {
            "loads": self.loads,
            "checkpoint": {
                "folder": str(self.folder),
                "files": len(self.files),
                "file_bytes": self.file_bytes,
                "not_in_index": self.beside,
                "tensors": self.tensors,
                "tensor_bytes": self.tensor_bytes,
            },
            "model": _model(self.arch),
            "format": {
                "name": recipe.name,
                "title": recipe.quantised.title,
                "from": self.format_from,
                "agrees": self.agrees,
            },
            "kinds": [_kind(kind, self.census) for kind in sorted(self.census.kinds)],
            "left_out": [
                {"reason": reason, "tensors": count.tensors, "bytes": count.nbytes}
                for reason, count in sorted(self.census.left_out.items())
            ],
            "unknown": {
                "tensors": self.census.unknown.tensors,
                "bytes": self.census.unknown.nbytes,
            },
            "problems": {
                group: {"count": len(lines), "first": lines[:LISTED]}
                for group, lines in self.census.problems.groups.items()
            },
            "topology": {
                **{name: getattr(placing.sizes, name) for name in ("tp", "dp", "ep", "pp")},
                "nodes": placing.sizes.nodes,
                "redundant_experts": placing.sizes.ep_redundant,
                "dp_lm_head": placing.dp_lm_head,
            },
            "refusals": self.spread.refusals,
            "ranks": [each.as_dict() for each in self.spread.ranks],
            "padding_bytes": self.spread.padding,
            "padding_percent": self.spread.padding_percent,
            "overview": [each.as_dict() for each in self.overview],
        }


def _model(arch: Architecture) -> dict[str, Any]:
    names = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "num_experts")
    more = ("top_k", "expert_width", "vocab_size", "num_mtp_modules", "tie_word_embeddings")
    return {name: getattr(arch, name) for name in names + more}


def _kind(kind: Kind, census: Census) -> dict[str, Any]:
    count = census.kinds[kind]
    return {
        **kind._asdict(),
        "shapes": sorted(count.shapes),
        "tensors": count.tensors,
        "bytes": count.nbytes,
    }


def examine(folder: Path, placing: Placing) -> Report:
    """Read the headers of a checkpoint folder. Raises MinimaxError where there is none to judge."""
    _check_folder(folder)
    arch, source = _described(folder)
    files = weight_files(folder)
    headers: Headers = read_headers(files)
    census = Census(headers, arch)
    named = {file.name for file in files}
    beside = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in named)
    return Report(
        folder=folder,
        files=tuple(files),
        beside=tuple(beside),
        file_bytes=sum(file.stat().st_size for file in files),
        format_from=source,
        arch=arch,
        census=census,
        tensors=len(headers.tensors) + len(headers.repeated),
        tensor_bytes=sum(tensor.nbytes for tensor in headers.tensors.values()),
        spread=spread(census, placing),
        overview=tuple(
            spread(census, Placing(Sizes(tp=tp, ep=ep)))
            for tp in OVERVIEW
            for ep in sorted({1, tp})
        ),
    )


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.exists():
        raise LoadError(
            f"{folder} is a file; give the folder that has config.json and the weights."
        )
    parts = folder.parts
    if len(parts) == 2 and not folder.is_absolute() and parts[0] not in ("..", "~"):
        raise LoadError(
            f"{folder} is no local folder, and inspect reads local files only; check the path, or "
            f"download a model of the hub with `hf download {folder} --local-dir {parts[1]}`, and "
            "give that folder."
        )
    raise LoadError(f"{folder} does not exist; check the path of the checkpoint folder.")


def _described(folder: Path) -> tuple[Architecture, str]:
    """The model of a folder, and the file that its format was read from."""
    config = config_of(folder)
    if config is None:
        raise LoadError(
            f"{folder} has no config.json, which says what model it is; copy it from where the "
            "weights are from, or give the folder that has it."
        )
    found = quantisation_config(folder, config)
    own = config.get("quantization_config") or config.get("compression_config")
    source = "config.json"
    if found is not None and found != own:
        described = [file.name for file in sorted(folder.glob("*quant*.json"))]
        source = ", ".join(described) or source
    rest = {key: value for key, value in config.items() if key != "compression_config"}
    return Architecture.from_config({**rest, "quantization_config": found}), source


def spread(census: Census, placing: Placing) -> Spread:
    """Who would hold how much; every reason where the model cannot be spread so."""
    launch = support.Launch(**asdict(placing.sizes))
    if refusals := support.refusals(census.arch, launch):
        return Spread(placing, tuple(dict.fromkeys(refusals)), ())
    return Spread(placing, (), tuple(_ranks(census, placing)))


def _ranks(census: Census, placing: Placing) -> Iterable[Ranks]:
    """The ranks of a legal topology, those that are alike together, in the order of the first."""
    topology = placing.topology
    shares = rank_shares(
        census.arch,
        topology,
        dp_lm_head=placing.dp_lm_head,
        redundant_experts=placing.sizes.ep_redundant,
    )
    loads: dict[tuple[object, ...], Load] = {}
    found: dict[tuple[object, ...], list[int]] = {}
    for share in shares:
        stage = Stage.of(census.arch, topology, share)
        likeness = _likeness(census, share, stage)
        if likeness not in loads:
            loads[likeness] = census.load_of(stage)
        width = stage.width
        row = (share.layers, len(share.experts), len(width.lines), width.width, loads[likeness])
        found.setdefault(row, []).append(share.rank)
    return [Ranks(tuple(ranks), *row) for row, ranks in found.items()]  # type: ignore[arg-type]


def _likeness(census: Census, share: RankShare, stage: Stage) -> tuple[object, ...]:
    """What the bytes of a rank depend on."""
    held = stage.experts(share.layers.start)
    return (
        share.layers,
        share.attention.size,
        stage.width.width,
        len(stage.width.lines),
        None if stage.embedding is None else len(stage.embedding.lines),
        None if stage.head is None else len(stage.head.lines),
        stage.head == stage.embedding,
        tuple(sorted(held.values() if census.even_experts else held.items())),
    )
