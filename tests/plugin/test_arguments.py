"""What SGLang's own argument resolution comes to with the plugin, each in a forked process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from typing import Any

import pytest

from sglang_minimax import TINY_M2
from sglang_minimax.validation.engine_process import preload

FIELDS = (
    *("enable_tf32_matmul", "attention_backend", "sampling_backend", "sleep_on_idle"),
    *("mem_fraction_static", "max_total_tokens", "disable_overlap_schedule", "host"),
)


def resolve(arguments: Sequence[str]) -> dict[str, Any] | str:
    """The resolved FIELDS of a command line, or the sentence with which it was refused."""
    preload()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def child() -> None:
        from sglang.srt.arg_groups.overrides import resolving_view
        from sglang.srt.server_args import prepare_server_args

        try:
            server_args = prepare_server_args(["--model-path", str(TINY_M2), *arguments])
            server_args.resolve_once()
            view = resolving_view(server_args)
            there.send({name: getattr(view, name) for name in FIELDS})
        except SystemExit as stop:
            there.send(str(stop.code))

    process = context.Process(target=child)
    process.start()
    assert here.poll(60), "no answer"
    answer = here.recv()
    process.join()
    return answer


def test_defaults_of_the_cpu_platform() -> None:
    found = resolve([])
    assert found == {
        "enable_tf32_matmul": False,
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "sleep_on_idle": True,
        "mem_fraction_static": 0.5,
        "max_total_tokens": 131072,
        "disable_overlap_schedule": True,
        "host": "127.0.0.1",
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


@pytest.mark.parametrize("arguments", ["--tp-size 8", "--tp-size 2 --pp-size 2"])
def test_legal_shapes_are_accepted(arguments: str) -> None:
    assert isinstance(resolve(arguments.split()), dict)


def test_a_model_that_another_server_provides_is_none_of_our_business() -> None:
    """`instance://` has no config to read; our hooks must not ask for it."""
    from sglang_minimax.patches.arguments import asked_for_ours

    class Record:
        model_path = "instance://127.0.0.1:9999"

    assert asked_for_ours(Record()) is False
