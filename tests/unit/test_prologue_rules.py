"""What of the prologue is fused and which path runs: rules and agreement, without SGLang."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from jit_kernels.qk_norm_rope import op
from jit_kernels.qk_norm_rope.op import Choice, KernelUnavailable, Request
from sglang_minimax.errors import PathError
from sglang_minimax.layers import path
from sglang_minimax.layers.agreeing import first_problem, group_gather
from sglang_minimax.layers.fusion import (
    ROTATION_RULES,
    STORE_RULES,
    RotationFacts,
    StoreFacts,
    expected_cache_dtype,
    first_reason,
)

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
    backend="FlashAttentionBackend",
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
        {"dtype": torch.float8_e5m2, "scales": (2.0, 1.0), "backend": "TorchNativeAttnBackend"},
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
    assert first_reason(STORE_RULES, replace(FP8, backend="TorchNativeAttnBackend")) == ""
    # And those of a pool that is not FP8 are never applied.
    facts = replace(STORE, backend="TorchNativeAttnBackend", scales=(2.0, 2.0))
    assert first_reason(STORE_RULES, facts) == ""


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


def together(act: Callable[[int, Any], Any], size: int = 3) -> list[Any]:
    """Run `act(rank, gather)` for all ranks, one step of all before the next (generators would
    do; threads are shorter)."""
    import threading

    barrier, values = threading.Barrier(size, timeout=20), [None] * size
    results: list[Any] = [None] * size

    def one(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            found = list(values)
            barrier.wait()
            return found

        try:
            results[rank] = act(rank, gather)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


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
    monkeypatch.setenv(path.VARIABLE, "triton")
    assert path.forced() == "triton"
    monkeypatch.setenv(path.VARIABLE, "Triton")
    with pytest.raises(PathError, match="use one of cuda, triton, reference, or unset"):
        path.forced()


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
    choice, decided, channel = path.prepare(request, name, gather, opener, chooser_of(*usable))
    return choice, decided, channel, len(asked)


def test_a_channel_is_opened_for_the_kernel_that_takes_one() -> None:
    channel = FakeChannel()
    choice, decided, found, asked = prepared(GPU, None, ORDER, (channel, ""))
    assert (choice.name, decided.no_exchange, found, asked) == ("cuda", "", channel, 1)
    assert not channel.closed


def test_a_channel_that_nobody_uses_is_closed() -> None:
    channel = FakeChannel()
    choice, _, found, _ = prepared(GPU, None, ["triton", "reference"], (channel, ""))
    assert (choice.name, found, channel.closed) == ("triton", None, True)


def test_why_there_is_no_channel_reaches_the_request() -> None:
    _, decided, found, asked = prepared(GPU, None, ORDER, (None, "spans NVLink domains"))
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
    assert prepared(request_, name, ORDER, (FakeChannel(), ""))[2:] == (None, 0)


def test_a_kernel_that_refuses_gets_no_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = op.Implementation("cuda", lambda _: "not for sm_75", lambda _: None)  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(op, "IMPLEMENTATIONS", [refusing, *op.IMPLEMENTATIONS[1:]])
    assert prepared(GPU, None, ORDER[1:], (FakeChannel(), ""))[2:] == (None, 0)


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
