"""What SGLang's engine computes with our model, against transformers on the same weights.

Here are the forms of a checkpoint, its dtypes and its context, on one rank. Topologies, chunked
prefill, radix hits and batches are in test_validate.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sglang_minimax.validation.agreement import compare, greedy, max_error, random_prompt
from sglang_minimax.validation.oracle import TransformersOracle
from tests.engine.conftest import StartEngine

Oracles = Callable[..., TransformersOracle]

# fp32: a product over up to 512 terms carries a relative error of about sqrt(512) * 2**-24 =
# 1.4e-6; two a layer on the residual stream, through 4 layers, on logits of up to 25 (tiny-m2 is
# sure of itself): 25 * sqrt(8) * 1.4e-6 = 1e-4. Observed: 1.5e-5 on tiny-m2, 3e-6 on random
# weights. The mistakes in test_planted_mistakes cost a hundred times the tolerance and more.
FP32 = 1e-4
STEPS = 16
PROMPT_LENGTHS = (1, 7, 64, 300)


@pytest.mark.parametrize("checkpoint", ["tiny-m2", "hub", "native"])
def test_every_distribution_and_token(
    start: StartEngine, oracles: Oracles, checkpoint: str
) -> None:
    oracle = oracles(checkpoint)
    prompts = [random_prompt(length, oracle.vocab_size, seed=length) for length in PROMPT_LENGTHS]
    found = compare(start(checkpoint), oracle, prompts, STEPS)
    assert found.max_error < FP32
    assert found.tokens_equal
    assert found.steps == STEPS * len(prompts)


def test_both_config_forms_are_one_model(start: StartEngine) -> None:
    prompt = random_prompt(40, 256)
    hub = greedy(start("hub"), prompt, STEPS, 256)
    native = greedy(start("native"), prompt, STEPS, 256)
    assert hub[0] == native[0]
    assert torch.equal(hub[1], native[1])


def test_a_prompt_as_long_as_the_context(start: StartEngine, oracles: Oracles) -> None:
    engine, oracle = start("tiny-m2"), oracles("tiny-m2")
    context = oracle.model.config.max_position_embeddings
    prompt = random_prompt(context - 10, oracle.vocab_size, seed=6)
    tokens, found, _ = greedy(engine, prompt, 8, oracle.vocab_size)
    assert max_error(oracle, prompt, tokens, found) < FP32


# bf16 keeps 8 bits, a relative rounding of 2**-9. The residual stream is rounded twice a layer
# and each branch about five times; over 4 layers that is sqrt(28) * 2**-9 = 1 % of a logit, and
# logits have a spread of a few: 0.05 typically, at the worst value of a row twice that.
BF16_TYPICAL = 0.1
# Beyond this only a different choice of experts explains a difference.
BF16_WORST = 0.4
# Activations of order one carry that 1 % too, which the router turns into up to
# 0.25 * |logit| * 1 % in the sigmoid. Where the choice of experts is closer than that, two
# correct computations may differ by a whole expert's output, there and, through attention, later.
ROUTING_NOISE = 0.02


@pytest.mark.parametrize("checkpoint", ["tiny-m2", "hub"])
def test_bf16_with_its_near_ties(start: StartEngine, oracles: Oracles, checkpoint: str) -> None:
    """As close to exact arithmetic as transformers' bf16; behind every outlier is a near tie."""
    engine, truth = start(checkpoint, dtype="bfloat16"), oracles(checkpoint)
    peer = oracles(checkpoint, torch.bfloat16)
    ours, theirs, explained, other = [], [], [], 0
    for seed in range(12):
        prompt = random_prompt(5 + 3 * seed, truth.vocab_size, seed=300 + seed)
        tokens, found, _ = greedy(engine, prompt, STEPS, truth.vocab_size)
        window = slice(len(prompt) - 1, -1)
        expected = truth.log_probabilities(prompt + tokens)[window]
        ours.append((found - expected).abs().amax(-1))
        theirs.append((peer.log_probabilities(prompt + tokens)[window] - expected).abs().amax(-1))
        closest_so_far = truth.routing_margins(prompt + tokens).cummin(0).values[window]
        explained.append(closest_so_far < ROUTING_NOISE)
        other += int((expected.argmax(-1) != torch.tensor(tokens)).sum())
    error, yardstick, near_tie = torch.cat(ours), torch.cat(theirs), torch.cat(explained)
    outliers = error > BF16_WORST
    print(
        f"{checkpoint} bf16, {len(error)} steps: median error {error.median():.3f} (transformers "
        f"{yardstick.median():.3f}), {int(outliers.sum())} beyond {BF16_WORST} after a near tie in "
        f"routing (transformers {int((yardstick > BF16_WORST).sum())}), {other} other tokens"
    )
    assert error.median() < BF16_TYPICAL
    assert error.median() < 1.5 * yardstick.median()
    assert error.quantile(0.75) < 2 * yardstick.quantile(0.75)
    assert bool(near_tie[outliers].all())
