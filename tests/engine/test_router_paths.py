"""The router inside SGLang: each path in an engine, how one is decided, and torch.compile."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt import runtime_context
from sglang.srt.layers.moe.topk import TopKConfig, TopKOutputFormat
from sglang.srt.runtime_context import get_parallel

from jit_kernels.router import op, reference
from jit_kernels.router.contract import Call, Request
from sglang_minimax.errors import PathError
from sglang_minimax.layers import agreeing, router
from sglang_minimax.layers.moe import MiniMaxM2Gate
from tests.ranks import together

# Triton must be interpreted from its first import on: so engines run in a process of their own.
SCRIPT = """
from sglang_minimax.validation.agreement import compare, random_prompt
from sglang_minimax.validation.engine_process import EngineProcess
from sglang_minimax.validation.oracle import TransformersOracle
from sglang_minimax import TINY_M2

oracle = TransformersOracle(TINY_M2)
prompts = [random_prompt(length, oracle.vocab_size, seed=3) for length in (5, 40)]
with EngineProcess(
    model_path=str(TINY_M2), dtype="float32", skip_tokenizer_init=True, log_level="info",
    chunked_prefill_size=16,
) as engine:
    found = compare(engine, oracle, prompts, 4)
    print("RESULT", found.tokens_equal, found.max_error)
    print("\\n".join(line for line in engine.log.splitlines() if "Router" in line))
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("triton", "Router: triton on cpu (asked for)"),
        pytest.param("sglang", "Router: sglang on cpu (asked for)", marks=pytest.mark.slow),
        # Every other test of an engine runs on this path.
        pytest.param(
            "", "Router: reference on cpu (no accelerator for a kernel)", marks=pytest.mark.slow
        ),
    ],
    ids=["triton", "sglang", "default"],
)
def test_every_path_serves_the_model(path: str, line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "TRITON_INTERPRET": "1", router.VARIABLE: path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    results = [line.split() for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(results) == 1, done.stderr[-3000:]
    assert results[0][1] == "True"
    assert float(results[0][2]) < 1e-4  # as in test_against_transformers.py
    assert line in done.stdout


GPU = Request("cuda", torch.bfloat16, 256, 3072, 8, capability=(9, 0))
CPU = replace(GPU, device="cpu")


def chooser(failing: str = "") -> router.Chooser:
    """Triton, unless it is failing, then the reference."""

    def choose(request: Request, name: str | None) -> op.Choice:
        if name != "reference" and failing:
            if name == "triton":
                raise op.KernelUnavailable(f"the router 'triton' cannot be used: {failing}")
            return op.Choice("reference", f"triton: {failing}", reference.run)
        return op.Choice(name or "triton", "asked for" if name else "the fastest", reference.run)

    return choose


def decided(request: Request, name: str | None, not_ours: str = "", failing: str = "") -> tuple:
    """What one rank alone decides: a name, None for SGLang's path, and why."""
    choice, why, _ = router.decide(request, name, not_ours, lambda mine: [mine], chooser(failing))
    return (None if choice is None else choice.name), why


def decided_together(
    names: tuple[str | None, ...], failing: tuple[str, ...] = ("", ""), not_ours: Any = ("", "")
) -> list[Any]:
    """What each of two ranks decides, or raises."""

    def act(rank: int, gather: Any) -> router.Decision:
        return router.decide(GPU, names[rank], not_ours[rank], gather, chooser(failing[rank]))

    return together(act, 2)


def test_how_a_path_is_decided() -> None:
    assert decided(GPU, None) == ("triton", "the fastest")
    assert decided(CPU, None) == ("reference", "no accelerator for a kernel")
    assert decided(GPU, "reference") == ("reference", "asked for")
    assert decided(GPU, "sglang") == (None, "asked for")
    # On an accelerator SGLang's kernels, not plain PyTorch, take the place of ours.
    assert decided(GPU, None, failing="no ptxas") == (None, "triton: no ptxas")
    assert decided(GPU, None, "the runner routes") == (None, "the runner routes")


def test_what_was_asked_for_and_does_not_run_is_refused() -> None:
    with pytest.raises(PathError, match=r"^SGLANG_MINIMAX_ROUTER=triton: "):
        decided(GPU, "triton", failing="no ptxas")
    with pytest.raises(PathError, match="the runner routes; unset it"):
        decided(GPU, "triton", "the runner routes")


def test_all_ranks_take_the_path_that_all_can() -> None:
    """Two kernels differ in the last bits, and so may two ranks in the experts they choose."""
    found = decided_together((None, None), failing=("", "no ptxas"))
    assert [(each.choice, each.why) for each in found] == [(None, "rank 1: triton: no ptxas")] * 2
    assert found[0].failed, "the rules allow it there"
    refused = decided_together(("triton", "triton"), failing=("", "no ptxas"))
    assert [type(each) for each in refused] == [PathError] * 2
    assert len({str(each) for each in refused}) == 1
    assert "rank 1: the router 'triton' cannot be used: no ptxas" in str(refused[0])
    found = decided_together((None, None), not_ours=("", "the runner routes"))
    assert [tuple(each) for each in found] == [(None, "rank 1: the runner routes", False)] * 2


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            ("cuda", "cuda"),
            "=cuda is not known; use one of triton, reference, sglang, or unset it.",
        ),
        (
            (None, "cuda"),
            "=cuda on rank 1 is not known; use one of triton, reference, sglang, or unset it.",
        ),
        (
            ("sglang", None),
            " is sglang on rank 0 and unset on rank 1; set it to one name on all machines, or "
            "unset it on all.",
        ),
        (
            (None, "triton"),
            " is unset on rank 0 and triton on rank 1; set it to one name on all machines, or "
            "unset it on all.",
        ),
    ],
)
def test_names_that_are_wrong_end_the_start_on_all_ranks(
    names: tuple[str | None, ...], sentence: str
) -> None:
    """Whatever else keeps a rank from our operator: no rank waits for one that has gone."""
    for not_ours in (("", ""), ("the runner routes", "")):
        found = decided_together(names, not_ours=not_ours)
        assert [type(each) for each in found] == [PathError] * 2
        assert {str(each) for each in found} == {f"SGLANG_MINIMAX_ROUTER{sentence}"}


class Chosen:
    """A TopK as far as the router sees it: it calls the custom routing function."""

    def __init__(self, bias: torch.Tensor, output_format: TopKOutputFormat) -> None:
        self.topk_config = TopKConfig(top_k=2, correction_bias=bias, output_format=output_format)

    def __call__(self, hidden: torch.Tensor, logits: torch.Tensor) -> Any:
        custom = self.topk_config.custom_routing_function
        if custom is None:
            return "SGLang chooses", logits
        weights, ids = custom(hidden_states=hidden, gating_output=logits, topk=2, renormalize=True)
        return weights, ids, logits


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The part of SGLang's settings that the router reads."""
    monkeypatch.delenv(router.VARIABLE, raising=False)
    settings = SimpleNamespace(
        moe=SimpleNamespace(ep_dispatch_algorithm=None, moe_runner_backend="flashinfer_mxfp4"),
        deterministic=SimpleNamespace(enable_deterministic_inference=False),
    )
    group = SimpleNamespace(world_size=1)
    monkeypatch.setattr(router, "get_exec", lambda: settings)
    with get_parallel().override(tp_group=group, tp_rank=0, pp_rank=0):
        router._decided.cache_clear()
        yield settings
    router._decided.cache_clear()


def make(output_format: TopKOutputFormat = TopKOutputFormat.STANDARD) -> router.Router:
    torch.manual_seed(1)
    gate = MiniMaxM2Gate(8, 64)
    gate.weight.data.normal_()
    return router.Router(gate, Chosen(torch.randn(8), output_format))


def test_ours_fills_the_logits_that_topk_carries(server: SimpleNamespace) -> None:
    ours = make()
    hidden = torch.randn(5, 64)
    weights, ids, logits = ours(hidden)
    call = Call(hidden, ours._gate.weight, ours._topk.topk_config.correction_bias, 2)
    want = reference.run(call)
    assert torch.equal(weights, want.weights)
    assert torch.equal(ids, want.ids)
    assert torch.equal(logits, hidden @ ours._gate.weight.T)


def test_where_sglang_chooses_it_gets_logits(
    server: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    hidden = torch.randn(5, 64)
    theirs = make(TopKOutputFormat.BYPASSED)
    words, logits = theirs(hidden)
    assert words == "SGLang chooses"
    assert torch.equal(logits, hidden @ theirs._gate.weight.T)
    reason = "the experts' runner flashinfer_mxfp4 routes by itself"
    assert f"Router: sglang on cpu ({reason})" in caplog.messages
    server.moe.ep_dispatch_algorithm = "fake"
    assert make()(hidden)[0] == "SGLang chooses"


def test_a_failed_compile_is_a_warning_of_each_stage(
    server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def told(failing: str, not_ours: str = "", **ranks: int) -> list[tuple[int, str]]:
        caplog.clear()
        router._decided.cache_clear()
        decide = router.decide
        with monkeypatch.context() as patch, get_parallel().override(**ranks):
            patch.setattr(router, "decide", lambda *given: decide(*given, chooser(failing)))
            router._decided(GPU, not_ours)
        return [(record.levelno, record.getMessage()) for record in caplog.records]

    assert told("") == [(logging.INFO, "Router: triton on cuda (the fastest)")]
    assert told("", pp_rank=1) == []
    warning = (logging.WARNING, "Router: sglang on cuda (triton: no ptxas)")
    assert told("no ptxas") == [warning]
    assert told("no ptxas", pp_rank=1) == [warning]
    assert told("no ptxas", tp_rank=1) == []
    assert told("no ptxas", "the runner routes", pp_rank=1) == [], "a rule is no failure"


def test_a_model_without_memory_is_decided_for_the_device_that_it_will_have(
    server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.empty(8, 64, device="meta")
    settings = SimpleNamespace(device="cpu")
    monkeypatch.setattr(runtime_context, "get_server_args", lambda: settings)
    assert router.request_for(weight, 2).device == "cpu"
    assert agreeing.device_of(weight) == torch.device("cpu")
    settings.device = "cuda"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    request = router.request_for(weight, 2)
    assert (request.device, request.capability) == ("cuda", (9, 3))
    # ROCm calls its devices cuda too.
    monkeypatch.setattr(torch.version, "hip", "6.4")
    request = router.request_for(weight, 2)
    assert (request.device, request.capability) == ("cuda", None)


def test_torch_compile_sees_one_node_for_any_number_of_tokens(server: SimpleNamespace) -> None:
    ours = make()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    compiled = torch.compile(lambda x: ours(x), backend=backend, fullgraph=True, dynamic=True)
    for tokens in (7, 70, 1500):
        hidden = torch.randn(tokens, 64)
        for found, want in zip(compiled(hidden), ours(hidden), strict=True):
            assert torch.equal(found, want)
    assert len(graphs) == 1
    assert graphs[0].count("sglang_minimax.route.default") == 1
