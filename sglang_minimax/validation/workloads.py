"""What is asked of every shape: requests alone, in chunks, mixed with decode steps, in a batch.

Five steps, the same for every shape, so that one oracle serves all shapes of a model:

1. `first`: a prompt of more than one chunk alone, with the log-probabilities of the prompt itself.
   It goes to the first attention-DP group; every other group is idle.
2. `second`: a longer prompt alone, to the last attention-DP group.
3. `mixed`: a short prompt, and a long one whose chunks share forwards with the decode steps of the
   short one. SGLang mixes only where nobody wants log-probabilities, so tokens alone are compared;
   what these forwards left in the KV cache is judged in the next step.
4. `batch`: at once, a repetition of the three long prompts (radix hits of all but a token), a
   prompt that begins as the second, one of a single token, and a new one. They end at different
   steps, and most go to the last group, so that groups differ in their number of tokens; with more
   than two groups some stay idle.
5. `captured`: a prompt alone, of which the outputs of layers are wanted that a draft model would
   get. Not with pipeline stages, from which SGLang cannot return them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_minimax.errors import MinimaxError
from sglang_minimax.validation.agreement import random_prompt

#: Tokens of a prompt that one forward of an attention-DP group takes.
CHUNK = 32
#: Tokens that are generated, at least, for each request: the prefill's, and 16 decode steps'.
STEPS = 17

_FIRST, _SECOND, _SHARED, _LONG, _CAPTURED = 37, 75, 64, 130, 30
#: Pipeline stages take turns with as many batches, and a chunk mixes with those of its own turn. So
#: many stages see a mixed batch, whatever arrives first: the long prompt's chunks go round twice.
MIXING_STAGES = -(-_LONG // CHUNK) - 2
#: Tokens that the longest request puts into the context.
LONGEST = _LONG + STEPS + 4
#: Token ids below this one are special in a vocabulary.
RESERVED = 8


@dataclass(frozen=True, slots=True)
class Request:
    """One request. group: the attention-DP group that computes it, counted from 0.

    hidden: whether the outputs of the captured layers are wanted, for each token of the prompt.
    cached: how many tokens of its prompt the radix cache has to hold; None where it is not asked.
    logprobs: whether every distribution is wanted. from_start: the prompt's own distributions too,
    which prevents a radix hit.
    """

    name: str
    prompt: tuple[int, ...]
    steps: int
    group: int = 0
    cached: int | None = None
    logprobs: bool = True
    from_start: bool = False
    hidden: bool = False

    def arguments(self, vocabulary: int, groups: int) -> dict[str, Any]:
        """SGLang's arguments for this request."""
        wanted = {
            "return_logprob": True,
            "top_logprobs_num": vocabulary,
            "logprob_start_len": 0 if self.from_start else -1,
        }
        return {
            "input_ids": list(self.prompt),
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": self.steps,
                "ignore_eos": True,
            },
            "routed_dp_rank": self.group if groups > 1 else None,
            "return_hidden_states": self.hidden,
            **(wanted if self.logprobs else {}),
        }


@dataclass(frozen=True, slots=True)
class Step:
    """Requests that are sent at once."""

    name: str
    requests: tuple[Request, ...]


def plan(vocabulary: int, groups: int, seed: int = 0, *, capture: bool = True) -> tuple[Step, ...]:
    """The steps for a model with this vocabulary over this many attention-DP groups.

    The prompts do not depend on `groups`. capture: whether the last step is among them; SGLang
    cannot return hidden states from a pipeline.
    """
    if vocabulary <= RESERVED:
        raise MinimaxError(
            f"config: vocab_size is {vocabulary}, but prompts are drawn from token {RESERVED} on; "
            f"use more than {RESERVED}."
        )

    def prompt(length: int, number: int) -> tuple[int, ...]:
        return tuple(random_prompt(length, vocabulary, seed=1000 * seed + number))

    first, second, long = prompt(_FIRST, 1), prompt(_SECOND, 2), prompt(_LONG, 3)
    branch = second[:_SHARED] + prompt(6, 4)
    last = groups - 1
    steps = (
        Step("first", (Request("first", first, STEPS, from_start=True),)),
        Step("second", (Request("second", second, STEPS, group=last),)),
        Step(
            "mixed",
            (
                Request("short", prompt(3, 5), 8, group=last, logprobs=False),
                Request("long", long, 4, group=last, logprobs=False),
            ),
        ),
        Step(
            "batch",
            (
                Request("first again", first, STEPS + 4, cached=_FIRST - 1),
                Request("new", prompt(20, 6), STEPS),
                Request("second again", second, STEPS, group=last, cached=_SECOND - 1),
                Request("long again", long, STEPS, group=last, cached=_LONG - 1),
                Request("branch of second", branch, STEPS + 1, group=last, cached=_SHARED),
                Request("one token", prompt(1, 7), STEPS + 4, group=last),
            ),
        ),
    )
    if not capture:
        return steps
    wanted = Request("captured", prompt(_CAPTURED, 8), 1, group=last, logprobs=False, hidden=True)
    return (*steps, Step("captured", (wanted,)))
