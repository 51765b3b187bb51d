"""Weight updates of a running engine: equal to a fresh start, or nothing has changed.

Bit for bit: the checksum of every parameter on every rank, and the whole vocabulary's
log-probabilities, which hold for the pipeline stages that give no checksums.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sglang_minimax import TINY_M2
from sglang_minimax.validation.engine_process import EngineProcess
from tests.engine.updating import (
    Held,
    Pairs,
    Sender,
    Tensors,
    Updated,
    other_weights,
    prepare,
    tiny,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

HEAD = "lm_head.weight"
NORM = "model.norm.weight"
# In the last layer, so on the last pipeline stage.
Q_PROJ = "model.layers.3.self_attn.q_proj.weight"
# In a layer of the rank's own stage, where there are two.
OWN = (Q_PROJ.replace("3", "0"), Q_PROJ)
EXPERT = "model.layers.3.block_sparse_moe.experts.5.w2.weight"

TOPOLOGIES: dict[str, dict[str, int]] = {
    "tp1": {},
    "tp2": {"tp_size": 2},
    "ep2": {"tp_size": 2, "ep_size": 2},
    "dp2": {"tp_size": 2, "attn_dp_size": 2},
    "pp2": {"pp_size": 2},
}


def start(path: Path, parallelism: dict[str, int]) -> EngineProcess:
    return EngineProcess(
        model_path=str(path),
        dtype="float32",
        skip_tokenizer_init=True,
        before=prepare,
        **parallelism,
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the same architecture in which every tensor differs, in two shards."""
    return write_checkpoint(tmp_path_factory.mktemp("other"), other_weights(), shards=2)


def write_checkpoint(folder: Path, tensors: Tensors, *, shards: int = 1) -> Path:
    """tiny-m2 with other tensors. shards: the tensors take turns, so that layers are mixed."""
    shutil.copytree(TINY_M2, folder, dirs_exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    (folder / "model.safetensors").unlink()
    index = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.fixture(scope="module", params=TOPOLOGIES)
def topology(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def fresh(topology: str, other: Path) -> Held:
    """What an engine holds that was started with the other weights."""
    with start(other, TOPOLOGIES[topology]) as engine:
        return Updated(engine, TOPOLOGIES[topology]).holds()


@pytest.fixture(scope="module")
def running(topology: str, fresh: Held) -> Iterator[Updated]:
    """An engine that was started with tiny-m2; each test leaves it with these weights."""
    with start(TINY_M2, TOPOLOGIES[topology]) as engine:
        yield Updated(engine, TOPOLOGIES[topology])


@pytest.fixture(scope="module")
def before(running: Updated, fresh: Held) -> Held:
    held = running.holds()
    assert held != fresh
    return held


@pytest.fixture(autouse=True)
def left_as_found(running: Updated, before: Held) -> Iterator[None]:
    yield
    assert running.holds() == before


# --- tensors -------------------------------------------------------------------------------


def chunks(tensors: Tensors, count: int, seed: int) -> list[Pairs]:
    """All of the tensors, in an order that depends on the seed, in `count` parts."""
    pairs = list(tensors.items())
    random.Random(seed).shuffle(pairs)
    return [pairs[i::count] for i in range(count)]


def bucket(pairs: Pairs) -> dict[str, Any]:
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    packed = FlattenedTensorBucket(named_tensors=pairs)
    return {"flattened_tensor": packed.get_flattened_tensor(), "metadata": packed.get_metadata()}


def replace_all(running: Updated, tensors: Tensors, count: int, seed: int) -> None:
    with running.session():
        for part in chunks(tensors, count, seed):
            success, message = running.tensors(part)
            assert success, message


def test_chunks_in_any_order_twice_in_a_row_equal_a_fresh_start(
    running: Updated, fresh: Held, before: Held
) -> None:
    replace_all(running, other_weights(), count=5, seed=0)
    assert running.holds() == fresh
    replace_all(running, tiny(), count=3, seed=1)
    assert running.holds() == before
    replace_all(running, tiny(), count=1, seed=2)
    replace_all(running, other_weights(), count=2, seed=3)
    assert running.holds() == fresh
    with running.session():
        for part in chunks(tiny(), 2, seed=4):
            assert running.tensors(bucket(part), "flattened_bucket")[0]


def packed_by_sglang(tensors: Tensors) -> Tensors:
    """SGLang's own parameter names: q, k and v in one, all experts of a layer in two."""
    packed = {
        name: t for name, t in tensors.items() if not re.search(r"\.[qkv]_proj|experts", name)
    }
    for layer in range(4):
        path = f"model.layers.{layer}"
        packed[f"{path}.self_attn.qkv_proj.weight"] = torch.cat(
            [tensors[f"{path}.self_attn.{part}_proj.weight"] for part in "qkv"]
        )
        moe = f"{path}.block_sparse_moe.experts"
        w1, w2, w3 = (
            torch.stack([tensors[f"{moe}.{expert}.{name}.weight"] for expert in range(8)])
            for name in ("w1", "w2", "w3")
        )
        packed[f"{moe}.w13_weight"] = torch.cat([w1, w3], dim=1)
        packed[f"{moe}.w2_weight"] = w2
    return packed


def as_in_transformers(tensors: Tensors) -> Tensors:
    """The names that transformers >= 5 has in memory, under a multimodal wrapper's prefix."""
    renamed = {}
    for name, tensor in packed_by_sglang(tensors).items():
        name = name.replace("block_sparse_moe", "mlp").replace("w13_weight", "gate_up_proj")
        renamed[f"language_model.{name}".replace("w2_weight", "down_proj")] = tensor
    return renamed


@pytest.mark.parametrize("spelling", [packed_by_sglang, as_in_transformers])
def test_every_spelling_is_the_same_update(
    spelling: Callable[[Tensors], Tensors], running: Updated, fresh: Held, before: Held
) -> None:
    for tensors, held in ((other_weights(), fresh), (tiny(), before)):
        replace_all(running, spelling(tensors), count=3, seed=5)
        assert running.holds() == held


def good() -> Pairs:
    """Pairs that would change what the engine answers."""
    other = other_weights()
    return [(name, other[name]) for name in (NORM, HEAD, "model.embed_tokens.weight")]


class Odd:
    """An object that no payload may hold."""


BAD: dict[str, tuple[Callable[[], Any], str | None, str]] = {
    "short": (lambda: [*good(), (Q_PROJ, torch.ones(511, 128))], None, f"misshapen: {Q_PROJ} is ["),
    "transposed": (lambda: [*good(), (EXPERT, torch.ones(384, 128))], None, f"misshapen: {EXPERT}"),
    "share_of_a_rank": (
        lambda: [*good(), (Q_PROJ, torch.ones(256, 128))],
        None,
        f"misshapen: {Q_PROJ} is [256, 128], expected [512, 128]",
    ),
    "unknown": (lambda: [*good(), ("model.layers.0.z", torch.ones(1))], None, "unexpected: model"),
    "layer_too_many": (
        lambda: [*good(), (Q_PROJ.replace("3", "4"), torch.ones(512, 128))],
        None,
        "unexpected: model.layers.4",
    ),
    "twice": (lambda: [*good(), good()[0]], None, f"duplicate: {NORM}"),
    "integers": (lambda: [*good(), (Q_PROJ, torch.ones(512, 128).int())], None, "is I32"),
    "fp8": (
        lambda: [*good(), (Q_PROJ, torch.ones(512, 128).to(torch.float8_e4m3fn))],
        None,
        f"invalid: {Q_PROJ} is F8_E4M3, expected BF16",
    ),
    "no_tensor": (lambda: [*good(), (Q_PROJ, [1.0])], None, f"{Q_PROJ} is a list"),
    "no_pairs": (lambda: [*good(), Q_PROJ], None, "pairs"),
    "no_list": (lambda: dict(good()), None, "not a dict"),
    "sparse": (lambda: [*good(), (NORM, torch.ones(128).to_sparse())], None, "sparse"),
    "no_pickle": (lambda: b"\x80\x04 nonsense", None, "Nothing was changed"),
    "pickle_of_code": (lambda: [*good(), (Q_PROJ, Odd())], None, "Nothing was changed"),
    "format": (lambda: good(), "sharded", "load_format 'sharded'"),
    "custom_loader": (lambda: good(), "os.system", "load_format 'os.system'"),
    "bucket_of_pairs": (lambda: good(), "flattened_bucket", "bucket"),
    "bucket_short": (
        lambda: bucket([*good(), (Q_PROJ, torch.ones(511, 128))]),
        "flattened_bucket",
        f"misshapen: {Q_PROJ}",
    ),
    "bucket_torn": (
        lambda: bucket(good()) | {"flattened_tensor": torch.ones(8, dtype=torch.uint8)},
        "flattened_bucket",
        "of a bucket of 8",
    ),
    "direct_unknown": (
        lambda: [("model.nothing", torch.ones(1)), *good()],
        "direct",
        "unexpected: model.nothing",
    ),
    # SGLang's copy fills the whole parameter with a single value, and reports success.
    "direct_single": (
        lambda: [("model.layers.0.input_layernorm.weight", torch.ones(1))],
        "direct",
        "misshapen: model.layers.0.input_layernorm.weight is [1], expected [128]",
    ),
}


def test_a_refused_call_changes_nothing_and_the_session_goes_on(
    running: Updated, before: Held
) -> None:
    with running.session():
        for case, (make, load_format, words) in BAD.items():
            payload = make()
            success, message = running.tensors(payload, load_format)
            assert not success, case
            words = "pipeline stage" if load_format == "direct" and running.pp > 1 else words
            assert words in message, f"{case}: {message}"
            assert "Nothing was changed" in message
            checksums = running.engine.call("weight_checksums")
            assert checksums == before.checksums, case
            assert "[rank" not in message or running.pp > 1, f"{case}: all ranks found it"
        assert running.holds() == before
        success, message = running.tensors(good())
        assert success, message
    assert running.holds() != before
    with running.session():
        assert running.tensors([(name, tiny()[name]) for name, _ in good()])[0]


def test_direct_copies_into_the_parameter_of_that_name(running: Updated, fresh: Held) -> None:
    name = "model.layers.0.input_layernorm.weight"
    if running.pp > 1:
        with running.session():
            success, message = running.tensors([(name, tiny()[name])], "direct")
        assert not success
        assert "pipeline stage" in message
        return
    for tensors in (other_weights(), tiny()):
        with running.session():
            assert running.tensors([(name, tensors[name])], "direct")[0]
        held = running.engine.call("weight_checksums")[0][name]
        assert (held == fresh.checksums[0][name]) == torch.equal(
            tensors[name], other_weights()[name]
        )


@pytest.mark.parametrize("bad", [0, 1])
def test_one_bad_rank_is_enough(bad: int, running: Updated, before: Held) -> None:
    """Each rank has a payload of its own; the others must not write theirs."""
    ranks = running.tp * running.pp
    if ranks == 1:
        pytest.skip("one rank")
    wrongs: dict[str, Any] = {
        f"misshapen: {OWN[bad]}": [*good(), (OWN[bad], torch.ones(511, 128))],
        "UnpicklingError": b"\x80\x04 nonsense",
        "is a list": [(NORM, [1.0])],
    }
    with running.session():
        for words, wrong in wrongs.items():
            per_rank: list[Any] = [good(), good()]
            per_rank[bad] = wrong
            success, message = running.call("update_ranks", per_rank=per_rank)
            assert not success
            assert words in message
            assert f"[rank {bad}]" in message
            assert running.engine.call("weight_checksums") == before.checksums
            assert running.holds() == before
        for count in {0, 1, 3} - {running.tp}:
            success, message = running.call("update_ranks", per_rank=[good()] * count)
            assert not success
            assert f"{count} ranks" in message


def test_a_payload_that_two_stages_would_open_is_refused(running: Updated, before: Held) -> None:
    """Shared memory is handed over once; SGLang's second stage would end with an EOFError."""
    if running.pp == 1:
        pytest.skip("one stage")
    with running.session():
        success, message = running.call("update_ranks", per_rank=[good()])
        assert not success
        assert "send 2, one for each rank" in message
        assert running.holds() == before


def test_without_a_session_nothing_is_taken(running: Updated) -> None:
    success, message = running.tensors(good())
    assert not success
    assert "begin_weight_update" in message


# --- disk ----------------------------------------------------------------------------------


def test_a_checkpoint_from_disk_equals_a_fresh_start(
    running: Updated, fresh: Held, before: Held, other: Path
) -> None:
    for path, held in ((other, fresh), (TINY_M2, before), (TINY_M2, before), (other, fresh)):
        success, message = running.disk(path)
        assert success, message
        assert running.holds() == held
    assert running.disk(TINY_M2)[0]


@pytest.mark.parametrize("paused", [False, True])
def test_an_update_meets_requests_that_run(paused: bool, running: Updated, before: Held) -> None:
    """It waits for them, or finds them paused; the stages do not wait for each other for ever."""
    prompts = [[9, 10, 11 + i] for i in range(3)]
    arguments = {"path": str(TINY_M2), "prompts": prompts, "tokens": 40}
    plain = running.engine.call("update_amid_requests", **arguments, update=False)
    running.wait_until_idle()
    amid = running.engine.call("update_amid_requests", **arguments, paused=paused)
    assert amid["answers"] == plain["answers"]
    success, message = amid["update"]
    # Requests that wind down are a reason for no, where the cache is to be flushed.
    assert success or "Nothing was changed" in message


def edited(change: Callable[[Tensors], Any]) -> Callable[[Path], Any]:
    """The other weights with one thing wrong."""

    def write(folder: Path) -> None:
        tensors = other_weights()
        change(tensors)
        write_checkpoint(folder, tensors)

    return write


def configured(**changes: Any) -> Callable[[Path], Any]:
    """The other weights with another config.json."""

    def write(folder: Path) -> None:
        write_checkpoint(folder, other_weights())
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))

    return write


def cut(folder: Path) -> None:
    write_checkpoint(folder, other_weights())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickled(folder: Path) -> None:
    write_checkpoint(folder, other_weights())
    (folder / "model.safetensors").rename(folder / "model.bin")


def in_two_shards(folder: Path) -> None:
    write_checkpoint(folder, other_weights(), shards=2)
    shard = folder / "model-00001-of-00002.safetensors"
    save_file({HEAD: other_weights()[HEAD]}, folder / "model-00003-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"]
    weights["again"] = "model-00003-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": weights}))
    assert shard.is_file()


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (edited(lambda t: t.pop(Q_PROJ)), f"(1 missing).*missing: {Q_PROJ}"),
    "missing_expert": (edited(lambda t: t.pop(EXPERT)), f"(1 missing).*missing: {EXPERT}"),
    "short": (edited(lambda t: t.update({Q_PROJ: t[Q_PROJ][:-1]})), f"misshapen: {Q_PROJ}"),
    "unknown": (edited(lambda t: t.update(z=torch.ones(1))), "unexpected: z"),
    "integers": (edited(lambda t: t.update({HEAD: t[HEAD].int()})), "is I32"),
    "duplicate": (in_two_shards, f"duplicate: {HEAD}"),
    "cut": (cut, "incomplete"),
    "pickle": (pickled, "a pickle"),
    "nothing": (lambda folder: shutil.rmtree(folder), "is no folder"),
    "empty": (lambda folder: None, "no weights"),
    "other_model": (configured(rope_theta=999), "rope_theta is 999.0, of the running one 10000.0"),
    "contradictory": (configured(scoring_func="softmax"), "scoring_func"),
}


def test_a_broken_checkpoint_is_refused_before_anything_is_written(
    running: Updated, before: Held, tmp_path: Path
) -> None:
    for case, (write, words) in BROKEN.items():
        folder = tmp_path / case
        folder.mkdir()
        write(folder)
        success, message = running.disk(folder)
        assert not success, case
        for part in words.split(".*"):
            assert part in message, f"{case}: {message}"
        assert "Nothing was changed" in message
        assert running.engine.call("weight_checksums") == before.checksums, case
    for load_format in ("pt", "npcache", "dummy", "sharded_state", "nonsense"):
        success, message = running.disk(TINY_M2, load_format)
        assert not success
        assert f"load_format {load_format!r}" in message


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_fails_in_the_middle_is_undone_on_all_ranks(
    rank: int, running: Updated, before: Held, other: Path, tmp_path: Path
) -> None:
    """The headers were right. The failure is gone when SGLang reads the new path once more."""
    if rank >= running.tp * running.pp:
        pytest.skip("one rank")
    folder = tmp_path / "flaky"
    shutil.copytree(other, folder)
    flag = folder / f"breaks_on_rank_{rank}"
    flag.touch()
    success, message = running.disk(folder)
    assert not flag.exists()
    assert not success
    assert "Input/output error" in message
    assert f"The weights of {TINY_M2} are back." in message
    assert running.holds() == before
    # The path went back, too: the next failure has the right place to go to.
    flag.touch()
    assert f"The weights of {TINY_M2} are back." in running.disk(folder)[1]


def test_what_did_not_come_from_a_checkpoint_is_lost_then_and_that_is_said(
    running: Updated, before: Held, other: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "flaky"
    shutil.copytree(other, folder)
    (folder / "breaks_on_rank_0").touch()
    with running.session():
        assert running.tensors(good())[0]
    success, message = running.disk(folder)
    assert not success
    assert "are lost" in message


# --- a process group -----------------------------------------------------------------------


@pytest.fixture
def sender(running: Updated) -> Iterator[Sender]:
    if running.pp > 1:
        pytest.skip("SGLang has no group over pipeline stages")
    sender = Sender(running)
    yield sender
    sender.close()


def test_broadcast_chunks_equal_a_fresh_start(
    sender: Sender, running: Updated, fresh: Held
) -> None:
    for tensors, held in ((other_weights(), fresh), (tiny(), None)):
        for load_format in (None, "flattened_bucket"):
            with running.session():
                for part in chunks(tensors, 4, seed=7):
                    success, message = sender.update(part, load_format)
                    assert success, message
            assert held is None or running.holds() == held


def test_a_refused_broadcast_is_received_and_dropped(
    sender: Sender, running: Updated, before: Held
) -> None:
    """The sender does not hang, and the group stays in step for the next call."""
    wrongs: dict[str, Pairs] = {
        f"misshapen: {Q_PROJ}": [*good(), (Q_PROJ, torch.ones(511, 128))],
        "unexpected: nothing": [("nothing", torch.ones(3)), *good()],
        f"duplicate: {NORM}": [*good(), good()[0]],
        "is I64": [*good(), (Q_PROJ, torch.ones(512, 128).long())],
    }
    with running.session():
        for words, pairs in wrongs.items():
            for load_format in (None, "flattened_bucket"):
                # Types of different sizes do not share a bucket.
                if load_format and len({tensor.dtype for _, tensor in pairs}) > 1:
                    continue
                success, message = sender.update(pairs, load_format)
                assert not success
                assert words in message
                assert "Nothing was changed" in message
                assert running.engine.call("weight_checksums") == before.checksums
        assert sender.update(good())[0]
        assert running.holds() != before
        assert sender.update([(name, tiny()[name]) for name, _ in good()])[0]


def test_what_cannot_be_received_is_refused_without(sender: Sender, running: Updated) -> None:
    lies: dict[str, dict[str, Any]] = {
        "there is no group 'nobody'": {"group_name": "nobody"},
        "no type of torch": {"dtypes": ["float32", "nonsense", "float32"]},
        "2 types": {"dtypes": ["float32", "float32"]},
        "no shape": {"shapes": [[128], [-1], [2]]},
        "load_format 'direct'": {"load_format": "direct"},
        "0 names": {"names": [], "dtypes": [], "shapes": []},
    }
    with running.session():
        for words, lie in lies.items():
            success, message = sender.announce(good(), **lie)
            assert not success
            assert words in message
            assert "Nothing was received" in message


def test_a_group_over_pipeline_stages_is_refused_at_once(running: Updated) -> None:
    if running.pp == 1:
        pytest.skip("one stage")
    success, message = running.call(
        "init_weights_update_group",
        master_address="127.0.0.1",
        master_port=9,
        rank_offset=1,
        world_size=2,
        group_name="g",
        backend="gloo",
    )
    assert not success
    assert "pipeline stages" in message


def test_a_group_without_a_name_is_answered(running: Updated) -> None:
    """SGLang asserts, which ends the scheduler."""
    success, _ = running.call(
        "init_weights_update_group",
        master_address="127.0.0.1",
        master_port=9,
        rank_offset=1,
        world_size=2,
        group_name="",
        backend="gloo",
    )
    assert not success
