"""The check of a rank's weights: it accepts the right slices, and notices what is not one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sglang_minimax.config import Architecture
from sglang_minimax.topology import Topology, rank_share
from sglang_minimax.validation import ownership
from sglang_minimax.validation.random_checkpoint import write_random_checkpoint
from sglang_minimax.validation.shapes import SMALL

CONFIG = {**SMALL, "num_hidden_layers": 2, "vocab_size": 300}
TOPOLOGY = "tp=8,dp=2,ep=4,pp=2"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(folder, CONFIG)
    return folder


class Rank(torch.nn.Module):
    """Parameters under arbitrary dotted names, as SGLang's model lists them."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def named_parameters(self, *_: object, **__: object):  # type: ignore[no-untyped-def]
        return iter((name, torch.nn.Parameter(w)) for name, w in self.weights.items())


def weights_of(checkpoint: Path, rank: int) -> dict[str, torch.Tensor]:
    arch = Architecture.from_config(CONFIG)
    share = rank_share(arch, Topology.parse(TOPOLOGY), rank)
    with ownership.Checkpoint(checkpoint) as files:
        found = dict(ownership.owned(arch, share, files))
    # The last rank's rows of the vocabulary are padded: 320 rows over the ranks of a group.
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in found:
            rows = 320 // (4 if "embed" in name else 8)
            padding = torch.zeros(rows - len(found[name]), 128)
            found[name] = torch.cat((found[name], padding))
    return found


def check(
    checkpoint: Path, tmp_path: Path, rank: int, weights: dict[str, torch.Tensor]
) -> list[str]:
    path = tmp_path / "expectation.json"
    ownership.Expectation(str(checkpoint), TOPOLOGY).write(path)
    return ownership.check(Rank(weights), rank, path)["wrong"]


@pytest.mark.parametrize("rank", [0, 7, 8, 15])
def test_the_right_slices_are_accepted(checkpoint: Path, tmp_path: Path, rank: int) -> None:
    assert check(checkpoint, tmp_path, rank, weights_of(checkpoint, rank)) == []


def test_every_parameter_of_another_rank_is_noticed(checkpoint: Path, tmp_path: Path) -> None:
    """Rank 0 and rank 7 share norms and router alone: another DP group, other experts."""
    shared = ("layernorm", "gate", "correction_bias")
    found = check(checkpoint, tmp_path, 0, weights_of(checkpoint, 7))
    names = {name for name in weights_of(checkpoint, 0) if not any(s in name for s in shared)}
    assert {name for name in names if any(name in sentence for sentence in found)} == names


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "model.layers.0.self_attn.q_norm.weight differs from its share of the checkpoint in 1 elem": (
        lambda w: w["model.layers.0.self_attn.q_norm.weight"].view(-1)[5:6].add_(1e-6)
    ),
    "rank 0 lacks model.layers.0.block_sparse_moe.gate.weight": (
        lambda w: w.pop("model.layers.0.block_sparse_moe.gate.weight")
    ),
    "rank 0 holds lm_head.weight, which it does not own": (
        lambda w: w.update({"lm_head.weight": torch.zeros(1, 1)})
    ),
    "self_attn.qkv_proj.weight has shape [512, 128], but its share is [192, 128]": (
        lambda w: w.update({"model.layers.0.self_attn.qkv_proj.weight": torch.zeros(512, 128)})
    ),
    "experts.w13_weight differs": (
        lambda w: w["model.layers.0.block_sparse_moe.experts.w13_weight"].copy_(
            w["model.layers.0.block_sparse_moe.experts.w13_weight"].flip(0)
        )
    ),
}


@pytest.mark.parametrize("words", CHANGES)
def test_a_change_is_noticed(checkpoint: Path, tmp_path: Path, words: str) -> None:
    weights = weights_of(checkpoint, 0)
    CHANGES[words](weights)
    (sentence,) = check(checkpoint, tmp_path, 0, weights)
    assert words in sentence


def test_values_in_the_padding_are_noticed(checkpoint: Path, tmp_path: Path) -> None:
    weights = weights_of(checkpoint, 3)  # the last quarter of the vocabulary
    weights["model.embed_tokens.weight"][-1] = 1
    (sentence,) = check(checkpoint, tmp_path, 3, weights)
    assert "has values beyond its 60 rows" in sentence
