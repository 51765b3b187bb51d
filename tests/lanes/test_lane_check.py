"""`check`: SGLang's own answers for pretended devices, the plan, and the arithmetic of memory.

SGLang is asked once for everything, planted mistakes included; observed 25 s.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ci.lane import CONFIGS
from ci.lane.check import Finding, ask, case_of, check, finding
from ci.lane.files import find, names
from ci.lane.memory import census_of, fit
from ci.lane.pretend import Answer
from ci.lane.schema import Lane
from sglang_minimax.legality import Sizes

#: One of each hardware and format, in `make test`; the others are alike.
SOME = (
    *("b200-4x-m27-nvfp4", "h200-8x-m27-fp8", "mi30x-8x-m27-fp8", "mi35x-8x-m27-fp8"),
    "npu-16x-m27-bf16",
)
M27, NVFP4 = CONFIGS / "MiniMax-M2.7", CONFIGS / "MiniMax-M2.7-NVFP4"

#: Options of TP8 on 8 H200 with one mistake, and what is said of it.
PLANTED: Mapping[str, tuple[dict[str, Any], str]] = {
    "old name": ({"tp-size": 8, "dp-size": 8, "enable-dp-attention": True}, "is deprecated"),
    "alias": ({"tensor-parallel-size": 8}, "is another name of --tp-size"),
    "replicas": ({"tp-size": 8, "dp-size": 2}, "16 ranks"),
    "unknown option": ({"tp-size": 8, "expert-size": 8}, "unrecognized arguments: --expert-size 8"),
    "no number": ({"tp-size": "eight"}, "invalid int value: 'eight'"),
    "too few ranks": ({"tp-size": 4}, "the launch has 4 ranks"),
    "illegal TP": ({"tp-size": 5}, "--tp-size 5"),
    "illegal EP": ({"tp-size": 8, "ep-size": 3}, "--ep-size 3"),
    "other hardware": ({"tp-size": 8, "moe-a2a-backend": "ascend_fuseep"}, "ascend"),
    "softmax runner": ({"tp-size": 8, "moe-runner-backend": "triton_kernel"}, "by a softmax"),
}


def planted(options: dict[str, Any]) -> Lane:
    lane = find("h200-8x-m27-fp8")
    variant = lane.variants["tp8"].model_copy(update={"options": options})
    return lane.model_copy(update={"variants": {"tp8": variant}})


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    """Of SOME by `lane variant`, and of PLANTED by name."""
    named = {f"{name} {v}": (find(name), v) for name in SOME for v in find(name).variants}
    named |= {name: (planted(options), "tp8") for name, (options, _) in PLANTED.items()}
    answers = ask([case_of(lane, variant) for lane, variant in named.values()])
    return {
        name: finding(lane, variant, answer)
        for (name, (lane, variant)), answer in zip(named.items(), answers, strict=True)
    }


def resolved(findings: dict[str, Finding], name: str) -> dict[str, Any]:
    found = findings[name]
    assert found.problems == []
    return found.answer.resolved


def test_sglang_answers_as_on_that_hardware(findings: dict[str, Finding]) -> None:
    """The attention and expert kernels are those that SGLang 0.5.23 documents for each."""
    hopper = resolved(findings, "h200-8x-m27-fp8 tp8")
    blackwell = resolved(findings, "b200-4x-m27-nvfp4 tp4")
    amd = resolved(findings, "mi30x-8x-m27-fp8 tp8-ep8")
    assert (hopper["device"], hopper["attention_backend"]) == ("cuda", "fa3")
    assert blackwell["attention_backend"] == "trtllm_mha"
    assert blackwell["moe_runner_backend"] == "flashinfer_trtllm_routed"
    assert amd["attention_backend"] == "aiter"
    assert amd["watchdog_timeout"] == 1200
    assert hopper["mem_fraction_static"] == blackwell["mem_fraction_static"] == 0.85
    # Of 141 GB and of 180 GB (arg_groups/memory_hook.py).
    assert hopper["chunked_prefill_size"] == 8192
    assert blackwell["chunked_prefill_size"] == 16384


def test_the_plugin_plans_for_that_hardware(findings: dict[str, Finding]) -> None:
    dp = findings["h200-8x-m27-fp8 dp8-ep8"]
    assert dp.answer.resolved["attn_dp_size"] == 8
    assert dp.answer.launch["capability"] == 90
    assert dp.exchange == "gather-fp8, experts by triton"
    assert dp.fit is not None
    assert dp.fit.asked == 256 // 8 * 8192
    (changed,) = findings["mi30x-8x-m27-fp8 tp8-ep8"].notes
    assert changed.startswith("SGLang makes 0.7225 of --mem-fraction-static 0.85")
    (note,) = findings["h200-8x-m27-fp8 tp8"].notes
    assert "+33.3 % expert memory" in note


def test_both_generations_of_amd_are_told_apart(findings: dict[str, Finding]) -> None:
    """CDNA3 is gfx942, CDNA4 gfx950 (SGLang asks by that name)."""
    old, new = (case_of(find(f"mi3{n}x-8x-m27-fp8"), "tp8-ep8") for n in "05")
    assert (old.capability, old.gfx) == (94, "gfx942")
    assert (new.capability, new.gfx) == (95, "gfx950")
    assert resolved(findings, "mi35x-8x-m27-fp8 tp8-ep8")["attention_backend"] == "aiter"


def test_what_is_not_checked_is_said(findings: dict[str, Finding]) -> None:
    for name, found in findings.items():
        assert found.unchecked or not found.answer.parsed, name
    npu = findings["npu-16x-m27-bf16 tp16-ep16"]
    assert npu.answer.resolved == {}
    assert "only parsed" in npu.unchecked[0]
    assert "GPU generation" in findings["h200-8x-m27-fp8 tp8"].unchecked[0]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found(name: str, findings: dict[str, Finding]) -> None:
    said = findings[name].problems
    assert any(PLANTED[name][1] in sentence for sentence in said), said
    assert all("\n" not in sentence for sentence in said)


@pytest.mark.slow
def test_every_lane_would_start() -> None:
    found = check([find(name) for name in names()])
    assert {f"{each.lane} {each.variant}": each.problems for each in found if each.problems} == {}
    assert len(found) >= 18


# --- memory ---


def bytes_by_type(folder: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for kind, count in census_of(folder).kinds.items():
        found[kind.type] = found.get(kind.type, 0) + count.nbytes
    return found


def test_the_tensors_are_those_of_the_published_fp8_checkpoint() -> None:
    """96,103 tensors and 230,121,630,720 bytes, as its index says."""
    kinds = census_of(M27).kinds.values()
    assert sum(kind.tensors for kind in kinds) == 96103
    assert sum(kind.nbytes for kind in kinds) == 230_121_630_720


def test_the_tensors_are_those_of_the_published_nvfp4_checkpoint() -> None:
    """Elements of nvidia/MiniMax-M2.5-NVFP4 by the hub: U8 112,340,238,336, F8_E4M3 14,042,529,792.

    It stores attention in fp32, 2,730,491,904 elements with the router and scales; SGLang holds
    attention in the model's own type.
    """
    found = bytes_by_type(NVFP4)
    assert found["U8"] == 112_340_238_336
    assert found["F8_E4M3"] == 14_042_529_792
    attention = 62 * 128 * 3072 * (2 * 48 + 2 * 8)
    assert attention <= 2_730_491_904 <= attention * 1.02
    vocabulary = 2 * 200064 * 3072
    assert found["BF16"] == pytest.approx(2 * (attention + vocabulary), rel=1e-3)


def judged(memory: float, sizes: Sizes, **more: Any) -> str | None:
    asked = {"fraction": 0.85, "kv_dtype": "auto", "requests": 64, "context": 8192}
    return fit(M27, sizes, memory=int(memory * 1e9), **{**asked, **more}).complaint


@pytest.mark.parametrize(
    ("memory", "sizes", "more", "words"),
    [
        (80, Sizes(tp=2), {}, "115.2 GB of weights a rank do not fit 0.85 of 80 GB"),
        (80, Sizes(tp=4), {}, "fit beside 57.7 GB of weights, and the lane asks for 524,288"),
        (80, Sizes(tp=4), {"kv_dtype": "fp8_e4m3"}, "the lane asks for 524,288"),
        (80, Sizes(tp=4), {"requests": 16}, None),
        (141, Sizes(tp=4), {}, None),
        (141, Sizes(tp=8, ep=8), {"requests": 350}, "the lane asks for 2,867,200"),
        (141, Sizes(tp=8, ep=8), {"requests": 349}, None),
    ],
)
def test_what_does_not_fit_is_said_with_both_numbers(
    memory: float, sizes: Sizes, more: dict[str, Any], words: str | None
) -> None:
    said = judged(memory, sizes, **more)
    assert (said is None) if words is None else (words in (said or ""))


def test_a_cache_is_spread_over_attention_tp_alone() -> None:
    """With attention DP a rank holds every KV head, of its own group's tokens."""
    common: dict[str, Any] = {"memory": 10**12, "fraction": 0.5, "requests": 8, "context": 1000}
    tp = fit(M27, Sizes(tp=8, ep=8), kv_dtype="auto", **common)
    dp = fit(M27, Sizes(tp=8, dp=8, ep=8), kv_dtype="auto", **common)
    assert (tp.kv_token, tp.asked) == (62 * 2 * 1 * 128 * 2, 8000)
    assert (dp.kv_token, dp.asked) == (62 * 2 * 8 * 128 * 2, 1000)
    wide = fit(M27, Sizes(tp=16, ep=16, nodes=2), kv_dtype="fp8_e4m3", **common)
    assert wide.kv_token == 62 * 2 * 1 * 128  # a head cannot be cut, two ranks hold each


def test_an_answer_of_sglang_that_refuses_is_told_once() -> None:
    """Its resolution runs the plugin's checks; saying them again would look like two mistakes."""
    sentence = "sglang-minimax: --tp-size 5 does not fit."
    sizes = {"tp_size": 5, "pp_size": 1, "dp_size": 1, "attn_dp_size": 1, "ep_size": 1}
    found = finding(planted({"tp-size": 5}), "tp8", Answer(True, [], sizes, sentence))
    assert len([each for each in found.problems if "--tp-size 5" in each]) == 1
