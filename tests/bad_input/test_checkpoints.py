"""A checkpoint that is wrong in one place: the server says where, and does not start."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_minimax.cli.local_server import LocalServer

Tensors = dict[str, torch.Tensor]

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.3.block_sparse_moe.experts.5.w2.weight"
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
EMBEDDING = "model.embed_tokens.weight"
SCALE = "model.layers.2.self_attn.o_proj.weight_scale_inv"
FP8 = {
    "quant_method": "fp8",
    "fmt": "float8_e4m3fn",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
IN_FP8 = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
EXPERTS_IN_FP8 = ("w1.weight", "w2.weight", "w3.weight")


def resized(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    """Replace one tensor by a changed one."""

    def edit(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name])

    return edit


def added(name: str, *shape: int) -> Callable[[Tensors], None]:
    """Add a tensor that the model does not have."""

    def edit(tensors: Tensors) -> None:
        tensors[name] = torch.zeros(shape)

    return edit


def removed(name: str) -> Callable[[Tensors], None]:
    """Take one tensor away."""

    def edit(tensors: Tensors) -> None:
        del tensors[name]

    return edit


#: SGLang's own loaders pad what is short and ignore what they do not know, without a word.
MISFITS = {
    "missing": (removed(Q_PROJ), f"missing: {Q_PROJ}"),
    "missing_expert": (removed(EXPERT), f"missing: {EXPERT}"),
    "missing_embedding": (removed(EMBEDDING), f"missing: {EMBEDDING}"),
    "unknown_name": (
        added("model.layers.0.self_attn.z_proj.weight", 3),
        "unexpected: model.layers.0.self_attn.z_proj.weight",
    ),
    "expert_too_many": (
        added(EXPERT.replace(".5.", ".8."), 128, 384),
        f"unexpected: {EXPERT.replace('.5.', '.8.')}",
    ),
    "layer_too_many": (
        added(Q_PROJ.replace(".1.", ".4."), 512, 128),
        f"unexpected: {Q_PROJ.replace('.1.', '.4.')}",
    ),
    "transposed": (
        resized(Q_PROJ, lambda tensor: tensor.t()),
        f"misshapen: {Q_PROJ} is [128, 512], expected [512, 128]",
    ),
    "row_short": (
        resized(Q_PROJ, lambda tensor: tensor[:-1]),
        f"misshapen: {Q_PROJ} is [511, 128], expected [512, 128]",
    ),
    "expert_transposed": (
        resized(EXPERT, lambda tensor: tensor.t()),
        f"misshapen: {EXPERT} is [384, 128], expected [128, 384]",
    ),
    "expert_row_short": (
        resized(EXPERT, lambda tensor: tensor[:-1]),
        f"misshapen: {EXPERT} is [127, 384], expected [128, 384]",
    ),
    "vocabulary_row_short": (
        resized(EMBEDDING, lambda tensor: tensor[:-1]),
        f"misshapen: {EMBEDDING} is [895, 128], expected [896, 128]",
    ),
    "integers": (
        resized(Q_PROJ, lambda tensor: tensor.to(torch.int8)),
        f"invalid: {Q_PROJ} is I8",
    ),
}


def test_an_unbroken_copy_starts(derive: Any, launch: Any) -> None:
    """Otherwise every refusal below could have another reason."""
    ended = launch(derive(lambda tensors: None))
    assert ended.started, ended.output


@pytest.mark.parametrize("case", MISFITS)
def test_a_tensor_that_does_not_fit_is_named(case: str, derive: Any, launch: Any) -> None:
    change, sentence = MISFITS[case]
    launch(derive(change)).assert_refused("the weights do not fit the model (1 ", sentence)


@pytest.mark.parametrize("parallelism", ["--tp-size", "--pp-size"])
def test_every_rank_ends(parallelism: str, derive: Any, launch: Any) -> None:
    """With pipeline stages only the first one misses a tensor; the other must not wait for it."""
    ended = launch(derive(removed(Q_PROJ)), parallelism, "2")
    ended.assert_refused(f"missing: {Q_PROJ}")


# --- scales --------------------------------------------------------------------------------


def quantise(tensors: Tensors) -> None:
    """Block FP8 as published, with scales of one."""
    for name in [n for n in tensors if n.endswith((*IN_FP8, *EXPERTS_IN_FP8))]:
        rows, columns = tensors[name].shape
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(-(-rows // 128), -(-columns // 128))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0], ids=str)
def test_one_wrong_scale_is_named(value: float, derive: Any, launch: Any) -> None:
    def change(tensors: Tensors) -> None:
        quantise(tensors)
        tensors[SCALE][0, 2] = value

    ended = launch(derive(change, config={"quantization_config": FP8}))
    ended.assert_refused(f"{SCALE} has scales from", "finite numbers above 0")


def test_a_missing_scale_is_named(derive: Any, launch: Any) -> None:
    def change(tensors: Tensors) -> None:
        quantise(tensors)
        del tensors[SCALE]

    ended = launch(derive(change, config={"quantization_config": FP8}))
    ended.assert_refused("(1 missing)", f"missing: {SCALE}")


def test_fp8_weights_without_their_config_are_refused(derive: Any, launch: Any) -> None:
    """FP8 values read as if they had no scale would be a model, a wrong one."""
    launch(derive(quantise)).assert_refused("contradictory", "is F8_E4M3, expected BF16")


def test_fp8_in_the_config_of_a_plain_checkpoint_is_named(derive: Any, launch: Any) -> None:
    ended = launch(derive(config={"quantization_config": FP8}))
    ended.assert_refused("contradictory", "is BF16, expected F8_E4M3", "FP8 in 128x128 blocks")


@pytest.mark.parametrize("module", ["gate", "lm_head"])
def test_what_must_stay_in_full_precision_is_named(module: str, derive: Any, launch: Any) -> None:
    name = "lm_head.weight" if module == "lm_head" else ROUTER

    def change(tensors: Tensors) -> None:
        quantise(tensors)
        rows, columns = tensors[name].shape
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(-(-rows // 128), -(-columns // 128))

    ended = launch(derive(change, config={"quantization_config": FP8}))
    ended.assert_refused(f"quantised: {name}_scale_inv", "kept in full precision")


def test_an_unknown_format_is_refused_before_anything_is_read(derive: Any, launch: Any) -> None:
    ended = launch(derive(config={"quantization_config": {"quant_method": "bitsandbytes"}}))
    ended.assert_refused("bitsandbytes", trace=True)


# --- one error for all ranks ---------------------------------------------------------------


@pytest.mark.parametrize("ranks", [("--tp-size", "2"), ("--tp-size", "2", "--ep-size", "2")])
def test_several_ranks_say_it_once(ranks: tuple[str, ...], derive: Any, launch: Any) -> None:
    """An expert that one rank holds is missed by all: each judges the whole checkpoint."""
    ended = launch(derive(removed(EXPERT)), *ranks)
    ended.assert_refused(f"missing: {EXPERT}")
    assert ended.output.count(EXPERT) == 1, ended.output
    assert "rank 1: " not in ended.output


# --- files ---------------------------------------------------------------------------------

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def sharded(derive: Any) -> tuple[Path, list[Tensors]]:
    """A checkpoint with an index whose shards are still to be written, and their tensors."""
    folder, tensors = derive(), derive.tensors()
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = [names[:200:2], [*names[1:200:2], *names[200:]]]
    index = {name: file for part, file in zip(parts, SHARDS, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder, [{name: tensors[name] for name in part} for part in parts]


def write_shards(derive: Any, folder: Path, shards: list[Tensors]) -> None:
    """Write as many shards as given."""
    for file, tensors in zip(SHARDS, shards, strict=False):
        derive.write_tensors(folder / file, tensors)


def test_sound_shards_start(sharded: Any, derive: Any, launch: Any) -> None:
    write_shards(derive, *sharded)
    ended = launch(sharded[0])
    assert ended.started, ended.output


def test_a_tensor_in_two_shards_is_named(sharded: Any, derive: Any, launch: Any) -> None:
    """Which of the two counts would depend on the order of files."""
    folder, (first, second) = sharded
    name = next(iter(first))
    write_shards(derive, folder, [first, {**second, name: first[name] + 1}])
    launch(folder).assert_refused("(1 duplicate)", f"duplicate: {name}")


def test_a_shard_of_the_index_that_is_missing_is_named(
    sharded: Any, derive: Any, launch: Any
) -> None:
    folder, (first, _) = sharded
    write_shards(derive, folder, [first])
    launch(folder).assert_refused(SHARDS[1], "missing")


def test_a_truncated_file_is_refused(derive: Any, launch: Any) -> None:
    folder = derive()
    file = folder / "model.safetensors"
    content = file.read_bytes()
    derive.replace(file, content[: len(content) // 2])
    launch(folder).assert_refused("model.safetensors", "incomplete")


def test_a_corrupt_header_is_refused(derive: Any, launch: Any) -> None:
    folder = derive()
    file = folder / "model.safetensors"
    content = file.read_bytes()
    derive.replace(file, content[:8] + b"x" * 50 + content[58:])
    launch(folder).assert_refused("model.safetensors", "header")


def test_a_folder_without_weights_is_refused(derive: Any, launch: Any) -> None:
    folder = derive()
    (folder / "model.safetensors").unlink()
    launch(folder).assert_refused("weights", str(folder))


class Touch:
    """An object whose pickle creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.path),)


@pytest.mark.parametrize("hostile", [False, True])
def test_a_pickle_is_not_read(hostile: bool, derive: Any, launch: Any, tmp_path: Path) -> None:
    """Reading a pickle runs what it says; the published checkpoints are safetensors."""
    folder, marker = derive(), tmp_path / "the pickle was run"
    (folder / "model.safetensors").unlink()
    tensors = derive.tensors()
    torch.save(tensors | {"x": Touch(marker)} if hostile else tensors, folder / "model.bin")
    ended = launch(folder)
    assert not marker.exists()
    ended.assert_refused("safetensors")


# --- the real thing ------------------------------------------------------------------------


@pytest.mark.server
def test_the_sentence_of_a_real_server(derive: Any, run_to_the_end: Any) -> None:
    ended = run_to_the_end(LocalServer(derive(removed(Q_PROJ))).command)
    assert ended.status == 1
    assert f"missing: {Q_PROJ}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.orphans == []
