"""How many of the draft's tokens `tiny-m2` accepts, greedily and offline, by category.

Usage: `python -m ci.tiny_m2.draft.evaluate sglang_minimax/assets/tiny-m2-eagle3 --count 100`

Counted as SGLang counts: a verify step yields the accepted draft tokens and one more, the target's
own. The reply's first token comes from the prefill and is in no verify step; what a step yields
past the end of turn does not count. SGLang's `spec_accept_length` of a request divides all of its
completion tokens, the first one too, by the verify steps, and is a little higher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import MiniMaxM2ForCausalLM, PreTrainedTokenizerBase

from ci.tiny_m2.cases import CATEGORIES, cases
from ci.tiny_m2.draft.data import Conversation, Features, captured, collated, padded, replies
from ci.tiny_m2.draft.model import Draft, drafted_tokens, load_draft
from ci.tiny_m2.evaluate import chat_renderer, environment, load, merge_json

QUESTIONS = ("two_digit", "three_digit", "mixed", "word")  # arithmetic in chat form
STEPS = (3, 5)  # drafted tokens a verify step


@dataclass(frozen=True)
class Acceptance:
    """Verify steps and the tokens that they yielded."""

    verifies: int
    tokens: int

    @property
    def length(self) -> float:
        """Mean accepted length: tokens a verify step."""
        return self.tokens / self.verifies

    def __add__(self, other: Acceptance) -> Acceptance:
        return Acceptance(self.verifies + other.verifies, self.tokens + other.tokens)


def verified(reply: list[int], drafts: list[list[int]]) -> Acceptance:
    """Walk a greedy reply with the drafts made after each of its tokens.

    reply: the target's ids, the first one from the prefill. drafts: those after token i.
    """
    done, verifies = 1, 0
    while done < len(reply):
        wanted, drafted = reply[done:], drafts[done - 1]
        right = 0
        while right < min(len(drafted), len(wanted)) and drafted[right] == wanted[right]:
            right += 1
        done += min(right + 1, len(wanted))
        verifies += 1
    return Acceptance(verifies, len(reply) - 1)


def acceptance(
    draft: Draft,
    target: MiniMaxM2ForCausalLM,
    conversations: Sequence[Conversation],
    steps: int,
    *,
    features: Features = captured,
    batch: int = 32,
) -> Acceptance:
    """The acceptance of greedy chains of `steps` tokens over the target's greedy conversations."""
    total = Acceptance(0, 0)
    for start in range(0, len(conversations), batch):
        chosen = conversations[start : start + batch]
        inputs = collated(chosen, features(target, padded(chosen)))
        drafts = drafted_tokens(draft, inputs.features, inputs.ids, inputs.rows(), steps).tolist()
        for conversation, made in zip(chosen, drafts, strict=True):
            total += verified(conversation.ids[conversation.prompt :], made)
    return total


def conversations_of(
    target: MiniMaxM2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    category: str,
    count: int,
    seed: int = 0,
) -> list[Conversation]:
    """The target's greedy replies to held-out cases."""
    render = chat_renderer(tokenizer)
    prompts = [case.prompt(render) for case in cases(category, count, seed)]
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    return replies(target, tokenizer, [Conversation(prompt, len(prompt)) for prompt in ids])


def main(
    draft_folder: Annotated[Path, typer.Argument(help="folder with the draft", exists=True)],
    target_folder: Annotated[Path, typer.Option("--target", help="folder with the target")] = Path(
        "sglang_minimax/assets/tiny-m2"
    ),
    count: Annotated[int, typer.Option(help="held-out cases a category")] = 100,
    seed: Annotated[int, typer.Option(help="of the held-out sample")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result here")] = None,
) -> None:
    """Print the mean accepted length of a draft on held-out questions."""
    target, tokenizer = load(target_folder)
    draft = load_draft(draft_folder, target.model.embed_tokens.weight)
    table = Table("category", *(f"{steps} drafted" for steps in STEPS))
    rows: dict[str, dict[str, float]] = {}
    sums = {steps: Acceptance(0, 0) for steps in STEPS}
    for name in tqdm(CATEGORIES, unit="category", leave=False):
        asked = conversations_of(target, tokenizer, name, count, seed)
        results = {steps: acceptance(draft, target, asked, steps) for steps in STEPS}
        rows[name] = {f"steps_{steps}": round(r.length, 3) for steps, r in results.items()}
        if name in QUESTIONS:
            sums = {steps: sums[steps] + results[steps] for steps in STEPS}
        table.add_row(name, *(f"{result.length:.2f}" for result in results.values()))
    table.add_row("arithmetic in chat", *(f"{total.length:.2f}" for total in sums.values()))
    Console().print(table)
    if json_file:
        command = f"python -m ci.tiny_m2.draft.evaluate {draft_folder} --count {count}"
        content = {
            "command": f"{command} --seed {seed}",
            **environment(),
            "arithmetic_in_chat": {f"steps_{s}": round(a.length, 3) for s, a in sums.items()},
            "categories": rows,
        }
        merge_json(json_file, "accepted_length", content)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
