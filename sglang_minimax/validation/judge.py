"""Compare the replies of a shape with transformers, and requests in a batch with those alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sglang_minimax.validation import tolerance
from sglang_minimax.validation.agreement import table
from sglang_minimax.validation.subject import Subject
from sglang_minimax.validation.workloads import LONGEST, Request, Step

#: Share of the distributions that may be set aside because routing was a near tie.
NEAR_TIES = 0.05


@dataclass(slots=True)
class Verdict:
    """What comparing found.

    max_error: the largest difference of a log-probability, over all compared distributions and the
    whole vocabulary, near ties left out. tolerance: what it may be. batch_difference: the same
    between a request in a batch and alone. distributions: compared. near_ties: distributions beyond
    the tolerance after the router had to choose between scores closer than rounding.
    """

    max_error: float = 0.0
    tolerance: float = 0.0
    batch_difference: float = 0.0
    tokens_equal: bool = True
    distributions: int = 0
    near_ties: int = 0
    shortcomings: list[str] = field(default_factory=list)


def judge(
    subject: Subject,
    replies: Iterable[tuple[Step, Sequence[dict[str, Any]]]],
    dtype: torch.dtype,
    captured: Sequence[int] = (),
) -> Verdict:
    """Judge every reply, given in the order of the plan.

    captured: the layers whose outputs are in the replies that were asked for them.
    """
    answers = [
        Answer(step.name, request, reply, subject)
        for step, several in replies
        for request, reply in zip(step.requests, several, strict=True)
    ]
    spread = max((answer.spread for answer in answers), default=0.0)
    verdict = Verdict(
        tolerance=tolerance.log_probability(subject.arch, LONGEST, dtype, spread),
    )
    margin = tolerance.routing_margin(subject.arch, LONGEST, dtype)
    for answer in answers:
        _against_the_oracle(answer, verdict, margin)
    for answer in answers:
        for other in answers:
            if answer.is_repeated_by(other):
                _against_itself(answer, other, verdict)
    for answer in answers:
        if answer.request.hidden:
            verdict.shortcomings += _captured(answer, subject, captured, dtype)
    if verdict.near_ties > NEAR_TIES * verdict.distributions:
        verdict.shortcomings.append(
            f"{verdict.near_ties} of {verdict.distributions} distributions differ after a near tie "
            "in routing: too many to set aside; use a model with fewer layers or experts, or "
            "another seed of weights"
        )
    return verdict


class Answer:
    """One reply, with the oracle's distributions for the same tokens.

    expected: [distributions, vocabulary] log-probabilities, of the prompt too where it was asked
    for; found: the same, or none where they were not. first: the position in prompt + tokens after
    which the first of them stands.
    """

    def __init__(
        self, step: str, request: Request, reply: dict[str, Any], subject: Subject
    ) -> None:
        self.step, self.request = step, request
        self.tokens: list[int] = list(reply["output_ids"])
        info = reply["meta_info"]
        self.cached: int = info["cached_tokens"]
        self.hidden = info["hidden_states"][0] if request.hidden else []
        vocabulary = subject.arch.vocab_size
        steps = info["output_top_logprobs"] if request.logprobs else []
        found = [table(steps, vocabulary)]
        self.first = len(request.prompt) - 1
        if request.from_start:
            # The first token has no distribution before it.
            found.insert(0, table(info["input_top_logprobs"][1:], vocabulary))
            self.first = 0
        self.found = torch.cat(found)
        everything = (*request.prompt, *self.tokens)
        window = slice(self.first, len(everything) - 1)
        self.expected = subject.log_probabilities(everything)[window]
        self.margins = subject.routing_margins(everything).cummin(0).values[window]
        self.spread = float((self.expected.amax(-1) - self.expected.amin(-1)).max())

    def __str__(self) -> str:
        return f"request {self.request.name!r} of step {self.step!r}"

    def is_repeated_by(self, other: Answer) -> bool:
        """Whether `other` is the same prompt, asked again in a batch."""
        return other.request.name == f"{self.request.name} again"


def _against_the_oracle(answer: Answer, verdict: Verdict, margin: float) -> None:
    if not answer.request.logprobs:
        _tokens(answer, verdict, answer.margins < margin)
        return
    if answer.found.shape != answer.expected.shape:
        verdict.shortcomings.append(
            f"{answer} answered {len(answer.found)} distributions, not {len(answer.expected)}"
        )
        verdict.tokens_equal = False
        return
    # NaN where a token's log-probability is missing: not below any tolerance.
    errors = (answer.found - answer.expected).abs().amax(-1)
    beyond = ~(errors <= verdict.tolerance)
    tied = beyond & (answer.margins < margin)
    judged = errors[~tied]
    verdict.distributions += len(errors)
    verdict.near_ties += int(tied.sum())
    worst = float(judged.max()) if len(judged) else 0.0
    verdict.max_error = max(verdict.max_error, worst) if worst == worst else worst
    if bool((beyond & ~tied).any()):
        where = answer.first + 1 + int((beyond & ~tied).nonzero()[0])
        verdict.shortcomings.append(
            f"{answer} is off by {worst:.2g}, more than {verdict.tolerance:.2g}, from token "
            f"{where} on (its prompt has {len(answer.request.prompt)})"
        )
    _tokens(answer, verdict, tied)
    wanted = answer.request.cached
    if wanted is not None and answer.cached != wanted:
        verdict.shortcomings.append(
            f"{answer} found {answer.cached} tokens in the radix cache, not {wanted}"
        )


def _captured(
    answer: Answer, subject: Subject, layers: Sequence[int], dtype: torch.dtype
) -> Iterator[str]:
    """The prompt's residual stream behind each of `layers`, in their order."""
    arch = subject.arch
    found = torch.tensor(answer.hidden)  # [tokens, len(layers) * hidden]
    if found.shape != (len(answer.request.prompt), len(layers) * arch.hidden_size):
        yield (
            f"{answer} captured {list(found.shape)} numbers instead of the outputs of layers "
            f"{list(layers)}, {arch.hidden_size} each"
        )
        return
    expected = subject.layer_outputs(answer.request.prompt)
    relative = tolerance.relative_error(arch, len(answer.request.prompt), dtype)
    for layer, part in zip(layers, found.split(arch.hidden_size, dim=-1), strict=True):
        error = float((part - expected[layer]).abs().max())
        allowed = relative * float(expected[layer].abs().max())
        if not error <= allowed:
            yield (
                f"{answer}: what was captured of layer {layer} is off by {error:.2g}, more than "
                f"{allowed:.2g}"
            )


def _tokens(answer: Answer, verdict: Verdict, tied: torch.Tensor) -> None:
    """Each token must be the oracle's most likely one, or as likely as rounding can tell."""
    if len(answer.tokens) != answer.request.steps:
        verdict.tokens_equal = False
        verdict.shortcomings.append(
            f"{answer} has {len(answer.tokens)} tokens, not {answer.request.steps}"
        )
        return
    rows = answer.expected[-len(answer.tokens) :]
    chosen = rows.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    behind = rows.amax(-1) - chosen
    wrong = behind > 2 * verdict.tolerance
    waived = wrong & tied[-len(answer.tokens) :]
    if not answer.request.logprobs:
        verdict.near_ties += int(waived.sum())
    wrong &= ~waived
    if bool(wrong.any()):
        verdict.tokens_equal = False
        at = int(wrong.nonzero()[0])
        verdict.shortcomings.append(
            f"{answer}: token {at} is {answer.tokens[at]}, but transformers finds "
            f"{int(rows[at].argmax())} likelier by {float(behind[at]):.2g}"
        )


def _against_itself(alone: Answer, batched: Answer, verdict: Verdict) -> None:
    """A request in a batch: the same tokens, and log-probabilities within both tolerances."""
    steps = min(len(alone.tokens), len(batched.tokens))
    if alone.tokens[:steps] != batched.tokens[:steps]:
        verdict.tokens_equal = False
        verdict.shortcomings.append(f"{batched} has other tokens than alone")
        return
    if not alone.request.logprobs:
        return
    # Behind the prompt's own distributions, where there are any.
    found = alone.found[-len(alone.tokens) :]
    differences = (found[:steps] - batched.found[:steps]).abs()
    worst = float(differences.max())
    verdict.batch_difference = max(verdict.batch_difference, worst)
    if not worst <= 2 * verdict.tolerance:
        verdict.shortcomings.append(
            f"{batched} differs from itself alone by {worst:.2g}, more than "
            f"{2 * verdict.tolerance:.2g}"
        )
