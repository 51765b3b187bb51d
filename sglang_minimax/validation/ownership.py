"""Compare a rank's parameters, element for element, with the part of the checkpoint it should own.

Written without the loader: a parameter's name and `topology.rank_share` say which rows, columns and
experts of which tensors belong here, and plain slicing of the files says what they hold. A
parameter that the share does not name is one that this rank should not have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sglang_minimax.config import Architecture
from sglang_minimax.topology import RankShare, Topology, rank_share

#: SGLang pads the vocabulary of these.
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the ranks of one engine are compared with; travels to them as JSON.

    captured: the layers whose outputs the model captures, as it does for a draft model.
    """

    checkpoint: str
    topology: str
    dp_lm_head: bool = False
    captured: tuple[int, ...] = ()

    def write(self, path: Path) -> None:
        """Write it for `check` to read."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Expectation:
        """What `write` wrote."""
        return cls(**json.loads(path.read_text()))

    def share(self, rank: int) -> RankShare:
        """What `rank` should own."""
        config = json.loads((Path(self.checkpoint) / "config.json").read_text())
        return rank_share(
            Architecture.from_config(config),
            Topology.parse(self.topology),
            rank,
            dp_lm_head=self.dp_lm_head,
        )


def check(model: torch.nn.Module, rank: int, expectation: Path) -> dict[str, Any]:
    """Compare all parameters of `model` with what `rank` should hold.

    Returns {"parameters": how many were compared, "elements": of them, "wrong": sentences}.
    A quantised checkpoint is not compared: {"parameters": 0, ..., "skipped": the reason}.
    """
    expected = Expectation.read(expectation)
    config = json.loads((Path(expected.checkpoint) / "config.json").read_text())
    if config.get("quantization_config"):
        reason = "weights of a quantised checkpoint are converted while they are loaded"
        return {"parameters": 0, "elements": 0, "wrong": [], "skipped": reason}
    parameters = dict(model.named_parameters())
    wrong, elements = [], 0
    with Checkpoint(Path(expected.checkpoint)) as checkpoint:
        arch = Architecture.from_config(config)
        for name, weight in owned(arch, expected.share(rank), checkpoint):
            parameter = parameters.pop(name, None)
            if parameter is None:
                wrong.append(f"rank {rank} lacks {name}")
            elif problem := difference(parameter.detach(), weight, padded=name in TABLES):
                wrong.append(f"rank {rank}: {name} {problem}")
            else:
                elements += weight.numel()
    wrong += [f"rank {rank} holds {name}, which it does not own" for name in sorted(parameters)]
    return {"parameters": len(dict(model.named_parameters())), "elements": elements, "wrong": wrong}


def difference(found: torch.Tensor, owned_part: torch.Tensor, *, padded: bool) -> str | None:
    """How `found` differs from the owned part, None where it does not.

    padded: whether it may have more rows, which must be zero.
    """
    rows = owned_part.shape[0]
    longer = found.shape[0] > rows and not padded
    if found.shape[1:] != owned_part.shape[1:] or found.shape[0] < rows or longer:
        return f"has shape {list(found.shape)}, but its share is {list(owned_part.shape)}"
    if not torch.equal(found[:rows].cpu(), owned_part.to(found.dtype)):
        differing = int((found[:rows].cpu() != owned_part.to(found.dtype)).sum())
        return f"differs from its share of the checkpoint in {differing} elements"
    if bool(found[rows:].any()):
        return f"has values beyond its {rows} rows"
    return None


def owned(
    arch: Architecture, share: RankShare, checkpoint: Checkpoint
) -> Iterator[tuple[str, torch.Tensor]]:
    """(parameter, its values) for everything that a rank with this share should hold."""
    if share.embedding_rows is not None:
        yield (
            "model.embed_tokens.weight",
            checkpoint.rows("model.embed_tokens", share.embedding_rows),
        )
    if share.head_rows is not None:
        yield "model.norm.weight", checkpoint.whole("model.norm.weight")
        tied = arch.tie_word_embeddings
        # A tied head that is cut as the embedding is the same parameter, which is named once.
        if not (tied and share.head_rows == share.embedding_rows):
            module = "model.embed_tokens" if tied else "lm_head"
            yield "lm_head.weight", checkpoint.rows(module, share.head_rows)
    for layer in share.layers:
        yield from _layer(share, checkpoint, f"model.layers.{layer}")


def _layer(share: RankShare, checkpoint: Checkpoint, at: str) -> Iterator[tuple[str, torch.Tensor]]:
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{at}.{norm}.weight", checkpoint.whole(f"{at}.{norm}.weight")
    attention, attn = share.attention, f"{at}.self_attn"
    qkv = [
        checkpoint.rows(f"{attn}.{name}_proj", rows)
        for name, rows in (
            ("q", attention.q_rows),
            ("k", attention.kv_rows),
            ("v", attention.kv_rows),
        )
    ]
    yield f"{attn}.qkv_proj.weight", torch.cat(qkv)
    yield f"{attn}.o_proj.weight", checkpoint.columns(f"{attn}.o_proj", attention.q_rows)
    yield f"{attn}.q_norm.weight", checkpoint.rows(f"{attn}.q_norm", attention.q_rows)
    yield f"{attn}.k_norm.weight", checkpoint.rows(f"{attn}.k_norm", attention.kv_rows)
    moe = f"{at}.block_sparse_moe"
    yield f"{moe}.gate.weight", checkpoint.whole(f"{moe}.gate.weight")
    bias = f"{moe}.e_score_correction_bias"
    yield bias, checkpoint.whole(bias)
    wide, narrow = [], []
    for expert in share.experts:
        each, rows = f"{moe}.experts.{expert}", share.expert_rows
        gate_and_up = [checkpoint.rows(f"{each}.{name}", rows) for name in ("w1", "w3")]
        wide.append(torch.cat(gate_and_up))
        narrow.append(checkpoint.columns(f"{each}.w2", rows))
    yield f"{moe}.experts.w13_weight", torch.stack(wide)
    yield f"{moe}.experts.w2_weight", torch.stack(narrow)


class Checkpoint:
    """Slices of the tensors in a folder's safetensors files, by published name."""

    def __init__(self, folder: Path) -> None:
        self._files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._where.clear()
        self._files.clear()

    def whole(self, name: str) -> torch.Tensor:
        """The tensor under its full name."""
        return self._where[name].get_tensor(name)

    def rows(self, module: str, rows: range) -> torch.Tensor:
        """These rows of `module`'s weight; those beyond its end do not exist."""
        return self._slice(module)[rows.start : rows.stop]

    def columns(self, module: str, columns: range) -> torch.Tensor:
        """These columns of `module`'s weight."""
        return self._slice(module)[:, columns.start : columns.stop]

    def _slice(self, module: str) -> Any:
        name = f"{module}.weight"
        return self._where[name].get_slice(name)
