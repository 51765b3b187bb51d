"""What a request asks for and cannot have, answered with status 400.

Numbers outside the vocabulary end SGLang's scheduler. Options that its verification of drafted
tokens leaves out, or applies to some tokens only, change what is generated without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from sglang_minimax import ARCHITECTURE

Validate = Callable[..., None]
Sampling = Mapping[str, Any]

# Sampling options that change with a draft -> the value that asks for nothing. SGLang's
# eagle_sample never reads min_p, and its penalties count one token of each verified step
# (schedule_batch.cumulate_penalty_output_tokens).
INEXACT_WITH_DRAFT = {
    "min_p": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "min_new_tokens": 0,
}
# What OpenAI's API calls some of them.
ALSO_CALLED = {"min_new_tokens": "min_tokens"}


def refuse_impossible_numbers(original: Validate) -> Validate:
    """Wrap `TokenizerManager._validate_one_request(obj, input_ids)`.

    Every request passes here, each of a batch by itself, before it is sent to the scheduler. A
    ValueError becomes an answer with status 400.
    """

    @functools.wraps(original)
    def _validate_one_request(self: Any, obj: Any, input_ids: list[int] | None) -> None:
        original(self, obj, input_ids)
        config = self.model_config
        if ARCHITECTURE in (getattr(config.hf_config, "architectures", None) or ()):
            # As SGLang's _create_tokenized_object has it, which comes later.
            sampling = {**(self.preferred_sampling_params or {}), **(obj.sampling_params or {})}
            check_numbers(obj, sampling, input_ids, config.vocab_size)
            if algorithm := self.server_args.speculative_algorithm:
                check_with_draft(obj, sampling, algorithm)

    return _validate_one_request


def check_numbers(
    obj: Any, sampling: Sampling, input_ids: list[int] | None, vocab_size: int
) -> None:
    """Raise ValueError with one sentence for a number that the model cannot serve.

    obj: one `GenerateReqInput` (or `EmbeddingReqInput`, which has no log probabilities). sampling:
    its options, and those of --preferred-sampling-params that it leaves open.
    """
    if input_ids:
        for token in (min(input_ids), max(input_ids)):
            _check_token("the prompt", token, vocab_size)
    top = getattr(obj, "top_logprobs_num", None) or 0
    if not 0 <= top <= vocab_size:
        raise ValueError(
            f"The number of top logprobs must be from 0 to {vocab_size} (the size of the "
            f"vocabulary), but it is {top}."
        )
    choices = sampling.get("n")
    if choices is not None and choices < 1:
        raise ValueError(f"n must be at least 1, but it is {choices}.")
    stops = sampling.get("stop_token_ids")
    # Only a minimum length makes the sampler use them as indices.
    if sampling.get("min_new_tokens") and isinstance(stops, (list, tuple, set)):
        for token in stops:
            if token is not None:
                _check_token("stop_token_ids", int(token), vocab_size)


def check_with_draft(obj: Any, sampling: Sampling, algorithm: str) -> None:
    """Raise ValueError for an option that would not mean with a draft what it means without.

    obj, sampling: as of `check_numbers`. algorithm: --speculative-algorithm, for the sentence.
    """
    for name, nothing in INEXACT_WITH_DRAFT.items():
        value = sampling.get(name)
        if value is not None and value != nothing:
            called = f"{name} ({ALSO_CALLED[name]})" if name in ALSO_CALLED else name
            raise ValueError(
                f"{called} {value} is not exact with drafted tokens; send {name} {nothing}, or "
                f"ask a server that was started without --speculative-algorithm {algorithm}."
            )
    if getattr(obj, "custom_logit_processor", None):
        raise ValueError(
            "custom_logit_processor is not applied to drafted tokens; leave it out, or ask a "
            f"server that was started without --speculative-algorithm {algorithm}."
        )


def _check_token(where: str, token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise ValueError(
            f"Token {token} of {where} is outside the vocabulary, which is from 0 to "
            f"{vocab_size - 1}."
        )
