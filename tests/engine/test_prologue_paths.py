"""The attention prologue inside SGLang's engine: each path, the refusals, and planted mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from sglang_minimax import TINY_M2
from sglang_minimax.validation.agreement import greedy, random_prompt
from sglang_minimax.validation.engine_process import EngineFailed, EngineProcess
from sglang_minimax.validation.session import Session
from tests.engine.mistakes import Mistake, caught_by, run

# Triton must be interpreted from its first import on, and this process has imported it: the
# engines run in another one. A short prompt, one in chunks of 16, and one with a radix hit.
SCRIPT = """
from sglang_minimax.validation.agreement import compare, random_prompt
from sglang_minimax.validation.engine_process import EngineProcess
from sglang_minimax.validation.oracle import TransformersOracle
from sglang_minimax import TINY_M2

oracle = TransformersOracle(TINY_M2)
prompts = [random_prompt(length, oracle.vocab_size, seed=3) for length in (5, 40)]
prompts.append(prompts[1][:30] + prompts[0])
for size in (1, 2):
    with EngineProcess(
        model_path=str(TINY_M2), dtype="float32", skip_tokenizer_init=True, log_level="info",
        tp_size=size, chunked_prefill_size=16,
    ) as engine:
        found = compare(engine, oracle, prompts, 4)
        print("RESULT", size, found.tokens_equal, found.max_error)
        print("\\n".join(line for line in engine.log.splitlines() if "prologue" in line))
"""


def test_triton_serves_the_model_interpreted() -> None:
    """Norm, rotation and K/V write of the portable kernels, on one rank and on two."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "TRITON_INTERPRET": "1", "SGLANG_MINIMAX_QK_NORM": "triton"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    results = [line.split() for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert [row[1] for row in results] == ["1", "2"], done.stderr[-3000:]
    for _, _, equal, error in results:
        assert equal == "True"
        assert float(error) < 1e-4  # as in test_against_transformers.py
    for size in (1, 2):
        line = f"Attention prologue: triton on cpu, attention-TP {size} (asked for): norm and rot"
        assert line in done.stdout
    assert done.stdout.count("Attention prologue: triton stores K and V in the same call") == 2


@pytest.mark.parametrize(
    ("dtype", "cache"),
    # FP8 from fp32: from bf16 SGLang rounds K twice, we once.
    [("bfloat16", "auto"), ("float32", "fp8_e4m3")],
)
def test_our_store_and_sglangs_are_the_same_server(
    monkeypatch: pytest.MonkeyPatch, dtype: str, cache: str
) -> None:
    """To the bit, over chunks of a prompt, decode steps and a radix hit."""
    prompt = random_prompt(40, 896, seed=3)

    def serve() -> tuple[list[Any], str]:
        with EngineProcess(
            model_path=str(TINY_M2),
            dtype=dtype,
            kv_cache_dtype=cache,
            skip_tokenizer_init=True,
            log_level="info",
            chunked_prefill_size=16,
        ) as engine:
            replies = [greedy(engine, each, 8, 896) for each in (prompt, [*prompt[:30], 7, 8, 9])]
            return replies, engine.log

    monkeypatch.delenv("SGLANG_ENABLE_ASYNC_ASSERT", raising=False)
    ours, log = serve()
    assert "Attention prologue: reference stores K and V in the same call" in log
    monkeypatch.setenv("SGLANG_ENABLE_ASYNC_ASSERT", "1")
    theirs, log = serve()
    assert "SGLang stores K and V itself: SGLANG_ENABLE_ASYNC_ASSERT" in log
    for (tokens, distributions, _), (its_tokens, its_distributions, _) in zip(
        ours, theirs, strict=True
    ):
        assert tokens == its_tokens
        assert torch.equal(distributions, its_distributions)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fastest", "SGLANG_MINIMAX_QK_NORM=fastest is not known; use one of "),
        ("triton", "Triton runs on a CPU only with TRITON_INTERPRET=1 set; unset it for a path"),
    ],
)
def test_a_path_that_does_not_run_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, sentence: str
) -> None:
    monkeypatch.setenv("SGLANG_MINIMAX_QK_NORM", name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(EngineFailed) as failed:
        EngineProcess(model_path=str(TINY_M2), skip_tokenizer_init=True, load_format="dummy")
    assert sentence in failed.value.log
    assert "Traceback" not in failed.value.log


# --- planted mistakes of the K/V write ---


def kv_not_written() -> None:
    """Attention is told that K and V are stored, and nobody stored them."""
    from jit_kernels.qk_norm_rope import reference

    reference._write = lambda cache, k: None


def stale_k_stored_over_ours() -> None:
    """K and V are stored twice, the second time with K as the projection left it."""
    from sglang_minimax.layers.prologue import Prologue

    original = Prologue.__call__

    def __call__(self: Any, positions: torch.Tensor, qkv: torch.Tensor, batch: Any) -> Any:
        stale = qkv.clone()
        ready = original(self, positions, qkv, batch)
        return ready._replace(k=stale.split(self._widths, dim=-1)[1], stored=False)

    Prologue.__call__ = __call__  # type: ignore[method-assign]


def next_slot() -> None:
    """Each token is stored one slot further than its request expects."""
    from sglang_minimax.layers.kv_store import KVStore

    original = KVStore.target

    def target(self: Any, v: torch.Tensor, batch: Any) -> Any:
        write = original(self, v, batch)
        return write and replace(write, slots=write.slots + 1)

    KVStore.target = target  # type: ignore[method-assign]


def k_stored_unrotated() -> None:
    """K goes to the cache between norm and rotation."""
    from jit_kernels.qk_norm_rope import reference

    original, write = reference.rotated, reference._write
    normed: list[torch.Tensor] = []

    def rotated(x: torch.Tensor, rotation: Any) -> torch.Tensor:
        normed.append(x)
        return original(x, rotation)

    reference.rotated = rotated
    reference._write = lambda cache, k: write(cache, normed[-1])


MISTAKES = [
    Mistake(plant, "tp=1")
    for plant in (kv_not_written, stale_k_stored_over_ours, next_slot, k_stored_unrotated)
]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The model and oracle of the shape, made once; without a mistake, test_validate.py runs it."""
    return Session(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_of_the_kv_write_is_caught(session: Session, mistake: Mistake) -> None:
    result = run(mistake, session)
    assert caught_by(mistake, result), f"{mistake.plant.__doc__} {result.shortcomings}"
