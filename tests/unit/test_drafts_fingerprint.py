"""The print of a model: the same for all its formats, another for another model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sglang_minimax import TINY_M2
from sglang_minimax.config import Architecture
from sglang_minimax.drafts.fingerprint import _IN_LAYER, DIGITS, _wanted, fingerprint
from sglang_minimax.drafts.values import as_bf16
from sglang_minimax.errors import LoadError
from sglang_minimax.loading.headers import Tensor
from tests.formats import awq, compressed_tensors, fp8, nvfp4
from tests.formats.base import Fixture, config, stored_plain, tiny, write

State = dict[str, torch.Tensor]
Change = Callable[[State], State]

#: One of each way to store matrices; a quantiser of tensors takes seconds.
FORMATS = {
    "awq": awq.FIXTURES["awq"],
    "ct-int4": compressed_tensors.FIXTURES["ct-int4"],
    "fp8": next(iter(fp8.FIXTURES.values())),
    "nvfp4-experts": nvfp4.FIXTURES["nvfp4-experts"],
}
Q_NORM = "model.layers.1.self_attn.q_norm.weight"
LAST_NORM = "model.norm.weight"


def plain() -> State:
    return {name: stored_plain(name, value) for name, value in tiny().items()}


def fingerprint_of(tensors: State, folder: Path, **changes: object) -> str:
    return fingerprint(write(Fixture("x", config(**changes), tensors, {}), folder))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fingerprint_of(plain(), tmp_path_factory.mktemp("plain"))


def test_of_the_bundled_model() -> None:
    """It stands in config.json of every draft that was trained for it, so it must not change."""
    assert fingerprint(TINY_M2) == "592e4ad68c666821"
    assert len(fingerprint(TINY_M2)) == DIGITS


@pytest.mark.parametrize("name", FORMATS)
def test_survives_quantisation(name: str, original: str, tmp_path: Path) -> None:
    assert fingerprint(write(FORMATS[name](), tmp_path)) == original


def scaled_for_awq(tensors: State) -> State:
    """Activation-aware scales: the norms are divided, the matrices after them multiplied."""
    for name in tensors:
        if "layernorm" in name:
            tensors[name] = tensors[name] / 2
    return tensors


def cast(dtype: torch.dtype) -> Change:
    return lambda tensors: {name: value.to(dtype) for name, value in tensors.items()}


def renamed(old: str, new: str) -> Change:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def inside_a_wrapper(tensors: State) -> State:
    return {f"language_model.{name}": value for name, value in tensors.items()}


def other_experts(tensors: State) -> State:
    return {
        name: value + 1 if "experts" in name or "embed" in name else value
        for name, value in tensors.items()
    }


@pytest.mark.parametrize(
    "change",
    [
        scaled_for_awq,
        cast(torch.float32),
        cast(torch.float16),
        renamed("model.", "model.language_model."),
        renamed("block_sparse_moe", "mlp"),
        inside_a_wrapper,
        other_experts,
    ],
    ids=["awq", "fp32", "fp16", "transformers", "mlp", "wrapper", "experts"],
)
def test_same_model(change: Change, original: str, tmp_path: Path) -> None:
    assert fingerprint_of(change(plain()), tmp_path) == original


def one_value(name: str) -> Change:
    def change(tensors: State) -> State:
        # The next number of BF16.
        tensors[name].view(torch.int16)[-1] += 1
        return tensors

    return change


def swapped(tensors: State) -> State:
    other = Q_NORM.replace("layers.1", "layers.2")
    tensors[Q_NORM], tensors[other] = tensors[other], tensors[Q_NORM]
    return tensors


@pytest.mark.parametrize(
    "change",
    [one_value(Q_NORM), one_value(LAST_NORM), one_value(Q_NORM.replace("q_n", "k_n")), swapped],
    ids=["q_norm", "last norm", "k_norm", "layers swapped"],
)
def test_another_model(change: Change, original: str, tmp_path: Path) -> None:
    assert fingerprint_of(change(plain()), tmp_path) != original


def test_layers_for_multi_token_prediction_do_not_count(original: str, tmp_path: Path) -> None:
    tensors = plain()
    tensors |= {
        name.replace("layers.1", "layers.3"): value
        for name, value in tensors.items()
        if "layers.1." in name
    }
    assert fingerprint_of(tensors, tmp_path, num_mtp_modules=1) == original


def test_shards_do_not_matter(tmp_path: Path) -> None:
    """The norms of one layer may lie in different files."""
    tensors = load_file(TINY_M2 / "model.safetensors")
    shutil.copy(TINY_M2 / "config.json", tmp_path)
    names = sorted(tensors)
    parts = {f"model-{part}.safetensors": names[part::3] for part in range(3)}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, tmp_path / file)
    index = {name: file for file, members in parts.items() for name in members}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert fingerprint(tmp_path) == fingerprint(TINY_M2)


def test_a_missing_norm_is_named(tmp_path: Path) -> None:
    tensors = plain()
    del tensors[Q_NORM]
    with pytest.raises(LoadError, match=rf"has no {Q_NORM}, .*num_hidden_layers"):
        fingerprint_of(tensors, tmp_path)


def test_a_norm_under_two_names_is_named(tmp_path: Path) -> None:
    tensors = plain()
    tensors[f"language_model.{Q_NORM}"] = tensors[Q_NORM]
    with pytest.raises(LoadError, match=f"has {Q_NORM} under two names"):
        fingerprint_of(tensors, tmp_path)


def test_a_norm_of_another_type_is_named(tmp_path: Path) -> None:
    tensors = plain() | {LAST_NORM: torch.ones(128, dtype=torch.int8)}
    with pytest.raises(LoadError, match="is I8, expected BF16, F16 or F32"):
        fingerprint_of(tensors, tmp_path)
    tensors[LAST_NORM] = torch.ones(128).to(torch.float8_e4m3fn)
    with pytest.raises(LoadError, match="is F8_E4M3, expected"):
        fingerprint_of(tensors, tmp_path)


def test_a_folder_without_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"has no config\.json"):
        fingerprint(tmp_path)


def test_bytes_of_the_published_shape() -> None:
    """The figure in the module's docstring."""
    file = Path(__file__).parents[1] / "data" / "published_config.json"
    arch = Architecture.from_config(json.loads(file.read_text()))
    norms = _wanted(arch.num_layers)
    heads = {"q_norm": arch.num_heads, "k_norm": arch.num_kv_heads}
    sizes = [arch.head_dim * heads.get(each.module, 0) or arch.hidden_size for each in norms]
    assert (len(norms), 2 * sum(sizes)) == (125, 894976)
    assert {each.module for each in norms} == {"norm", *_IN_LAYER}


BITS = st.one_of(
    st.integers(0, 2**32 - 1),
    # Ties, and their neighbours.
    st.tuples(st.integers(0, 2**16 - 1), st.sampled_from((0x7FFF, 0x8000, 0x8001))).map(
        lambda pair: (pair[0] << 16) + pair[1]
    ),
)


@given(st.lists(BITS, min_size=1, max_size=50))
def test_rounds_as_torch_does(tmp_path_factory: pytest.TempPathFactory, bits: list[int]) -> None:
    values = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    values = values[~values.isnan()]
    file = tmp_path_factory.getbasetemp() / "values"
    file.write_bytes(b"x" * 3 + values.numpy().tobytes())
    expected = values.bfloat16().view(torch.int16).numpy().tobytes()
    assert as_bf16(Tensor(file, "F32", tuple(values.shape), 3)) == expected
    halves = values.half()
    file.write_bytes(halves.numpy().tobytes())
    expected = halves.bfloat16().view(torch.int16).numpy().tobytes()
    assert as_bf16(Tensor(file, "F16", tuple(halves.shape), 0)) == expected
