"""The look at a checkpoint folder: every way a file can be broken is one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from sglang_minimax.errors import LoadError
from sglang_minimax.loading.files import INDEX, check_checkpoint

NAME = "model.safetensors"
SOUND = save({"a": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.bfloat16)})


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def entry(start: object, end: object) -> bytes:
    return json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [start, end]}}).encode()


def two(first: list[int], second: list[int]) -> bytes:
    spans = {"a": first, "b": second}
    return json.dumps(
        {n: {"dtype": "U8", "shape": [4], "data_offsets": span} for n, span in spans.items()}
    ).encode()


def test_tensors_may_lie_in_any_order(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(with_header(two([4, 8], [0, 4]), b"12345678"))
    check_checkpoint(tmp_path)


def test_a_sound_folder_passes(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(SOUND)
    check_checkpoint(tmp_path)


def test_a_name_on_a_hub_is_left_alone() -> None:
    check_checkpoint(Path("MiniMaxAI/MiniMax-M2"))


BROKEN = {
    "empty": (b"", "incomplete"),
    "short_length": (b"\x01\x00", "incomplete"),
    "huge_length": (b"\xff" * 20, "header"),
    "cut_in_header": (SOUND[:30], "incomplete"),
    "cut_in_data": (SOUND[:-1], "incomplete"),
    "too_long": (SOUND + b"\0", "announces"),
    "no_json": (with_header(b"x" * 20), "header"),
    "no_object": (with_header(b"[1, 2]"), "header"),
    "no_offsets": (with_header(b'{"a": {}}'), "header"),
    "text_offsets": (with_header(entry("0", "4"), b"1234"), "header"),
    "negative": (with_header(entry(-4, 4), b"1234"), "offsets"),
    "backwards": (with_header(entry(4, 0), b"1234"), "offsets"),
    "short_of_its_shape": (with_header(entry(0, 3), b"123"), "offsets"),
    "gap": (with_header(two([0, 4], [5, 9]), b"123456789"), "offsets"),
    "gap_at_the_start": (with_header(two([1, 5], [5, 9]), b"123456789"), "offsets"),
    "overlap": (with_header(two([0, 4], [2, 6]), b"123456"), "offsets"),
    "deep": (with_header(b"[" * 100_000), "header"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named(case: str, tmp_path: Path) -> None:
    content, word = BROKEN[case]
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(LoadError, match=word) as caught:
        check_checkpoint(tmp_path)
    assert str(tmp_path / NAME) in str(caught.value)


def test_a_shard_of_the_index_must_exist(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(SOUND)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": NAME, "b": "two.safetensors"}}))
    with pytest.raises(LoadError, match=r"two\.safetensors is missing"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}'])
def test_a_broken_index_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(SOUND)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(LoadError, match="index"):
        check_checkpoint(tmp_path)


def test_a_file_that_the_index_does_not_name_is_not_looked_at(tmp_path: Path) -> None:
    """SGLang does not read it either; some checkpoints come with a second copy."""
    (tmp_path / NAME).write_bytes(SOUND)
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": NAME}}))
    check_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth"])
def test_pickles_alone_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(LoadError, match=f"{name}.*safetensors"):
        check_checkpoint(tmp_path)


def test_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no weights"):
        check_checkpoint(tmp_path)
