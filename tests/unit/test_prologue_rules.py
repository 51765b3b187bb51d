"""What of the prologue is fused and which path runs: rules and agreement, without SGLang."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from jit_kernels.qk_norm_rope import op
from jit_kernels.qk_norm_rope.op import Choice, KernelUnavailable, Request
from sglang_minimax.errors import PathError
from sglang_minimax.layers import path
from sglang_minimax.layers.agreeing import first_problem, group_gather, refusal_of
from sglang_minimax.layers.fusion import (
    ROTATION_RULES,
    STORE_RULES,
    RotationFacts,
    StoreFacts,
    expected_cache_dtype,
    first_reason,
)
from tests.ranks import own_rank, together

ROTATION = RotationFacts(
    module="RotaryEmbedding",
    own_forward=False,
    neox=True,
    native=False,
    head_size=128,
    rotary_dim=64,
    cache_shape=(4096, 64),
    cache_dtype=torch.float32,
    head_dim=128,
    implementation="cuda",
    device="cuda",
)
STORE = StoreFacts(
    pool="MHATokenToKVPool",
    plain=True,
    layout="nhd",
    hnd=False,
    quantised=False,
    dtype=torch.bfloat16,
    compute=torch.bfloat16,
    k_shape=(100, 8, 128),
    v_shape=(100, 8, 128),
    heads=(8, 128),
    backends=("FlashAttentionBackend",),
    scales=(1.0, 1.0),
    rotated=True,
    implementation="cuda",
    device="cuda",
)
FP8 = replace(STORE, dtype=torch.float8_e4m3fn)


def test_the_usual_server_leaves_nothing_to_sglang() -> None:
    assert first_reason(ROTATION_RULES, ROTATION) == ""
    assert first_reason(STORE_RULES, STORE) == ""
    assert first_reason(STORE_RULES, FP8) == ""
    assert first_reason(STORE_RULES, replace(FP8, scales=(0.5, 2.0))) == ""


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_the_cpu_fuses_all(implementation: str) -> None:
    there = {"implementation": implementation, "device": "cpu"}
    assert first_reason(ROTATION_RULES, replace(ROTATION, **there)) == ""
    assert first_reason(STORE_RULES, replace(STORE, **there)) == ""


def test_the_reference_takes_any_table_of_angles_on_the_cpu() -> None:
    facts = replace(ROTATION, implementation="reference", device="cpu", cache_dtype=torch.bfloat16)
    assert first_reason(ROTATION_RULES, facts) == ""


# Each rule with a change that only it notices, and words of its sentence, in the rules' order.
ROTATION_CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"own_forward": True, "module": "MRotaryEmbedding"}, "MRotaryEmbedding rotates in its own"),
    ({"neox": False}, "rotates neighbours"),
    ({"native": True}, "as its trainer does"),
    ({"head_size": 64}, "for heads of 64"),
    ({"implementation": "reference"}, "slower than SGLang's kernel on cuda"),
    ({"cache_dtype": torch.bfloat16}, "cuda wants cos and sin in fp32, SGLang holds torch.bf"),
]
STORE_CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"rotated": False}, "K is rotated after our call"),
    ({"implementation": "reference"}, "make the host wait for cuda"),
    ({"plain": False, "pool": "SWAKVPool"}, "SWAKVPool is not SGLang's plain"),
    ({"layout": "hnd", "hnd": True}, "the layout of the KV pool is hnd"),
    ({"quantised": True}, "quantised in blocks"),
    ({"dtype": torch.float16}, "holds torch.float16, k and v are torch.bfloat16"),
    ({"v_shape": (100, 8, 64)}, "(100, 8, 128) and (100, 8, 64), the layer has (8, 128)"),
    ({"context_ranks": 2}, "2 context-parallel ranks"),
    ({"decode_context_ranks": 4}, "4 ranks share the context of a decode"),
    ({"checked": True}, "SGLANG_ENABLE_ASYNC_ASSERT"),
    ({"dtype": torch.float8_e5m2, "scales": None}, "not known to the host"),
    (
        {"dtype": torch.float8_e4m3fn, "backends": ("TRTLLMHAAttnBackend",)},
        "TRTLLMHAAttnBackend stores FP8 in the launch that converts q",
    ),
    (
        {
            "dtype": torch.float8_e5m2,
            "scales": (2.0, 1.0),
            "backends": ("TritonAttnBackend", "TorchNativeAttnBackend"),
        },
        "TorchNativeAttnBackend may not apply the FP8 scales (2.0, 1.0)",
    ),
]


@pytest.mark.parametrize(
    ("rules", "facts", "changes"),
    [(ROTATION_RULES, ROTATION, ROTATION_CHANGES), (STORE_RULES, STORE, STORE_CHANGES)],
    ids=["rotation", "store"],
)
def test_every_rule_is_needed(rules: Any, facts: Any, changes: Any) -> None:
    assert len(rules) == len(changes)
    for rule, (change, words) in zip(rules, changes, strict=True):
        changed = replace(facts, **change)
        assert words in first_reason(rules, changed)
        others = [each for each in rules if each is not rule]
        assert first_reason(others, changed) == "", f"two rules notice {change}"


def test_scales_of_a_backend_that_ignores_them_do_not_matter_when_they_are_one() -> None:
    assert first_reason(STORE_RULES, replace(FP8, backends=("TorchNativeAttnBackend",))) == ""
    # And those of a pool that is not FP8 are never applied.
    facts = replace(STORE, backends=("TorchNativeAttnBackend",), scales=(2.0, 2.0))
    assert first_reason(STORE_RULES, facts) == ""


def test_trtllm_keeps_its_own_store_of_one_type_alone() -> None:
    trtllm = replace(STORE, backends=("FlashAttentionBackend", "TRTLLMHAAttnBackend"))
    assert first_reason(STORE_RULES, trtllm) == ""
    assert first_reason(STORE_RULES, replace(trtllm, dtype=torch.float8_e5m2)) == ""
    # Of E5M2 it applies no scales when it reads.
    scaled = replace(trtllm, dtype=torch.float8_e5m2, scales=(2.0, 1.0))
    assert "TRTLLMHAAttnBackend may not apply" in first_reason(STORE_RULES, scaled)


@pytest.mark.parametrize(
    ("setting", "dtype"),
    [
        ("auto", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("fp8_e4m3", torch.float8_e4m3fn),
        ("fp8_e5m2", torch.float8_e5m2),
        ("mxfp8", None),
        ("nvfp4", None),
    ],
)
def test_what_a_setting_makes_of_the_pool(setting: str, dtype: torch.dtype | None) -> None:
    assert expected_cache_dtype(setting, torch.bfloat16) == dtype


def test_a_pool_of_another_dtype_than_the_model_is_not_prepared_for() -> None:
    assert expected_cache_dtype("bf16", torch.float16) is None


def test_auto_follows_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for algorithm in (None, "NVFP4", 8):
        assert expected_cache_dtype("auto", torch.bfloat16, algorithm) == torch.bfloat16
    assert expected_cache_dtype("auto", torch.bfloat16, "fp8") == torch.float8_e4m3fn
    assert expected_cache_dtype("bf16", torch.bfloat16, "FP8") == torch.bfloat16
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert expected_cache_dtype("auto", torch.bfloat16, "FP8") is None


# --- the path that all ranks of a group take ---

GPU = Request("cuda", torch.bfloat16, 6, 1, 128, rotary_dim=64, group_size=3, capability=(9, 0))


@pytest.fixture(autouse=True)
def three_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = [op.Implementation(name, lambda _: None, lambda _: None) for name in ORDER]  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(op, "IMPLEMENTATIONS", fakes)


ORDER = ["cuda", "triton", "reference"]


def chooser_of(*usable: str) -> path.Chooser:
    """A rank on which only these run."""

    def choose(request: Request, name: str | None) -> Choice:
        wanted = [each for each in ORDER if name in (None, each)]
        found = next((each for each in wanted if each in usable), None)
        if found is None:
            raise KernelUnavailable(f"{name}: no compiler")
        return Choice(found, "asked for" if name else f"{usable} run here", lambda call: None)

    return choose


def test_ranks_that_agree_take_the_fastest() -> None:
    found = together(
        lambda rank, gather: path.choose_together(GPU, None, gather, chooser_of(*ORDER))
    )
    assert [each.name for each in found] == ["cuda"] * 3


def test_one_slower_rank_slows_all_and_is_named() -> None:
    usable = [ORDER, ["triton", "reference"], ORDER]
    found = together(
        lambda rank, gather: path.choose_together(GPU, None, gather, chooser_of(*usable[rank]))
    )
    assert [each.name for each in found] == ["triton"] * 3
    assert found[0].why == "rank 1: ('triton', 'reference') run here"


def test_ranks_without_a_common_kernel_meet_at_the_reference() -> None:
    usable = [["cuda", "reference"], ["triton", "reference"], ORDER]
    found = together(
        lambda rank, gather: path.choose_together(GPU, None, gather, chooser_of(*usable[rank]))
    )
    assert [each.name for each in found] == ["reference"] * 3


def test_a_forced_path_is_refused_on_all_ranks_or_none() -> None:
    usable = [ORDER, ORDER, ["reference"]]

    def force(name: str) -> list[Any]:
        return together(
            lambda rank, gather: path.choose_together(GPU, name, gather, chooser_of(*usable[rank]))
        )

    assert [each.name for each in force("reference")] == ["reference"] * 3
    refused = force("triton")
    assert [type(each) for each in refused] == [PathError] * 3
    assert {str(each) for each in refused} == {
        "SGLANG_MINIMAX_QK_NORM=triton: rank 2: triton: no compiler; unset it for a path that "
        "runs here."
    }


def test_a_cpu_does_not_choose_what_it_could_interpret() -> None:
    cpu = replace(GPU, device="cpu", capability=None)
    gather = group_gather("cpu", 3)
    assert path.choose_together(cpu, None, gather, chooser_of(*ORDER)).name == "reference"
    assert path.choose_together(cpu, "triton", gather, chooser_of(*ORDER)).name == "triton"


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(path.VARIABLE, raising=False)
    assert path.forced() is None
    monkeypatch.setenv(path.VARIABLE, "")
    assert path.forced() is None
    monkeypatch.setenv(path.VARIABLE, "Triton")
    assert path.forced() == "Triton", "what it means is decided where all ranks hear it"


class FakeChannel:
    closed = False

    def close(self) -> None:
        self.closed = True


def prepared(
    request: Request, name: str | None, usable: list[str], answer: Any
) -> tuple[Choice, Request, Any, int]:
    asked: list[int] = []

    def opener() -> Any:
        asked.append(1)
        return answer

    gather = group_gather("cpu", request.group_size)
    choice, decided, channel, _ = path.prepare(request, name, gather, opener, chooser_of(*usable))
    return choice, decided, channel, len(asked)


def ranks_prepare(
    names: list[str | None],
    *,
    usable: list[list[str]] | None = None,
    refusals: tuple[str, ...] = ("", "", ""),
    opening: path.Opening | None = None,
    request: Request = GPU,
) -> tuple[list[Any], list[FakeChannel]]:
    """What `prepare` returns or raises on three ranks, and the channels that were opened.

    Opening is collective, as in a server: a rank that opens alone leaves the others behind. Not
    only the number of gathers but also what they are for must be the same.
    """
    channels: list[FakeChannel] = []

    def refuse(request: Request) -> str | None:
        return refusals[own_rank()] or request.no_exchange or None

    implementations = [op.Implementation("cuda", refuse, lambda _: None), *op.IMPLEMENTATIONS[1:]]  # type: ignore[arg-type, return-value]

    def act(rank: int, gather: Any) -> path.Prepared:
        def opener() -> path.Opening:
            assert set(gather("opening")) == {"opening"}, "only some of the ranks open a channel"
            if opening is not None:
                return opening
            channels.append(FakeChannel())
            return path.Opening(channels[-1], "")  # type: ignore[arg-type]

        def gather_names(value: Any) -> list[Any]:
            found = gather(value)
            assert "opening" not in found, "some of the ranks open a channel, this one does not"
            return list(found)

        run_here = (usable or [ORDER] * 3)[rank]
        return path.prepare(request, names[rank], gather_names, opener, chooser_of(*run_here))  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "IMPLEMENTATIONS", implementations)
        return together(act), channels


def test_ranks_that_may_exchange_open_together() -> None:
    found, channels = ranks_prepare([None] * 3)
    assert [(each.choice.name, each.failed) for each in found] == [("cuda", False)] * 3
    assert len(channels) == 3
    assert not any(each.closed for each in channels)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["triton", None, None], "is triton on rank 0 and unset on rank 1; "),
        ([None, None, "cuda"], "is unset on rank 0 and cuda on rank 2; "),
        (["cuda", "reference", "triton"], "is cuda on rank 0 and reference on rank 1; "),
    ],
)
def test_names_that_differ_end_the_start_on_all_ranks(
    names: list[str | None], sentence: str
) -> None:
    found, channels = ranks_prepare(names)
    assert [type(each) for each in found] == [PathError] * 3
    assert {str(each) for each in found} == {
        f"SGLANG_MINIMAX_QK_NORM {sentence}set it to one name on all machines, or unset it on all."
    }
    assert channels == []


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (["Triton"] * 3, "Triton"),
        ([None, "Triton", None], "Triton on rank 1"),
        (["cuda", "cuda", "fastest"], "fastest on rank 2"),
    ],
)
def test_an_unknown_name_reaches_all_ranks(names: list[str | None], name: str) -> None:
    found, channels = ranks_prepare(names)
    assert [type(each) for each in found] == [PathError] * 3
    assert {str(each) for each in found} == {
        f"SGLANG_MINIMAX_QK_NORM={name} is not known; "
        "use one of cuda, triton, reference, or unset it."
    }
    assert channels == []


def test_a_channel_is_opened_where_all_ranks_may() -> None:
    """One rank's device is too old, say: the others must not wait for it in the opening."""
    usable = [ORDER, ORDER[1:], ORDER]
    refusals = ("", "not for sm_75", "")
    found, channels = ranks_prepare([None] * 3, usable=usable, refusals=refusals)
    assert [each.choice.name for each in found] == ["triton"] * 3
    assert {each.request.no_exchange for each in found} == {"rank 1: not for sm_75"}
    assert all(each.failed for each in found), "the other ranks' rules allow it"
    assert channels == []
    found, channels = ranks_prepare(["cuda"] * 3, usable=usable, refusals=refusals)
    assert {str(each) for each in found} == {
        "SGLANG_MINIMAX_QK_NORM=cuda: rank 1: not for sm_75; unset it for a path that runs here."
    }
    assert channels == []


def test_what_was_expected_to_run_and_does_not_is_told_from_a_rule() -> None:
    def failed(*names: str | None, **changes: Any) -> set[tuple[str, bool]]:
        found, _ = ranks_prepare(list(names or [None] * 3), **changes)
        return {(each.choice.name, each.failed) for each in found}

    slow = [ORDER[1:]] * 3
    assert failed(usable=slow) == {("triton", True)}, "nvcc failed"
    assert failed(usable=[ORDER, ORDER, ORDER[1:]]) == {("triton", True)}, "and on one rank"
    assert failed("triton", "triton", "triton") == {("triton", False)}
    old = {"usable": slow, "refusals": ("not for sm_75",) * 3}
    assert failed(**old) == {("triton", False)}
    rule, failure = path.Opening(None, "no NVLink"), path.Opening(None, "no memory", failed=True)
    assert failed(opening=rule, usable=slow) == {("triton", False)}
    assert failed(opening=failure, usable=slow) == {("triton", True)}
    # Interpreted there, the kernels would run.
    cpu = replace(GPU, device="cpu", capability=None)
    assert failed(request=cpu) == {("reference", False)}


def test_a_channel_is_opened_for_the_kernel_that_takes_one() -> None:
    channel = FakeChannel()
    choice, decided, found, asked = prepared(GPU, None, ORDER, path.Opening(channel, ""))
    assert (choice.name, decided.no_exchange, found, asked) == ("cuda", "", channel, 1)
    assert not channel.closed


def test_a_channel_that_nobody_uses_is_closed() -> None:
    channel = FakeChannel()
    choice, _, found, _ = prepared(GPU, None, ["triton", "reference"], path.Opening(channel, ""))
    assert (choice.name, found, channel.closed) == ("triton", None, True)


def test_why_there_is_no_channel_reaches_the_request() -> None:
    _, decided, found, asked = prepared(
        GPU, None, ORDER, path.Opening(None, "spans NVLink domains")
    )
    assert (decided.no_exchange, found, asked) == ("spans NVLink domains", None, 1)


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (replace(GPU, group_size=1), None),
        (replace(GPU, device="cpu"), None),
        (GPU, "triton"),
        (GPU, "reference"),
    ],
)
def test_no_channel_is_opened_in_vain(request_: Request, name: str | None) -> None:
    assert prepared(request_, name, ORDER, path.Opening(FakeChannel(), ""))[2:] == (None, 0)


def test_a_kernel_that_refuses_gets_no_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = op.Implementation("cuda", lambda _: "not for sm_75", lambda _: None)  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(op, "IMPLEMENTATIONS", [refusing, *op.IMPLEMENTATIONS[1:]])
    assert prepared(GPU, None, ORDER[1:], path.Opening(FakeChannel(), ""))[2:] == (None, 0)


def test_rules_that_cannot_be_asked_refuse() -> None:
    """A rank that raises before it gathers would leave the others behind."""

    def refuse(request: Request) -> str | None:
        raise OSError("libcuda is\n  gone")

    broken = op.Implementation("cuda", refuse, lambda _: None)  # type: ignore[arg-type, return-value]
    assert refusal_of(broken, GPU) == "OSError: libcuda is gone"
    assert refusal_of(op.REFERENCE, GPU) == ""


def test_a_problem_of_all_ranks_names_none() -> None:
    assert first_problem(lambda mine: [mine, mine])("no compiler") == "no compiler"
    assert first_problem(lambda mine: ["", "no compiler"])("") == "rank 1: no compiler"
    assert first_problem(lambda mine: ["", ""])("") == ""


def test_the_start_up_lines() -> None:
    choice = Choice("cuda", "the fastest", lambda call: None)
    assert path.summary(choice, GPU, "") == (
        "Attention prologue: cuda on cuda, attention-TP 3 (the fastest): "
        "norm and rotation in one call"
    )
    assert path.summary(choice, GPU, "Other rotates in its own way").endswith(
        ": norm alone; SGLang rotates: Other rotates in its own way"
    )
    assert "cuda stores K and V in the same call" in path.store_summary(choice, "")
    assert path.store_summary(choice, "the pool is odd").endswith("itself: the pool is odd")
