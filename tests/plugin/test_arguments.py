"""What SGLang's own argument resolution comes to with the plugin, each in a forked process."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from sglang_minimax import TINY_M2
from sglang_minimax.cli.topology import architecture
from sglang_minimax.moe_exchange.plan import ExchangePlan, plan_for
from sglang_minimax.moe_exchange.rules import VARIABLE
from sglang_minimax.validation.engine_process import preload
from tests.plugin.processes import forked

FIELDS = (
    *("enable_tf32_matmul", "attention_backend", "sampling_backend", "sleep_on_idle"),
    *("mem_fraction_static", "max_total_tokens", "disable_overlap_schedule", "host"),
    *("moe_a2a_backend", "ep_dispatch_algorithm"),
)


def resolve(
    arguments: Sequence[str], meanwhile: Callable[[Any], None] | None = None
) -> dict[str, Any] | str:
    """The resolved FIELDS of a command line, or the sentence with which it was refused.

    meanwhile: gets the arguments on the way, before SGLang comes to the experts.
    """
    preload()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def child() -> None:
        from sglang.srt.arg_groups.overrides import resolving_view
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
        from sglang.srt.server_args import prepare_server_args

        if meanwhile is not None:
            change = meanwhile

            @register_resolution_hook("handle_load_balance_method")
            def between(server_args: Any, previous: Callable[[Any], None]) -> None:
                previous(server_args)
                change(server_args)

        try:
            server_args = prepare_server_args(["--model-path", str(TINY_M2), *arguments])
            server_args.resolve_once()
            view = resolving_view(server_args)
            found = {name: getattr(view, name) for name in FIELDS}
            copy = pickle.loads(pickle.dumps(server_args))
            plans = tuple(plan_of(each).path for each in (server_args, copy))
            graphs = view.cuda_graph_config.prefill.backend
            there.send({**found, "plans": plans, "prefill_graphs": graphs})
        except SystemExit as stop:
            there.send(str(stop.code))

    process = context.Process(target=child)
    process.start()
    assert here.poll(60), "no answer"
    answer = here.recv()
    process.join()
    return answer


def plan_of(server_args: Any) -> ExchangePlan:
    """As `layers.plan` works it out in a rank."""
    from sglang_minimax.patches.arguments import launch_of

    return plan_for(architecture(TINY_M2), launch_of(server_args))


def set_path(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    """Ask for a path to the experts, or for none."""
    if name is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, name)


def test_defaults_of_the_cpu_platform() -> None:
    found = resolve([])
    assert isinstance(found, dict), found
    assert {name: found[name] for name in FIELDS} == {
        "enable_tf32_matmul": False,
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "sleep_on_idle": True,
        "mem_fraction_static": 0.5,
        "max_total_tokens": 131072,
        "disable_overlap_schedule": True,
        "host": "127.0.0.1",
        "moe_a2a_backend": "none",
        "ep_dispatch_algorithm": None,
    }


def test_what_the_user_says_stays() -> None:
    found = resolve(
        ["--enable-tf32-matmul", "--mem-fraction-static", "0.3", "--max-total-tokens", "5000"]
    )
    assert isinstance(found, dict)
    assert found["enable_tf32_matmul"] is True
    assert found["mem_fraction_static"] == 0.3
    assert found["max_total_tokens"] == 5000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--tp-size 3", ["--tp-size 3", "16 query heads", "2 or 4"]),
        ("--tp-size 32", ["attention-TP size 32", "16"]),
        ("--tp-size 4 --attn-dp-size 3", ["--tp-size 4", "3"]),
        ("--pp-size 5", ["--pp-size 5", "4 layers"]),
        ("--tp-size 4 --ep-size 3", ["--ep-size 3", "--ep-size 2"]),
        ("--enable-two-batch-overlap", ["without --enable-two-batch-overlap"]),
        ("--quantization awq", ["awq", "not supported", "quantised already"]),
        ("--tp-size 2 --moe-a2a-backend deepep", ["--moe-a2a-backend deepep", "CPU platform"]),
        ("--pp-size 2 --enable-return-hidden-states", ["hidden-states", "--pp-size 2"]),
        ("--tp-size 2 --pp-size 3 --nnodes 4", ["--nnodes 4"]),
        ("--tp-size 4 --moe-dp-size 2", ["--moe-dp-size 2", "--attn-cp-size is 1"]),
        ("--tp-size 2 --enable-eplb", ["--enable-eplb", "--ep-size 2"]),
        ("--tp-size 2 --ep-size 2 --init-expert-location {}", ["physical_to_logical_map"]),
        ("--quantization fp8", ["fp8", "GPU"]),
    ],
)
def test_refused_at_launch_in_one_sentence(arguments: str, words: list[str]) -> None:
    answer = resolve(arguments.split())
    assert isinstance(answer, str), f"{arguments} was accepted"
    assert answer.startswith("sglang-minimax: ")
    assert "\n" not in answer
    for word in words:
        assert word in answer


DP2 = "--tp-size 2 --attn-dp-size 2"


@pytest.mark.parametrize(
    ("forced", "arguments", "backend"),
    [
        (None, "--tp-size 2", "none"),
        (None, DP2, "customized"),
        ("gather", "--tp-size 2", "customized"),
        ("all-to-all", f"{DP2} --ep-size 2", "customized"),
        ("sglang", DP2, "none"),
        (None, f"{DP2} --enable-return-routed-experts", "none"),
        (None, f"{DP2} --moe-dense-tp-size 1 --enable-dp-lm-head", "none"),
    ],
)
def test_sglang_is_told_whose_exchange_runs(
    forced: str | None, arguments: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_path(monkeypatch, forced)
    answer = resolve(arguments.split())
    assert isinstance(answer, dict), answer
    assert answer["moe_a2a_backend"] == backend
    # A rank works its plan out again, from arguments that have been pickled.
    assert answer["plans"][0] == answer["plans"][1]
    assert answer["plans"][0].is_ours == (backend == "customized")


def test_steps_after_the_backend_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend each token is routed on one rank, which may choose the nearest copy."""
    copies = ["--ep-size", "2", "--enable-eplb", "--ep-num-redundant-experts", "2"]
    chosen = {}
    for forced in ("sglang", "gather"):
        set_path(monkeypatch, forced)
        answer = resolve([*DP2.split(), *copies])
        assert isinstance(answer, dict), answer
        chosen[forced] = answer["ep_dispatch_algorithm"]
    assert chosen == {"sglang": "dynamic", "gather": "static"}


@pytest.mark.parametrize(
    ("forced", "arguments", "words"),
    [
        ("everything", DP2, ["SGLANG_MINIMAX_MOE=everything", "gather-fp8", "all-to-all"]),
        ("gather-fp8", DP2, ["128x128", "SGLANG_MINIMAX_MOE=gather"]),
        ("gather-fp4", DP2, ["NVFP4", "SGLANG_MINIMAX_MOE=gather"]),
        ("all-to-all", DP2, ["--ep-size 2"]),
        ("gather", f"{DP2} --moe-a2a-backend deepep", ["start without --moe-a2a-backend deepep"]),
        ("gather", "--tp-size 1", ["nothing to exchange", "unset"]),
        (None, f"{DP2} --moe-runner-backend flashinfer_cutedsl", ["means torch here"]),
    ],
)
def test_a_path_that_cannot_be_is_refused_in_one_sentence(
    forced: str | None, arguments: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_path(monkeypatch, forced)
    answer = resolve(arguments.split())
    assert isinstance(answer, str), f"{forced} was accepted"
    assert "\n" not in answer
    for word in words:
        assert word in answer


@pytest.mark.parametrize(
    ("forced", "asked", "left"),
    [("gather", False, "disabled"), ("gather", True, "breakable"), ("sglang", False, "breakable")],
)
def test_prefill_graphs_that_nobody_asked_for_are_given_up(
    forced: str, asked: bool, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's rule for backends that it has not tried, which it has asked before ours is there."""

    def capture(server_args: Any) -> None:
        from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
        from sglang.srt.model_executor.cuda_graph_config import Phase, with_phase

        graphs = resolving_view(server_args).cuda_graph_config
        graphs = with_phase(graphs, Phase.PREFILL, backend="breakable")
        declare_resolution(server_args, "test", cuda_graph_config=graphs)
        locked = {(Phase.PREFILL, "backend")}
        server_args._cuda_graph_config_locked = locked if asked else set()

    set_path(monkeypatch, forced)
    answer = resolve(DP2.split(), capture)
    assert isinstance(answer, dict), answer
    assert answer["prefill_graphs"] == left


@pytest.mark.parametrize("arguments", ["--tp-size 8", "--tp-size 2 --pp-size 2"])
def test_legal_shapes_are_accepted(arguments: str) -> None:
    assert isinstance(resolve(arguments.split()), dict)


def test_a_model_that_another_server_provides_is_none_of_our_business() -> None:
    """`instance://` has no config to read; our hooks must not ask for it."""
    from sglang_minimax.patches.arguments import asked_for_ours

    class Record:
        model_path = "instance://127.0.0.1:9999"

    assert asked_for_ours(Record()) is False


def decode_graph(arguments: Sequence[str], largest: int) -> Any:
    """What we count of decode's graphs, with DeepEP and without. largest: of SGLang's list."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
    from sglang.srt.model_executor.cuda_graph_config import Phase, with_phase
    from sglang.srt.server_args import prepare_server_args

    from sglang_minimax.patches.arguments import _decode_graph

    server_args = prepare_server_args(["--model-path", str(TINY_M2), *arguments])
    server_args.resolve_once()
    graphs = resolving_view(server_args).cuda_graph_config
    graphs = with_phase(graphs, Phase.DECODE, backend="full", max_bs=largest)
    declare_resolution(server_args, "test", cuda_graph_config=graphs)
    return _decode_graph(server_args, "deepep"), _decode_graph(server_args, "none")


@pytest.mark.parametrize(
    ("arguments", "requests"),
    [
        (DP2, 512),
        (f"{DP2} --max-running-requests 64", 32),
        ("--tp-size 2 --max-running-requests 64", 64),
        (f"{DP2} --max-running-requests 4096", 512),
    ],
)
def test_no_graph_is_for_more_requests_than_may_run(arguments: str, requests: int) -> None:
    """Of an attention-DP group; refusing more than SGLang captures would refuse what it serves."""
    asked, free = forked(decode_graph, arguments.split(), 512)
    assert asked == (requests, 1)
    assert free == (None, 1)
