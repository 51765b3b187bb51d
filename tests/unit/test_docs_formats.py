"""docs/formats.md and docs/loading.md against the code: tables, refusals, figures, the example."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from sglang_minimax.errors import ConfigError
from sglang_minimax.loading import names
from sglang_minimax.loading.formats import READERS, quantisation_config, recipe_of
from sglang_minimax.loading.formats.base import PLAIN
from sglang_minimax.loading.formats.table import EXAMPLES, HEADER, markdown, rendered, shown
from sglang_minimax.loading.ledger import NO_KV_QUANTISATION
from sglang_minimax.loading.reader import ALIGN, GAP, Reader, Span
from sglang_minimax.topology import expert_cut
from tests.formats.base import Fixture, write

ROOT = Path(__file__).parents[2]
FORMATS = (ROOT / "docs/formats.md").read_text()
LOADING = (ROOT / "docs/loading.md").read_text()
PUBLISHED = json.loads((ROOT / "tests/data/published_config.json").read_text())

#: Module of tests/formats -> what writes its fixtures, by which layout.
MADE_BY = {
    "fp8": "PyTorch, by the published index, AutoFP8's and ModelOpt's exports",
    "compressed_tensors": "the compressed-tensors library",
    "awq": "PyTorch, by AutoAWQ's `WQLinear_GEMM`",
    "gptq": "PyTorch, by AutoGPTQ's and GPTQModel's `QuantLinear.pack`",
    "nvfp4": "PyTorch, by ModelOpt's unified export",
    "mxfp4": "PyTorch, by Quark's export and OCP Microscaling 1.0",
    "modelslim": "PyTorch, by msmodelslim's export",
}
INPUTS = {
    None: "as they are",
    "group-64": "FP8, a scale for each token and block of columns",
    "token-fp8": "FP8, a scale for each token",
    "tensor-fp8": "FP8; attention a scale for each token, experts one for the batch",
    "static-fp8": "FP8, the checkpoint's scale",
    "token-int8": "INT8, a scale for each token",
    "static-int8": "INT8, the checkpoint's scale and offset",
    "group-nvfp4": "FP4, a scale for each token and 16 columns under the checkpoint's",
    "group-mxfp4": "as they are; MI350 rounds them to 4 bits",
}


def between(text: str, mark: str) -> str:
    found = re.search(rf"<!-- {mark} -->\n(.*?)\n<!-- /{mark} -->", text, re.DOTALL)
    assert found, f"no <!-- {mark} -->"
    return found[1]


# --- the tables of formats.md -----------------------------------------------------------------


def test_the_table_is_the_code() -> None:
    assert between(FORMATS, "formats") == rendered(), (
        "run `python -m sglang_minimax.loading.formats.table`"
    )


def test_every_reader_has_a_row() -> None:
    for read in READERS:
        assert any(example.config and read(example.config) for example in EXAMPLES), read


def test_a_change_of_a_format_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    before = rendered()
    # As if two columns were packed in a word of AWQ.
    monkeypatch.setattr("sglang_minimax.loading.formats.awq.PER_WORD", 2)
    assert rendered() != before


def hollow(module: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Fixture]:
    """The fixtures of a module; but for ModelSlim, whose config names them, one matrix each."""
    made = importlib.import_module(f"tests.formats.{module}")
    if module != "modelslim":
        one = ["model.layers.0.self_attn.q_proj"]
        monkeypatch.setattr(made, "quantised_modules", lambda: one)
    return {name: make() for name, make in made.FIXTURES.items()}


def row_of(fixture: Fixture, folder: Path) -> int:
    """The index of the example that a fixture belongs to; its blocks and groups are smaller."""
    said: dict[str, Any] = dict(quantisation_config(folder, fixture.config) or {})
    recipe = recipe_of(said)
    form = recipe.format_of("model.layers.0.self_attn.q_proj")
    if form is PLAIN:
        form = recipe.format_of("model.layers.0.block_sparse_moe.experts")
    title = form.title.replace("64", "128")
    (found,) = (
        i
        for i, example in enumerate(EXAMPLES)
        if (own := recipe_of(example.config)).method == recipe.method
        and shown(own, example).title == title
    )
    return found


def test_the_fixtures_are_those_of_the_tests(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows: dict[int, tuple[list[str], str, str]] = {}
    for module, maker in MADE_BY.items():
        for name, fixture in hollow(module, monkeypatch).items():
            index = row_of(fixture, write(fixture, tmp_path / name))
            inputs = INPUTS[fixture.activations]
            named, *same = rows.setdefault(index, ([], inputs, maker))
            named.append(f"`{name}`")
            assert same == [inputs, maker], name
    header = (*HEADER[:2], "inputs on the CPU platform", "fixtures", "made by")
    assert set(rows) == set(range(1, len(EXAMPLES)))  # the first is not quantised
    cells = []
    for index, (named, inputs, maker) in sorted(rows.items()):
        example = EXAMPLES[index]
        title = shown(recipe_of(example.config), example).title
        cells.append((title, example.keys, inputs, ", ".join(named), maker))
    expected = markdown(header, cells)
    assert between(FORMATS, "fixtures") == expected, expected


# --- refusals ---------------------------------------------------------------------------------


def test_a_config_that_nobody_knows() -> None:
    with pytest.raises(ConfigError) as error:
        recipe_of({"quant_method": "bitsandbytes"})
    assert str(error.value) in " ".join(FORMATS.replace("\n> ", " ").split())


def test_what_is_refused_is_said_in_the_code() -> None:
    """Every sentence that formats.md quotes begins as one of the modules' does."""
    # Adjacent strings of the source are one sentence, and what it fills in may be anything.
    folder = ROOT / "sglang_minimax/loading/formats"
    source = " ".join(file.read_text() for file in sorted(folder.glob("*.py")))
    joined = re.sub(r"[\"']\s*f?[\"']", "", source)
    quoted = re.findall(r"^- \"(.+?)\"", FORMATS, re.MULTILINE | re.DOTALL)
    assert len(quoted) > 20
    for sentence in quoted:
        parts = [part.strip() for part in re.split(r"\.\.\.", " ".join(sentence.split()))]
        for part in filter(None, parts):
            assert part in joined, part


# --- loading.md -------------------------------------------------------------------------------


def _full(spelling: str) -> str:
    """The page leaves out the layer."""
    whole = spelling.startswith(("model.", "language_model.", "lm_head"))
    return spelling if whole else f"model.layers.0.{spelling}"


def test_the_names_of_the_table_mean_what_it_says() -> None:
    rows = [line.split("|")[1:-1] for line in between(LOADING, "names").splitlines()[2:]]
    assert len(rows) > 8
    for meaning, spellings, *_ in rows:
        found = {names.parse(_full(each)) for each in re.findall(r"`([^`]+)`", spellings)}
        assert len(found) == 1, spellings
        assert found != {None}, spellings
        module = meaning.strip().strip("`")
        assert next(iter(found)).module == module, spellings


def test_the_omissions_of_the_table_are_those_of_the_code() -> None:
    text = between(LOADING, "omissions")
    reasons = [entry.reason for entry in names.OMISSIONS]
    ours = [
        *("the head is tied to the embedding", "attention scales that SGLang has no use for"),
        *(NO_KV_QUANTISATION, "not needed by the kernels of this device"),
    ]
    said = [line.split("|")[1].strip() for line in text.splitlines()[2:]]
    assert said == [*reasons, *ours]
    ledger = (ROOT / "sglang_minimax/loading/ledger.py").read_text()
    assert all(f'"{reason}"' in ledger for reason in ours)


def test_the_dealt_blocks_of_the_table() -> None:
    expected = []
    for ranks in (1, 2, 4, 8, 16):
        cuts = [expert_cut(1536, ranks, rank, 128) for rank in range(ranks)]
        blocks = [len(cut.lines) // 128 for cut in cuts]
        runs = [f"{blocks.count(n)} x {n}" for n in sorted(set(blocks), reverse=True)]
        more = 100 * (cuts[0].over - 1536) / 1536
        percent = f"+{more:.1f} %" if more else "none"
        expected.append((f"TP{ranks}", ", ".join(runs), str(cuts[0].width), percent))
    header = ("ranks that share an expert", "ranks x blocks", "rows in memory", "padding")
    assert between(LOADING, "dealt") == markdown(header, expected)


def test_the_memory_of_the_reader_is_what_the_page_says() -> None:
    spans = [Span(Path("a"), i << 24, (16 << 20) - ALIGN) for i in range(100)]
    assert f"{Reader(spans).host_bytes_bound >> 20} MiB" in LOADING
    assert Reader(spans).host_bytes_bound == 10 * (16 << 20)
    assert f"{GAP} bytes" in LOADING


def test_the_example_runs(tmp_path: Path) -> None:
    """The page's own lines, with the published headers in front of holes."""
    code = re.search(r"```python\n(.*?)```", LOADING, re.DOTALL)
    assert code
    output = re.search(r"```\n([\d,]+ reads.*?)```", LOADING, re.DOTALL)
    assert output
    from tests.unit.test_inspect import announced
    from tests.unit.test_inspect import write as write_checkpoint

    tensors = list(announced(PUBLISHED).items())
    half = len(tensors) // 2
    folder = write_checkpoint(
        tmp_path / "M2", PUBLISHED, dict(tensors[:half]), dict(tensors[half:])
    )
    if sum(file.stat().st_blocks * 512 for file in folder.iterdir()) > 2**30:
        pytest.skip("this file system stores holes")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code[1].replace("/models/MiniMax-M2", str(folder)), found := {})
    assert printed.getvalue() == output[1]
    reads = found["plan"].reads
    reader = Reader([Span(read.tensor.file, read.offset, read.length) for read in reads])
    assert f"it is {reader.host_bytes_bound >> 20} MiB in all" in LOADING
