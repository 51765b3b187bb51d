"""`sglang-minimax topology`: what it prints, how it refuses, and that it does so without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sglang_minimax import TINY_M2
from sglang_minimax.cli.main import app
from sglang_minimax.cli.topology import architecture
from sglang_minimax.topology import Topology, parameter_count, rank_shares

PUBLISHED = Path(__file__).parents[1] / "data/published_config.json"


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["topology", *arguments], env={"COLUMNS": "80"})
    return result.exit_code, result.stdout, result.stderr


def as_json(*arguments: str) -> dict[str, Any]:
    status, text, _ = run("--config", str(PUBLISHED), *arguments, "--json")
    assert status == 0
    return json.loads(text)


def test_the_table_of_the_issue() -> None:
    status, text, _ = run("--config", str(PUBLISHED), "--tp", "16", "--dp", "2", "--ep", "16")
    assert status == 0
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "mean of q squares sum over 8 ranks / 6144 (48 heads x 128)" in lines
    assert "mean of k squares sum over 8 ranks / 1024 (1 replica x 8 heads x 128)" in lines
    assert "KV cache a token 31,744 B a rank in BF16" in lines
    assert "attention-TP 2 8 0-7, 8-15" in lines
    assert "attention-DP 8 2 0+8, 1+9, 2+10, 3+11, ..." in lines
    assert "9 1 1 6-11 768-1535 1 128-255 9 144-159 25008-50015" in lines
    assert "9 112536-125039" in lines
    rows = [line for line in lines if line and line.split()[0].isdigit()]
    assert [line.split()[0] for line in rows] == 2 * [str(rank) for rank in range(16)]


def test_replicas_and_stages_show() -> None:
    _, text, _ = run("--tp", "16", "--ep", "16", "--pp", "2", "--nodes", "4")
    assert "each KV head on 2 of these ranks" in text
    assert "/ 2048 (2 replicas x 8 heads x 128)" in text
    assert "4 nodes of 8" in text


def test_dealt_blocks_show() -> None:
    status, text, _ = run("--tp", "8")
    assert status == 0
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any("MoE-TP 8 = TP 8 / EP 1" in line and "256 of 1536 rows" in line for line in lines)
    rows = [line for line in lines if line[:1].isdigit()]
    assert "768-1023" in rows[3]  # two blocks
    assert "1024-1151" in rows[4]  # one


def test_no_column_is_cut_on_a_narrow_terminal() -> None:
    _, text, _ = run("--tp", "72", "--dp", "9", "--ep", "72", "--redundant-experts", "32")
    assert "…" not in text
    rows = [line for line in text.splitlines() if line.strip()[:1].isdigit()]
    # Columns for which a line has no room come in a second table.
    assert len(rows) == 2 * 72
    assert "rank  head rows" in text


def test_one_rank_needs_no_table_of_ranks() -> None:
    status, text, _ = run()
    assert status == 0
    assert "layers 0-61" in text
    assert not any(line.startswith("0 ") for line in map(str.strip, text.splitlines()))


def test_json_says_what_topology_says() -> None:
    found = as_json("--tp", "16", "--ep", "16", "--pp", "2", "--nodes", "2")
    arch, topology = architecture(PUBLISHED), Topology(tp=16, ep=16, pp=2, nodes=2)
    assert found["topology"] == {
        **dict(zip(("tp", "dp", "ep", "pp", "nodes"), (16, 1, 16, 2, 2), strict=True)),
        "world_size": 32,
        "attention_tp": 16,
        "moe_tp": 1,
        "redundant_experts": 0,
        "dp_lm_head": False,
    }
    assert found["kv_replicas"] == 2
    assert found["variance_divisors"] == {"q": 6144, "k": 2048}
    for row, share in zip(found["ranks"], rank_shares(arch, topology), strict=True):
        attention = share.attention
        assert row["rank"] == share.rank
        assert row["kv_rows"] == [attention.kv_rows.start, attention.kv_rows.stop]
        assert row["experts"] == [share.experts.start, share.experts.stop]
        assert row["weights"] == parameter_count(arch, share)
        assert (row["embedding_rows"] is None) == (share.pp_rank == 1)
        for kind, group in share.groups.items():
            assert list(group) in found["groups"][kind]


def test_the_head_follows_its_option() -> None:
    sizes = ("--tp", "8", "--dp", "4", "--ep", "8")
    assert as_json(*sizes)["vocabulary_rows_in_memory"] == {"embedding": 100032, "head": 25008}
    narrow = as_json(*sizes, "--dp-lm-head")
    assert narrow["vocabulary_rows_in_memory"] == {"embedding": 100032, "head": 100032}
    assert narrow["ranks"][5]["head_rows"] == narrow["ranks"][1]["head_rows"] == [100032, 200064]


def test_sglangs_option_names_are_understood() -> None:
    long = ("--tp-size", "8", "--attn-dp-size", "2", "--ep-size", "8", "--pp-size", "2")
    short = ("--tp", "8", "--dp", "2", "--ep", "8", "--pp", "2")
    assert as_json(*long, "--nnodes", "2") == as_json(*short, "--nodes", "2")


def test_without_a_config_the_shape_is_the_published_one() -> None:
    assert run("--tp", "8", "--ep", "8") == run(
        "--config", str(PUBLISHED), "--tp", "8", "--ep", "8"
    )


def test_a_checkpoint_folder() -> None:
    status, text, _ = run("--config", str(TINY_M2), "--tp", "2")
    assert status == 0
    assert "0-255" in text


def plan_of(*arguments: str) -> tuple[str, str, str]:
    found = as_json(*arguments)["exchange"]
    return found["path"], found["runner"], found["combine"]


def test_the_plan_is_that_of_the_published_checkpoint_on_hopper() -> None:
    assert plan_of("--tp", "8", "--ep", "8")[0] == "sglang"
    assert plan_of("--tp", "8", "--dp", "8") == ("gather-fp8", "triton", "reduce-scatter")


def test_the_plan_follows_what_is_asked() -> None:
    sizes = ("--tp", "8", "--dp", "4", "--ep", "8")
    assert plan_of(*sizes, "--hardware", "rocm")[0] == "sglang"
    assert plan_of(*sizes, "--hardware", "cpu")[:2] == ("gather-fp8", "torch")
    assert plan_of(*sizes, "--moe-exchange", "gather")[0] == "gather"
    assert plan_of(*sizes, "--moe-runner-backend", "deep_gemm")[:2] == ("gather", "deep_gemm")
    assert plan_of("--tp", "8", "--moe-a2a-backend", "deepep")[0] == "deepep"
    fused = "all-reduce fused with residual add and norm"
    assert plan_of("--tp", "8", "--nodes", "2", "--capability", "10.0")[2] == fused
    assert plan_of("--tp", "8", "--nodes", "2", "--capability", "9.0")[2] == "all-reduce"


def test_the_variable_asks_for_a_path_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_MINIMAX_MOE", "gather")
    assert plan_of("--tp", "8", "--dp", "8")[0] == "gather"


def test_moves_of_a_layer_beside_those_of_sglang() -> None:
    found = as_json("--tp", "8", "--dp", "8", "--ep", "8")["exchange"]
    decode, theirs = found["layer"]["decode"], found["sglang"]["layer"]["decode"]
    assert decode["rows"] == [32] * 8
    assert [(move["operation"], move["group"]) for move in decode["moves"]] == [
        ("all_gather_into_tensor", "tp"),
        ("reduce_scatter_tensor", "tp"),
    ]
    # 3072 codes, 24 scales, 8 ids and weights; and 2 bytes for each of 3072 outputs of 256 rows.
    assert [move["given"] for move in decode["moves"]] == [32 * 3232, 256 * 6144]
    assert [move["given"] for move in theirs["moves"]] == [32 * 6144, 256 * 6144]
    assert decode["received_a_token"] == (3232 + 6144) * 7 / 8
    assert theirs["received_a_token"] == 2 * 6144 * 7 / 8
    prefill = found["layer"]["prefill"]
    assert prefill["padding"] == "SUM_LEN"
    assert len(set(prefill["rows"])) == 2
    assert [move["operation"] for move in prefill["moves"]] == ["all_gatherv", "reduce_scatterv"]


def test_the_moves_of_kernels_are_not_made_up() -> None:
    sizes = ("--tp", "8", "--dp", "8", "--moe-a2a-backend", "deepep")
    assert as_json(*sizes)["exchange"]["layer"]["decode"]["received_a_token"] is None
    assert "not counted" in run(*sizes)[1]


def test_the_plan_shows_with_its_reasons_and_price() -> None:
    _, text, _ = run("--tp", "8", "--dp", "8", "--ep", "8")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any(line.startswith("path to the experts gather-fp8: the fewest") for line in lines)
    assert any(line.startswith("note SGLang captures no CUDA graphs of prefill") for line in lines)
    assert "note gather-fp8 has not been measured on GPUs for MiniMax-M2;" in lines
    assert "SGLANG_MINIMAX_MOE=sglang goes back to SGLang's own way." in lines
    assert "gather-fp8 collective of a layer group B given type what" in lines
    gather = "decode all_gather_into_tensor TP 103,424 e4m3 all ranks' rows, ids, weights"
    assert gather in lines
    assert "gather-fp8 decode 32+32+32+32+... 8,204" in lines
    assert "sglang prefill 1024+2048+2048+2048+... 16,128" in lines


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--tp 8",
        "--tp 16 --nodes 2",
        "--tp 8 --dp 4 --ep 8",
        "--tp 16 --dp 16 --ep 16 --nodes 2",
        "--tp 8 --moe-a2a-backend deepep",
        "--tp 4 --dp 2 --ep 4 --hardware cpu --moe-exchange all-to-all-fp8",
        "--tp 72 --dp 9 --ep 72 --redundant-experts 32",
    ],
)
def test_lines_fit_in_a_hundred_columns(arguments: str) -> None:
    status, text, _ = run(*arguments.split())
    assert status == 0
    assert [line for line in text.splitlines() if len(line.rstrip()) > 100] == []


def test_memory_that_padding_costs_shows() -> None:
    assert "+33.3 % expert memory" in " ".join(run("--tp", "8")[1].split())
    assert "expert memory" not in run("--tp", "8", "--ep", "8")[1]
    assert "+33.3 % expert memory" in as_json("--tp", "8")["notes"][0]


def test_a_capability_is_written_with_its_point() -> None:
    status, _, err = run("--tp", "8", "--capability", "90")
    assert status == 2
    assert "9.0" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("--tp", "8", "--quantization", "awq"),
            "for other checkpoints than one in FP8 in 128x128",
        ),
        (("--tp", "8", "--moe-a2a-backend", "deepep2"), "SGLang has no --moe-a2a-backend deepep2;"),
        (("--tp", "8", "--moe-exchange", "gather-fp4"), "use SGLANG_MINIMAX_MOE=gather"),
        (("--tp", "8", "--moe-exchange", "everything"), "names no path"),
        (("--tp", "8", "--moe-runner-backend", "flashinfer_cutlass"), "which means triton here."),
        (("--tp", "8", "--hardware", "cpu", "--moe-a2a-backend", "deepep"), "needs a GPU"),
        (("--tp", "8", "--capability", "8.0"), "compute capability 8.0"),
        (("--tp", "12"), "use --attn-dp-size 3, or --tp-size 8 or 16."),
        (("--tp", "16", "--ep", "16", "--nodes", "3"), "use --nnodes 2 or 4."),
        (("--tp", "0"), "use --tp-size 1 or more."),
        (("--config", "nowhere"), "nowhere cannot be read (No such file or directory); give"),
    ],
)
def test_a_refusal_is_a_sentence_on_stderr(arguments: tuple[str, ...], sentence: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith("sglang-minimax: ")
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("content", "said"), [("{", "not JSON"), ("[]", "not a JSON object")])
def test_a_broken_config(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "config.json").write_text(content)
    status, _, err = run("--config", str(tmp_path))
    assert status == 1
    assert said in err


def test_neither_torch_nor_sglang_is_imported() -> None:
    code = (
        "import sys; from sglang_minimax.cli.main import app\n"
        "try: app(['topology', '--tp', '16', '--ep', '16'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'sglang', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
