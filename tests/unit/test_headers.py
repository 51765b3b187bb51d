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
from sglang_minimax.loading.files import architecture_of, check_same_architecture
from sglang_minimax.loading.headers import ITEM_BYTES, read_header, read_headers
from sglang_minimax.loading.values import TYPES

TENSORS = {
    "a.weight": torch.ones(3, 4, dtype=torch.bfloat16),
    "b.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
    "b.weight_scale_inv": torch.tensor([0.5]),
    "c": torch.arange(6, dtype=torch.int8).reshape(2, 3),
    "scalar": torch.tensor(2.5),
    "empty": torch.ones(0, 4),
}
KINDS = {"a.weight": "BF16", "b.weight": "F8_E4M3", "b.weight_scale_inv": "F32", "c": "I8"}


def test_what_is_announced_is_what_was_written(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt"})
    found = read_headers([file]).tensors
    content = file.read_bytes()
    assert found.keys() == TENSORS.keys()
    for name, tensor in found.items():
        assert tensor.file == file
        assert tensor.shape == tuple(TENSORS[name].shape)
        assert tensor.kind == KINDS.get(name, "F32")
        data = TENSORS[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert tensor.nbytes == len(data)
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == data


def test_every_type_of_safetensors_has_its_bytes(tmp_path: Path) -> None:
    for kind, dtype in TYPES.items():
        save_file({"a": torch.zeros(3, dtype=dtype)}, tmp_path / "x.safetensors")
        (tensor,) = read_header(tmp_path / "x.safetensors").values()
        assert (tensor.kind, tensor.nbytes) == (kind, 3 * dtype.itemsize)
    assert TYPES.keys() == ITEM_BYTES.keys()


def test_a_name_in_two_files_is_told_with_both(tmp_path: Path) -> None:
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for file in files:
        save_file({"a": torch.ones(1), file.stem: torch.ones(2)}, file)
    headers = read_headers(files)
    assert headers.repeated == [("a", *files)]
    assert headers.tensors["a"].file == files[0]
    assert headers.tensors.keys() == {"a", "1", "2"}


def test_a_type_that_no_checkpoint_has_is_named(tmp_path: Path) -> None:
    text = b'{"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}'
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(LoadError, match=r"a in .* is C64"):
        read_headers([file])


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"none\.safetensors cannot be read \(No such file"):
        read_headers([tmp_path / "none.safetensors"])


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
