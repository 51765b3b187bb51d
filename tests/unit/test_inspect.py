"""`sglang-minimax inspect`: what it finds in headers, what it says, and how it exits."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sglang_minimax import TINY_M2
from sglang_minimax.cli.main import app
from sglang_minimax.config import Architecture
from sglang_minimax.loading.census import Census
from sglang_minimax.loading.files import weight_files
from sglang_minimax.loading.headers import ITEM_BYTES, read_headers
from sglang_minimax.loading.plan import plan_of_rank
from sglang_minimax.loading.slots import Stage
from sglang_minimax.topology import Topology, rank_share

PUBLISHED = json.loads((Path(__file__).parents[1] / "data/published_config.json").read_text())
# Two layers and eight experts of the published widths.
SMALL = {
    **PUBLISHED,
    "num_hidden_layers": 2,
    "num_local_experts": 8,
    "vocab_size": 640,
    "attn_type_list": [1, 1],
}

# name -> type and shape
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def _matrix(name: str, rows: int, columns: int, fp8: bool) -> Iterator[tuple[str, Any]]:
    yield f"{name}.weight", ("F8_E4M3" if fp8 else "BF16", (rows, columns))
    if fp8:
        yield f"{name}.weight_scale_inv", ("F32", (-(-rows // 128), -(-columns // 128)))


def announced(config: dict[str, Any], fp8: bool = True) -> Tensors:
    """The tensors of a checkpoint as published, written down apart from the package's own lists."""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    q, kv = 128 * config["num_attention_heads"], 128 * config["num_key_value_heads"]
    experts, vocabulary = config["num_local_experts"], config["vocab_size"]
    found: Tensors = {
        "model.embed_tokens.weight": ("BF16", (vocabulary, hidden)),
        "model.norm.weight": ("BF16", (hidden,)),
        "lm_head.weight": ("BF16", (vocabulary, hidden)),
    }
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{path}.{norm}.weight"] = ("BF16", (hidden,))
        found[f"{path}.self_attn.q_norm.weight"] = ("BF16", (q,))
        found[f"{path}.self_attn.k_norm.weight"] = ("BF16", (kv,))
        for name, rows, columns in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden)):
            found |= _matrix(f"{path}.self_attn.{name}_proj", rows, columns, fp8)
        found |= _matrix(f"{path}.self_attn.o_proj", hidden, q, fp8)
        moe = f"{path}.block_sparse_moe"
        found[f"{moe}.gate.weight"] = ("F32", (experts, hidden))
        found[f"{moe}.e_score_correction_bias"] = ("F32", (experts,))
        for expert in range(experts):
            found |= _matrix(f"{moe}.experts.{expert}.w1", width, hidden, fp8)
            found |= _matrix(f"{moe}.experts.{expert}.w2", hidden, width, fp8)
            found |= _matrix(f"{moe}.experts.{expert}.w3", width, hidden, fp8)
    return found


def write_file(file: Path, tensors: Tensors) -> None:
    """Headers in front of a hole: the data cost no room on the disk."""
    header, end = {}, 0
    for name, (kind, shape) in tensors.items():
        size = ITEM_BYTES[kind]
        for each in shape:
            size *= each
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


def write(folder: Path, config: dict[str, Any], *files: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number, tensors in enumerate(files):
        name = f"model-{number}.safetensors"
        write_file(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def run(*arguments: object) -> tuple[int, str, str]:
    texts = ["inspect", *map(str, arguments)]
    result = CliRunner().invoke(app, texts, env={"COLUMNS": "80"})
    return result.exit_code, result.stdout, result.stderr


def facts(*arguments: object) -> dict[str, Any]:
    status, text, _ = run(*arguments, "--json")
    found = json.loads(text)
    assert status == (0 if found["loads"] else 1)
    return found


def lines_of(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 96,103 tensors with 230 GB of holes for data."""
    folder = tmp_path_factory.mktemp("published")
    tensors = list(announced(PUBLISHED).items())
    half = len(tensors) // 2
    write(folder, PUBLISHED, dict(tensors[:half]), dict(tensors[half:]))
    taken = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
    if taken > 2**30:
        pytest.skip("this file system stores holes")
    return folder


# --- the published shapes ---


def test_the_published_checkpoint(published: Path) -> None:
    found = facts(published, "--tp", 8, "--ep", 8)
    assert found["checkpoint"]["tensors"] == 96103
    assert found["checkpoint"]["tensor_bytes"] == 230_121_630_720
    assert (found["format"]["agrees"], found["problems"], found["refusals"]) == (True, {}, [])
    kinds = {(kind["projection"], kind["kind"]): kind for kind in found["kinds"]}
    assert kinds["w2", "weight"]["shapes"] == [[3072, 1536]]
    assert kinds["w2", "weight"]["tensors"] == 62 * 256
    assert kinds["w2", "weight"]["bytes"] == 62 * 256 * 3072 * 1536
    (ranks,) = found["ranks"]
    assert ranks["ranks"] == list(range(8))
    assert (ranks["experts"], ranks["expert_rows"], ranks["padding_bytes"]) == (32, 1536, 0)
    assert (ranks["bytes_read"], ranks["bytes_held"]) == (29_960_771_584, 28_936_587_136)


def test_dealt_blocks_and_their_padding(published: Path) -> None:
    found = facts(published, "--topology", "tp=8")
    first, last = found["ranks"]
    assert (first["ranks"], last["ranks"]) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert (first["expert_rows"], last["expert_rows"]) == (256, 128)
    assert first["expert_rows_in_memory"] == last["expert_rows_in_memory"] == 256
    block = 62 * 256 * (3 * 128 * 3072 + 3 * 24 * 4)
    assert (first["padding_bytes"], last["padding_bytes"]) == (0, block)
    # 12 blocks in the room of 16.
    assert (found["padding_bytes"], found["padding_percent"]) == (4 * block, 33.3)
    overview = {(each["tp"], each["ep"]): each for each in found["overview"]}
    assert len(overview) == 9
    assert overview[8, 1]["padding_bytes"] == 4 * block
    assert overview[8, 8]["padding_bytes"] == overview[4, 1]["padding_bytes"] == 0

    status, text, _ = run(published, "--tp", 8)
    assert status == 0
    lines = lines_of(text)
    assert "4-7 0-61 256 128 in 256 96,103 89.27 GB 19.57 GB 18.73 GB" in lines
    assert "tp=8 yes 38.30 GB 74.91 GB (+33.3 %)" in lines
    assert max(map(len, text.splitlines())) <= 80
    assert text == run(published, "--tp", 8)[1]


@pytest.mark.parametrize(
    "text",
    ["tp=1", "tp=8,ep=2", "tp=8,dp=4,ep=8", "tp=16", "tp=2,pp=2", "tp=48"],
)
@pytest.mark.parametrize("gaps", [False, True])
def test_bytes_are_those_of_the_plan(tmp_path: Path, text: str, gaps: bool) -> None:
    """What is counted by kinds is what the loader's plan of each rank reads and holds."""
    tensors = announced(SMALL)
    if gaps:
        tensors = {
            name: t
            for name, t in tensors.items()
            if "layers.1.block_sparse_moe.experts.3" not in name
        }
    folder = write(tmp_path, SMALL, tensors)
    headers, arch = read_headers(weight_files(folder)), Architecture.from_config(SMALL)
    census, topology = Census(headers, arch), Topology.parse(text)
    assert bool(census.problems) == gaps
    for row in facts(folder, "--topology", text)["ranks"]:
        for rank in row["ranks"]:
            plan = plan_of_rank(headers, arch, topology, rank)
            assert (row["bytes_read"], row["bytes_held"]) == (plan.bytes_read, plan.bytes_held)
            stage = Stage.of(arch, topology, rank_share(arch, topology, rank))
            assert census.load_of(stage).tensors == row["tensors"]


def test_a_rank_without_a_block_reads_no_expert(tmp_path: Path) -> None:
    folder = write(tmp_path, SMALL, announced(SMALL))
    full, empty = facts(folder, "--tp", 16)["ranks"]
    assert (len(full["ranks"]), empty["expert_rows"]) == (12, 0)
    experts = 2 * 8 * 3 * 1536 * 3072
    assert empty["bytes_read"] < full["bytes_read"] - experts // 3


# --- formats ---


def test_plain_weights() -> None:
    status, text, _ = run(TINY_M2, "--tp", 2)
    assert status == 0
    lines = lines_of(text)
    assert "format BF16, FP16 or FP32 says config.json, and the tensors agree" in lines
    assert "experts w1 weight BF16 384x128 32 3.15 MB" in lines
    assert lines[-1] == "The checkpoint loads with tp=2."


def test_fp8_in_the_table(tmp_path: Path) -> None:
    _, text, _ = run(write(tmp_path, SMALL, announced(SMALL)))
    lines = lines_of(text)
    assert "w2 weight_scale_inv F32 24x12 16 18.43 kB" in lines
    assert "router gate F32 8x3072 2 196.61 kB" in lines


def test_config_and_files_that_disagree(tmp_path: Path) -> None:
    plain = {key: value for key, value in SMALL.items() if key != "quantization_config"}
    folder = write(tmp_path, plain, announced(SMALL))
    found = facts(folder)
    assert found["format"]["agrees"] is False
    assert found["problems"]["invalid"]["count"] == 2 * (4 + 8 * 3)
    assert "contradictory" in found["problems"]
    assert "but the tensors DISAGREE" in run(folder)[1]


def test_what_is_left_out_and_what_is_unknown(tmp_path: Path) -> None:
    more: Tensors = {
        "model.layers.0.self_attn.k_scale": ("F32", ()),
        "model.layers.2.mtp_anything.weight": ("BF16", (3072,)),
        "somebody.elses.weight": ("BF16", (8,)),
    }
    found = facts(write(tmp_path, SMALL, announced(SMALL) | more))
    left_out = {each["reason"]: each["tensors"] for each in found["left_out"]}
    assert left_out["multi-token prediction layer"] == 1
    assert sum(left_out.values()) == 2
    assert found["unknown"] == {"tensors": 1, "bytes": 16}
    assert found["problems"]["unexpected"]["first"] == ["somebody.elses.weight"]


# --- problems ---

WEIGHT = "model.layers.1.block_sparse_moe.experts.7.w2.weight"


def _without(tensors: Tensors) -> tuple[Tensors, ...]:
    del tensors[WEIGHT]
    return (tensors,)


def _twice(tensors: Tensors) -> tuple[Tensors, ...]:
    return tensors, {WEIGHT: tensors[WEIGHT]}


def _misshapen(tensors: Tensors) -> tuple[Tensors, ...]:
    tensors[WEIGHT] = ("F8_E4M3", (3072, 1024))
    return (tensors,)


def _quantised_router(tensors: Tensors) -> tuple[Tensors, ...]:
    tensors["model.layers.0.block_sparse_moe.gate.weight_scale_inv"] = ("F32", (1, 24))
    return (tensors,)


@pytest.mark.parametrize(
    ("change", "group", "line"),
    [
        (_without, "missing", WEIGHT),
        (_twice, "duplicate", f"{WEIGHT} (in model-0.safetensors and in model-1.safetensors)"),
        (_misshapen, "misshapen", f"{WEIGHT} is [3072, 1024], expected [3072, 1536]"),
        (_quantised_router, "quantised", "gate.weight_scale_inv (the router is kept in full"),
    ],
)
def test_a_problem_is_named_once_on_any_number_of_ranks(
    tmp_path: Path, change: Callable[[Tensors], tuple[Tensors, ...]], group: str, line: str
) -> None:
    folder = write(tmp_path, SMALL, *change(announced(SMALL)))
    for sizes in ("tp=1", "tp=4,pp=2"):
        status, text, _ = run(folder, "--topology", sizes)
        assert status == 1
        assert sum(line in each for each in text.splitlines()) == 1
        assert text.splitlines()[-1].startswith("The checkpoint does not load: its tensors do not")
        found = facts(folder, "--topology", sizes)
        assert found["problems"][group]["count"] == 1
        assert line in found["problems"][group]["first"][0]


def test_many_problems_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    tensors = {name: t for name, t in announced(SMALL).items() if ".w1." not in name}
    folder = write(tmp_path, SMALL, tensors)
    missing = facts(folder)["problems"]["missing"]
    assert (missing["count"], len(missing["first"])) == (32, 10)
    assert "missing: ... and 22 more" in run(folder)[1]


def test_a_topology_that_does_not_fit_leaves_the_rest_readable() -> None:
    status, text, _ = run(TINY_M2, "--tp", 3)
    assert status == 1
    assert "tp=3 does not fit:" in text
    assert "--tp-size 3" in text
    assert lines_of(text)[-1] == "The checkpoint does not load: it does not fit tp=3, see above."
    assert "tp=4 yes 2.82 MB -" in lines_of(text)
    found = facts(TINY_M2, "--tp", 3)
    assert (found["ranks"], found["loads"]) == ([], False)
    assert found["refusals"]


# --- arguments and files that cannot be judged ---


def _pickles(folder: Path) -> None:
    (folder / "model-0.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def _truncated(folder: Path) -> None:
    with (folder / "model-0.safetensors").open("r+b") as stream:
        stream.truncate(100_000)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
            "model_type is 'llama'",
        ),
        (_pickles, "pytorch_model.bin, a pickle"),
        (
            lambda folder: (folder / "model-0.safetensors").unlink(),
            "model-0.safetensors is missing",
        ),
        (_truncated, "is incomplete"),
    ],
)
def test_what_cannot_be_judged_is_a_sentence(
    tmp_path: Path, spoil: Callable[[Path], object], sentence: str
) -> None:
    folder = write(tmp_path, SMALL, announced(SMALL))
    spoil(folder)
    _is_refused(folder, sentence)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/no/such/folder", "/no/such/folder does not exist; check the path"),
        (TINY_M2 / "config.json", "is a file; give the folder"),
        ("MiniMaxAI/MiniMax-M2", "`hf download MiniMaxAI/MiniMax-M2 --local-dir MiniMax-M2`"),
    ],
)
def test_a_path_that_is_no_folder(path: object, sentence: str) -> None:
    _is_refused(path, sentence)


def _is_refused(path: object, sentence: str) -> None:
    status, out, err = run(path)
    assert (status, out) == (1, "")
    assert err.startswith("sglang-minimax: ")
    assert sentence in err
    assert err.count("\n") == 1
    found = facts(path)
    assert found.keys() == {"loads", "error"}
    assert sentence in found["error"]


def test_usage_errors() -> None:
    assert run()[0] == 2
    assert run(TINY_M2, "--tp", "many")[0] == 2
    assert run(TINY_M2, "--tp", 2, "--topology", "tp=2")[0] == 2
    status, _, err = run(TINY_M2, "--topology", "tp2")
    assert status == 1
    assert "is not understood" in err


# --- JSON, and what is imported ---


def test_the_keys_are_those_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs/inspect.md").read_text()
    found = facts(TINY_M2)
    keys = set(found)
    for part in ("checkpoint", "model", "format", "unknown", "topology"):
        keys |= set(found[part])
    for rows in ("kinds", "ranks", "overview"):
        keys |= set(found[rows][0])
    absent = {key for key in keys if f"`{key}`" not in page}
    assert not absent


def test_neither_torch_nor_sglang_is_imported() -> None:
    code = (
        "import sys; from sglang_minimax.cli.main import app\n"
        f"try: app(['inspect', {str(TINY_M2)!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'sglang', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
