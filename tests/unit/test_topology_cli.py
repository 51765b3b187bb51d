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
    assert "9 1 1 6-11 768-1535 1 128-255 9 144-159 25008-50015 112536-125039" in lines
    rows = [line for line in lines if line[:1].isdigit()]
    assert [line.split()[0] for line in rows] == [str(rank) for rank in range(16)]


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
    assert len([line for line in text.splitlines() if line.strip()[:1].isdigit()]) == 72


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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
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
