"""Train the Eagle3 draft on `tiny-m2`'s own replies: seeded, resumable, minutes on one core.

Usage: `python -m ci.tiny_m2.draft.train --out sglang_minimax/assets/tiny-m2-eagle3`

The target runs once, to reply and to compute the features that the draft reads; both lie in
`--work`. The draft is then unrolled as it will be used: every step after the first reads its own
hidden state and its own keys (the training-time test of EAGLE-3, https://arxiv.org/abs/2503.01840).
A run that stops continues from its last save (`ci/tiny_m2/training.py`).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import MiniMaxM2ForCausalLM, PreTrainedTokenizerBase

from ci.tiny_m2 import training
from ci.tiny_m2.draft.data import Batch, Corpus, own_replies, training_conversations
from ci.tiny_m2.draft.evaluate import STEPS, acceptance, conversations_of
from ci.tiny_m2.draft.model import (
    DRAFT_VOCAB_SIZE,
    Draft,
    published_config,
    save_draft,
)
from ci.tiny_m2.evaluate import load
from sglang_minimax.drafts.config import FINGERPRINT_KEY, OWN_KEY
from sglang_minimax.drafts.fingerprint import fingerprint
from sglang_minimax.drafts.judgement import draft_config


@dataclass(frozen=True)
class Recipe(training.Recipe):
    """Everything that decides the result, apart from the target and the mixture."""

    steps: int = 900
    warmup: int = 50
    samples: int = 8000  # of the mixture; each has one reply or two
    sampled: float = 0.25  # share of the replies drawn at `temperature`; the others are greedy
    temperature: float = 1.0
    batch: int = 24  # conversations a step
    unroll: int = 5  # draft steps
    fade: float = 0.8  # weight of a draft step relative to the one before


def made_corpus(
    recipe: Recipe, target: MiniMaxM2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> Corpus:
    """The target's replies to training prompts, and its features for them."""
    asked = list(training_conversations(tokenizer, recipe.samples, recipe.seed))
    random.Random(recipe.seed).shuffle(asked)
    torch.manual_seed(recipe.seed)
    cut = round(len(asked) * recipe.sampled)
    drawn = own_replies(target, tokenizer, asked[:cut], recipe.temperature, progress=True)
    return Corpus.of(drawn + own_replies(target, tokenizer, asked[cut:], progress=True))


def initial_draft(
    recipe: Recipe, config: dict[str, Any], target: MiniMaxM2ForCausalLM, words: Tensor
) -> Draft:
    """Random but for the ends: `fc` passes the last residual on, norm and head are the target's.

    words: [draft_vocab] int64, the target ids that the draft can say.
    """
    torch.manual_seed(recipe.seed)
    draft = Draft(config, target.model.embed_tokens.weight)
    draft.set_vocabulary(words)
    hidden = config["hidden_size"]
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if parameter.dim() > 1:
                scale = 0.3 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                parameter.normal_(0, scale / math.sqrt(parameter.shape[1]))
        draft.fc.weight.mul_(0.1)
        draft.fc.weight[:, -hidden:] += torch.eye(hidden)
        draft.norm.weight.copy_(target.model.norm.weight)
        draft.lm_head.weight.copy_(target.lm_head.weight[draft.t2d])
    return draft


class Teacher(nn.Module):
    """The target's next-token distribution over the draft's words, from its last residual."""

    def __init__(self, target: MiniMaxM2ForCausalLM, draft: Draft) -> None:
        super().__init__()
        self.norm = target.model.norm
        self.register_buffer("head", target.lm_head.weight.detach()[draft.t2d])

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """[..., ids * hidden] -> [..., draft_vocab] probabilities."""
        last = features[..., -self.head.shape[1] :]
        return (self.norm(last) @ self.head.T).softmax(-1)


def unrolled_loss(draft: Draft, teacher: Teacher, batch: Batch, recipe: Recipe) -> Tensor:
    """Cross-entropy against the target's distribution, over the unrolled steps, fading.

    Step k of the chain at row i has read tokens i + 1 to i + 1 + k of the conversation and is to
    say what the target says at position i + 1 + k.
    """
    rows, last = batch.rows(), batch.lengths[:, None] - 2
    tokens = batch.ids[:, 1:]
    chain = draft.start(batch.features[:, :-1], tokens, rows)
    total, weights = torch.zeros(()), 0.0
    for k in range(recipe.unroll):
        if k:
            chain = draft.step(chain, tokens.gather(1, (rows + k).clamp(max=tokens.shape[1] - 1)))
        at = batch.prompts[:, None] + k + torch.arange(rows.shape[1])  # where the target speaks
        kept = at <= last
        if not kept.any():
            break
        index = kept.nonzero(as_tuple=True)[0], at[kept]
        said = torch.log_softmax(draft.lm_head(draft.norm(chain.hidden[kept])), -1)
        loss = -(teacher(batch.features[index]) * said).sum(-1).mean()
        total, weights = total + recipe.fade**k * loss, weights + recipe.fade**k
    return total / weights


class Run(training.TrainingRun):
    """The run of a draft."""

    def __init__(self, recipe: Recipe, target_folder: Path, work: Path) -> None:
        self.recipe = recipe
        self.target, self.tokenizer = load(target_folder)
        self.target.set_experts_implementation("grouped_mm")  # the fastest on a CPU
        self.target.requires_grad_(False)
        corpus_file = work / f"corpus-{recipe.seed}-{recipe.samples}.pt"
        if not corpus_file.exists():
            work.mkdir(parents=True, exist_ok=True)
            made_corpus(recipe, self.target, self.tokenizer).save(corpus_file)
        self.corpus = Corpus.load(corpus_file)
        self.config = published_config(draft_config(target_folder))
        self.config[OWN_KEY] = {FINGERPRINT_KEY: fingerprint(target_folder)}
        words = self.corpus.most_frequent(DRAFT_VOCAB_SIZE, self.config["vocab_size"])
        self.draft = initial_draft(recipe, self.config, self.target, words)
        super().__init__(recipe, self.draft, work)
        self.teacher = Teacher(self.target, self.draft)
        self.order: tuple[int, list[list[int]]] = (-1, [])
        self.probed = {
            name: conversations_of(self.target, self.tokenizer, name, 24, seed=99)
            for name in ("two_digit", "three_digit", "word", "few_shot", "tool_call")
        }

    def batch(self) -> Batch:
        """The batch of this step; like lengths together, in an order drawn anew each epoch."""
        count, size = len(self.corpus.conversations), self.recipe.batch
        epoch, index = divmod(self.step, count // size)
        if epoch != self.order[0]:
            rng = random.Random(f"{self.recipe.seed}/{epoch}")
            # The corpus is sorted by length; a jitter mixes neighbours, and the rest drops out.
            jittered = sorted(range(count), key=lambda i: i + rng.uniform(0, 16 * size))
            batches = [jittered[i : i + size] for i in range(0, count - size + 1, size)]
            rng.shuffle(batches)
            self.order = epoch, batches
        return self.corpus.batch(self.order[1][index])

    def backward(self) -> float:
        """The unrolled loss of a batch."""
        loss = unrolled_loss(self.draft, self.teacher, self.batch(), self.recipe)
        loss.backward()
        return loss.item()

    def probe(self) -> str:
        """Accepted lengths on a few held-out cases."""
        return " ".join(
            f"{name} "
            + "/".join(
                f"{acceptance(self.draft, self.target, conversations, steps).length:.2f}"
                for steps in STEPS
            )
            for name, conversations in self.probed.items()
        )


def main(
    out: Annotated[Path, typer.Option(help="checkpoint folder to write")],
    target: Annotated[Path, typer.Option(help="folder with the target", exists=True)] = Path(
        "sglang_minimax/assets/tiny-m2"
    ),
    work: Annotated[Path, typer.Option(help="folder for the run's state")] = Path(
        "build/tiny-m2-eagle3"
    ),
    samples: Annotated[int, typer.Option(help="of the training mixture")] = Recipe.samples,
    steps: Annotated[int, typer.Option(help="optimizer steps")] = Recipe.steps,
    seed: Annotated[int, typer.Option(help="of weights and data")] = Recipe.seed,
    learning_rate: Annotated[float, typer.Option(help="peak rate")] = Recipe.learning_rate,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    save_every: Annotated[int, typer.Option(help="steps between saves")] = 100,
    probe_every: Annotated[int, typer.Option(help="steps between probes")] = 250,
) -> None:
    """Train, save the state as it goes, and write the checkpoint at the end."""
    torch.set_num_threads(threads)
    recipe = Recipe(seed=seed, samples=samples, steps=steps, learning_rate=learning_rate)
    run = Run(recipe, target, work)
    run.finish(save_every, probe_every)
    save_draft(run.draft, run.config, out)


if __name__ == "__main__":
    typer.run(main)
