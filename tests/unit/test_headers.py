"""Checkpoints by their headers: what is announced, and whose architecture it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sglang_minimax import TINY_M2
from sglang_minimax.config import Architecture
from sglang_minimax.errors import ConfigError, LoadError
from sglang_minimax.loading.headers import (
    announced_tensors,
    architecture_of,
    check_same_architecture,
)


def test_weights_are_announced_and_scales_are_read(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.ones(3, 4, dtype=torch.bfloat16),
        "b.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "b.weight_scale_inv": torch.tensor([0.5]),
        "c": torch.ones(2, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    found = dict(announced_tensors([tmp_path / "x.safetensors"]))
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert (tensor.shape, tensor.dtype) == (tensors[name].shape, tensors[name].dtype)
        assert tensor.is_meta == (name != "b.weight_scale_inv")
    assert found["b.weight_scale_inv"].item() == 0.5


def test_a_name_in_two_files_comes_twice(tmp_path: Path) -> None:
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for file in files:
        save_file({"a": torch.ones(1)}, file)
    assert [name for name, _ in announced_tensors(files)] == ["a", "a"]


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: object) -> Path:
        values = json.loads((TINY_M2 / "config.json").read_text()) | changes
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return write


RUNNING = architecture_of(TINY_M2)
assert RUNNING is not None


def test_the_same_architecture_passes_and_none_says_nothing(
    config: Callable[..., Path], tmp_path: Path
) -> None:
    check_same_architecture(tmp_path, RUNNING)
    check_same_architecture(config(), RUNNING)
    check_same_architecture(config(num_mtp_modules=3), RUNNING)


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("num_experts_per_tok", 1, "top_k"),
        ("rope_theta", 1234.0, "rope_theta"),
        ("rms_norm_eps", 0.5, "rms_norm_eps"),
        ("num_hidden_layers", 3, "num_layers"),
    ],
)
def test_another_architecture_is_named(
    key: str, value: object, field: str, config: Callable[..., Path]
) -> None:
    """None of these but the last one shows in the shapes of the weights."""
    raw = json.loads((TINY_M2 / "config.json").read_text())
    assert key in raw
    changes = {key: value}
    if key == "num_hidden_layers" and "attn_type_list" in raw:
        changes["attn_type_list"] = [1] * 3
    with pytest.raises(LoadError, match=field):
        check_same_architecture(config(**changes), RUNNING)


def test_a_contradictory_config_is_refused(config: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError):
        check_same_architecture(config(scoring_func="softmax"), RUNNING)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_config_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LoadError, match=r"config\.json"):
        check_same_architecture(tmp_path, RUNNING)


def test_every_field_of_an_architecture_is_compared() -> None:
    """A mapping in it must compare by value, or a rope type would look like another one."""
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    raw = json.loads((TINY_M2 / "config.json").read_text()) | {"rope_scaling": scaling}
    assert Architecture.from_config(raw) == Architecture.from_config(raw)
