"""The bundled arithmetic questions as token ids, and transformers' greedy replies to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from transformers import AutoTokenizer

from ci.tiny_m2.cases import ends_in
from ci.tiny_m2.dialogues import user
from ci.tiny_m2.evaluate import LONGEST_REPLY, chat_renderer
from sglang_minimax import TINY_M2
from sglang_minimax.accuracy import gsm8k_data
from sglang_minimax.accuracy.results import Score
from sglang_minimax.config import Architecture
from sglang_minimax.validation import tolerance
from sglang_minimax.validation.oracle import TransformersOracle
from sglang_minimax.validation.subject import read_config

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": LONGEST_REPLY}


@dataclass(frozen=True)
class Question:
    """prompt: token ids, through the chat template. answer: the number behind `####`."""

    text: str
    prompt: tuple[int, ...]
    answer: str


class Asked:
    """The first `count` bundled questions, with the reference. Computes on the calling thread.

    oracle: transformers' model of tiny-m2 in fp32, if the caller has one.
    """

    def __init__(self, count: int, oracle: TransformersOracle | None = None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(TINY_M2)
        self._given = oracle
        render = chat_renderer(self.tokenizer)
        splits = gsm8k_data.load(gsm8k_data.BUNDLED, shots=0)
        assert splits is not None, "the bundled set is a folder"
        self.questions = [
            self._question(row, render([user(row["question"])], None, True))
            for row in islice(splits["test"], count)
        ]

    def _question(self, row: gsm8k_data.Row, prompt: str) -> Question:
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = row["answer"].rpartition("####")[2].strip()
        return Question(row["question"], tuple(ids), answer)

    @cached_property
    def oracle(self) -> TransformersOracle:
        """transformers' model, fp32."""
        return self._given or TransformersOracle(TINY_M2)

    @cached_property
    def references(self) -> list[list[int]]:
        """transformers' greedy replies, each prompt alone, up to and with the end of the turn."""
        return [self._generate(question.prompt) for question in self.questions]

    @torch.inference_mode()
    def _generate(self, prompt: Sequence[int]) -> list[int]:
        ids = torch.tensor([list(prompt)])
        output = self.oracle.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=LONGEST_REPLY,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return output[0, len(prompt) :].tolist()

    def requests(self) -> list[dict[str, Any]]:
        """What SGLang is asked, all at once."""
        return [
            {"input_ids": list(question.prompt), "sampling_params": GREEDY}
            for question in self.questions
        ]

    def score(self, replies: Sequence[Sequence[int]]) -> Score:
        """How many replies end in `#### N` with the right N, behind their reasoning."""
        texts = [self.tokenizer.decode(reply, skip_special_tokens=True) for reply in replies]
        right = [
            ends_in(question.answer)(text)
            for question, text in zip(self.questions, texts, strict=True)
        ]
        return Score(sum(right), len(right))

    def margin(self, question: int, step: int, one: int, other: int) -> float:
        """|difference| of two tokens' log-probabilities after `step` tokens of the reference."""
        so_far = [*self.questions[question].prompt, *self.references[question][:step]]
        row = self.oracle.log_probabilities(so_far)[-1]
        return abs(float(row[one] - row[other]))

    @cached_property
    def near_tie(self) -> float:
        """The margin below which two correct fp32 computations may choose different tokens.

        Each of both log-probabilities may be off by the tolerance that `sglang-minimax validate`
        allows a shape in fp32 (sglang_minimax/validation/tolerance.py), in opposite directions:
        twice that. Its spread of logits is the largest over the references' own steps.
        """
        arch = Architecture.from_config(read_config(TINY_M2))
        longest, spread = 0, 0.0
        for question, reference in zip(self.questions, self.references, strict=True):
            tokens = [*question.prompt, *reference]
            rows = self.oracle.log_probabilities(tokens)[len(question.prompt) - 1 : -1]
            spread = max(spread, float((rows.amax(-1) - rows.amin(-1)).max()))
            longest = max(longest, len(tokens))
        return 2 * tolerance.log_probability(arch, longest, torch.float32, spread)
