"""What the rules of the exchange refuse, propose and say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from sglang_minimax import legality
from sglang_minimax.moe_exchange import report, rules_table
from sglang_minimax.moe_exchange.plan import default_of_sglang, plan_for
from sglang_minimax.support import Launch, refusals
from sglang_minimax.topology import Topology
from tests.unit.moe_launches import CHECKPOINTS, DP2, DP8, EP8, GPUS, TABLE, case

# --- refusals ---

PARTS = (
    (re.compile(r"use SGLANG_MINIMAX_MOE=(\S+)"), "moe_exchange", str),
    (re.compile(r"--moe-runner-backend (\w+)"), "moe_runner_backend", str),
    (re.compile(r"use --ep-size (\d+)"), "ep", int),
    (re.compile(r"start without --moe-a2a-backend \S+()"), "moe_a2a_backend", lambda _: "none"),
    (re.compile(r"start without --enable-lora()"), "enable_lora", lambda _: False),
    (re.compile(r"unset SGLANG_MINIMAX_MOE()"), "moe_exchange", lambda _: None),
)


def remedied(launch: Launch, remedy: str) -> Launch:
    """The launch after what a part of a sentence proposes."""
    changes = {
        field: read(match[1]) for part, field, read in PARTS if (match := part.search(remedy))
    }
    assert changes, remedy
    return replace(launch, **changes)


def test_what_a_refusal_proposes_is_accepted() -> None:
    tried = 0
    lora = case("fp8", "sm90", **DP8, enable_lora=True, moe_exchange="gather-fp8")
    for each in (lora, *TABLE):
        reasons = refusals(each.arch, each.launch)
        ours = [
            reason for reason in reasons if reason.startswith(("SGLANG_MINIMAX_MOE", "--moe-r"))
        ]
        if len(reasons) != 1 or not ours or "names no path" in ours[0]:
            continue
        *_, proposed = ours[0].removesuffix(".").rpartition("; ")
        for remedy in proposed.split(", or "):
            launch = remedied(each.launch, remedy)
            if launch.moe_a2a_backend != "none" and each.gpu in ("cpu", "rocm"):
                continue  # refused for another reason: the backend itself
            if ours[0].startswith("--moe-r"):
                # A path that was asked for as well may not go with the runner that is proposed.
                launch = replace(launch, moe_exchange=None)
            assert refusals(each.arch, launch) == [], (each, ours[0], remedy)
            tried += 1
    assert tried > 1000


def test_an_unknown_path_is_refused_with_the_list() -> None:
    each = case("fp8", "sm90", **EP8, moe_exchange="gather-fp9")
    assert refusals(each.arch, each.launch) == [
        "SGLANG_MINIMAX_MOE=gather-fp9 names no path to the experts; use one of sglang, gather, "
        "gather-fp8, gather-fp4, all-to-all, all-to-all-fp8, or unset it."
    ]


def test_sizes_that_cannot_be_are_said_alone() -> None:
    arch = CHECKPOINTS["fp8"]
    launch = Launch(tp=12, ep=5, moe_exchange="gather-fp9", **GPUS["sm90"])
    assert refusals(arch, launch) == legality.refusals(arch, launch)


# --- what is said of it ---


def test_a_start_up_line_says_path_rows_runner_and_combine_with_reasons() -> None:
    each = case("fp8", "sm90", **DP8, prefill_graphs=True)
    found = report.lines(plan_for(each.arch, each.launch), each.launch)
    line, decode, prefill, unmeasured, price = found
    assert line == (
        "MoE exchange: gather-fp8 (the fewest bytes with attention DP that the experts' kernels "
        "can read): e4m3 with fp32 scales, ids and weights, 3,232 B a row; experts run triton "
        "(SGLang's choice for FP8 in 128x128 blocks); reduce-scatter after them (sums go to the "
        "rows' owners only, padded alike or not)"
    )
    # 7/8 of 3,232 B gathered and of 6,144 B scattered.
    assert decode == (
        "MoE exchange: a layer of a decode: all_gather_into_tensor over tp, reduce_scatter_tensor "
        "over tp; 8,204 B reach a rank for each token"
    )
    assert prefill == decode.replace("decode", "prefill").replace("_into_tensor", "v").replace(
        "_tensor", "v"
    )
    assert unmeasured == (
        "MoE exchange: gather-fp8 has not been measured on GPUs for MiniMax-M2; "
        "SGLANG_MINIMAX_MOE=sglang goes back to SGLang's own way."
    )
    assert price == (
        "MoE exchange: SGLang captures no CUDA graphs of prefill with gather-fp8 "
        "(arg_groups/cuda_graph_hook.py, 'unvalidated a2a backend'); SGLANG_MINIMAX_MOE=sglang "
        "keeps them."
    )


def test_lines_of_every_legal_launch_can_be_made() -> None:
    told = 0
    for each in TABLE:
        if refusals(each.arch, each.launch):
            continue
        lines = report.lines(plan_for(each.arch, each.launch), each.launch)
        told += any("a layer of a decode" in line for line in lines)
    assert told > 100


def test_the_gather_carries_little_more_than_half_of_sglangs() -> None:
    """At DP attention with FP8 experts the gather carries at most 55 % of SGLang's."""
    for sizes in (DP8, {"tp": 8, "dp": 4, "ep": 8}, DP2):
        each = case("fp8", "sm90", **sizes)
        ours, theirs = plan_for(each.arch, each.launch), default_of_sglang(each.arch, each.launch)
        assert report.sent(ours) <= 0.55 * report.sent(theirs)


def test_steps_name_every_move() -> None:
    for each in TABLE[::11]:
        if refusals(each.arch, each.launch):
            continue
        launch, plan = each.launch, plan_for(each.arch, each.launch)
        topology = Topology(launch.tp, launch.dp, launch.ep, launch.pp, launch.nodes)
        for _, batch in report.batches(topology):
            steps = report.steps(plan, topology, batch)
            assert [step.move for step in steps] == plan.layer(topology, batch)
            assert all(step.what and step.dtype for step in steps)


def test_the_tables_of_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs/communication.md").read_text()
    assert rules_table.defaults() in text
    assert rules_table.received() in text


def test_the_refusal_that_the_docs_show() -> None:
    text = (Path(__file__).parents[2] / "docs/communication.md").read_text()
    arguments = {"moe_runner_backend": "deep_gemm", "moe_exchange": "gather-fp8"}
    each = case("fp8", "sm90", **DP8, **arguments)
    assert f"{refusals(each.arch, each.launch)[0]}\n" in text
