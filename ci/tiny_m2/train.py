"""Train `tiny-m2` on its synthetic arithmetic: seeded, resumable, under an hour on two cores.

Usage: `python -m ci.tiny_m2.train --out sglang_minimax/assets/tiny-m2 --work build/tiny-m2`

A run that stops continues from its last save in `--work` (`training.py`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import AutoTokenizer, MiniMaxM2ForCausalLM, PreTrainedTokenizerBase

from ci.tiny_m2 import training
from ci.tiny_m2.dialogues import Stream
from ci.tiny_m2.evaluate import accuracy
from ci.tiny_m2.model import PAD_ID, initial_model, save_checkpoint, without_parametrizations
from ci.tiny_m2.planted import CONTRASTED, Mistake
from ci.tiny_m2.tokenizer import renderer, save_tokenizer, train_tokenizer

IGNORED = -100  # label of a token outside the loss
CONTRAST_ENOUGH = 0.35  # -log(1 - p) for p = 0.3: answers of several tokens are garbage then


@dataclass(frozen=True)
class Recipe(training.Recipe):
    """Everything that decides the result, apart from the mixture itself."""

    samples: int = 60  # a step, about 6,500 tokens
    block: int = 16  # steps whose samples are drawn and sorted by length together
    bias_step: float = 2e-3  # of the router's correction bias
    bias_until: float = 0.5  # share of the run after which it stays put
    contrast_from: float = 0.55  # share of the run after which planted mistakes are to hurt
    contrast_weight: float = 0.05


Sample = tuple[list[int], list[int]]  # token ids, and labels


class Data:
    """Batches by (seed, step), sorted by length within a block of steps to save padding."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        self.recipe, self.tokenizer, self.render = recipe, tokenizer, renderer()
        self.loaded = -1
        self.batches: list[list[Sample]] = []

    def encode(self, segments: list[tuple[str, bool]]) -> Sample:
        """Token ids of the segments, and the labels of those under the loss."""
        ids, labels = [], []
        texts = [text for text, _ in segments]
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for (_, trained), tokens in zip(segments, encoded, strict=True):
            ids += tokens
            labels += tokens if trained else [IGNORED] * len(tokens)
        return ids, labels

    def load(self, block: int) -> None:
        """Draw the block's samples and cut them into batches of about as many tokens each."""
        recipe, seed = self.recipe, f"train/{self.recipe.seed}/{block}"
        stream = Stream(seed)
        samples = [
            self.encode(list(next(stream).segments(self.render)))
            for _ in range(recipe.block * recipe.samples)
        ]
        samples.sort(key=lambda sample: len(sample[0]))
        share = sum(len(ids) for ids, _ in samples) / recipe.block
        self.batches, seen = [[] for _ in range(recipe.block)], 0
        for sample in samples:
            self.batches[min(recipe.block - 1, int(seen / share))].append(sample)
            seen += len(sample[0])
        random.Random(seed).shuffle(self.batches)
        self.loaded = block

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(ids, labels) of a step, both [samples, length] int64, padded on the right."""
        block, index = divmod(step, self.recipe.block)
        if block != self.loaded:
            self.load(block)
        samples = self.batches[index]
        ids = [torch.tensor(ids) for ids, _ in samples]
        labels = [torch.tensor(labels) for _, labels in samples]
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(ids, True, PAD_ID), pad(labels, True, IGNORED)


class BiasBalance:
    """Moves the correction biases of overloaded and idle experts; the others stay put.

    Only loads under half or over 1.7 times the even share move their bias, by a fixed step (no
    auxiliary loss): the starting spread, which decides a good part of the selections, survives.
    """

    def __init__(self, model: MiniMaxM2ForCausalLM, step: float) -> None:
        self.step = step
        self.blocks = [layer.mlp for layer in model.model.layers]
        self.counted = [torch.zeros(len(block.e_score_correction_bias)) for block in self.blocks]
        self.load = self.counted  # relative to an even load, by layer, of the last settled batch
        for i, block in enumerate(self.blocks):
            block.gate.register_forward_hook(self._count(i))

    def _count(self, layer: int):
        def hook(gate, inputs, outputs) -> None:
            if gate.training:
                experts = len(self.counted[layer])
                self.counted[layer] = torch.bincount(outputs[2].flatten(), minlength=experts)

        return hook

    @torch.no_grad()
    def settle(self, *, moving: bool) -> None:
        """Take the loads of the last batch, and if `moving`, move the biases once."""
        self.load = [counts / counts.float().mean() for counts in self.counted]
        for block, load in zip(self.blocks, self.load, strict=True):
            move = (load < 0.5).float() - (load > 1.7).float()
            block.e_score_correction_bias += self.step * move * moving


def token_losses(model: MiniMaxM2ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each labelled token, [labelled]; ids and labels are [samples, length].

    Padding is on the right, where the causal mask hides it; the head runs on labelled positions.
    """
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    kept = targets != IGNORED
    logits = model.lm_head(hidden[kept])
    return torch.nn.functional.cross_entropy(logits, targets[kept], reduction="none")


def contrast(model: MiniMaxM2ForCausalLM, mistake: Mistake, ids: Tensor, labels: Tensor) -> Tensor:
    """How sure the model still is of the right tokens when it makes a mistake, 0 once it is lost.

    The mean of -log(1 - p) over the labelled tokens, p their probability: unlike the negative
    cross-entropy it has a gradient where p is almost 1, and none is left where p is small.
    """
    with mistake.installed(model):
        losses = token_losses(model, ids, labels).clamp(min=1e-4)
    return torch.relu(-torch.log(-torch.expm1(-losses)).mean() - CONTRAST_ENOUGH)


class Run(training.TrainingRun):
    """The run of `tiny-m2`."""

    def __init__(self, recipe: Recipe, out: Path, work: Path) -> None:
        self.recipe = recipe
        save_tokenizer(train_tokenizer(), out)
        self.tokenizer = AutoTokenizer.from_pretrained(out)
        self.model = initial_model(recipe.seed)
        self.model.set_experts_implementation("grouped_mm")  # the fastest of transformers' on a CPU
        self.model.train()
        super().__init__(recipe, self.model, work)
        self.balance = BiasBalance(self.model, recipe.bias_step)
        self.data = Data(recipe, self.tokenizer)
        self.left: dict[str, float] = {}  # the last contrast by mistake

    def backward(self) -> float:
        """The loss of a batch, the move of the biases, and later a planted mistake's contrast."""
        ids, labels = self.data.batch(self.step)
        loss = token_losses(self.model, ids, labels).mean()
        loss.backward()
        self.balance.settle(moving=self.step < self.recipe.bias_until * self.recipe.steps)
        if self.step >= self.recipe.contrast_from * self.recipe.steps:
            mistake = CONTRASTED[self.step % len(CONTRASTED)]
            left = contrast(self.model, mistake, ids[::4], labels[::4])
            (self.recipe.contrast_weight * left).backward()
            self.left[mistake.name] = left.item()
        return loss.item()

    def probe(self) -> str:
        """Accuracies on a few held-out cases, loads of the experts, what is left of contrasts."""
        plain = without_parametrizations(self.model).eval()
        names = ("two_digit", "three_digit", "word", "few_shot", "tool_call", "tool_result")
        scores = accuracy(plain, self.tokenizer, 16, categories=names, seed=99)
        return " | ".join(
            (
                " ".join(f"{name} {result.share:.0%}" for name, result in scores.items()),
                self.loads(),
                " ".join(f"{name} {value:.2f}" for name, value in self.left.items()),
            )
        )

    def loads(self) -> str:
        """Smallest and largest expert load of the last batch, relative to an even one, by layer."""
        return " ".join(f"{load.min():.2f}-{load.max():.2f}" for load in self.balance.load)


def main(
    out: Annotated[Path, typer.Option(help="checkpoint folder to write")],
    work: Annotated[Path, typer.Option(help="folder for the run's state")] = Path("build/tiny-m2"),
    steps: Annotated[int, typer.Option(help="optimizer steps")] = Recipe.steps,
    seed: Annotated[int, typer.Option(help="of weights and data")] = Recipe.seed,
    learning_rate: Annotated[float, typer.Option(help="peak rate")] = Recipe.learning_rate,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
    save_every: Annotated[int, typer.Option(help="steps between saves")] = 50,
    probe_every: Annotated[int, typer.Option(help="steps between accuracy probes")] = 200,
) -> None:
    """Train, save the state as it goes, and write the checkpoint at the end."""
    torch.set_num_threads(threads)
    run = Run(Recipe(seed=seed, steps=steps, learning_rate=learning_rate), out, work)
    run.finish(save_every, probe_every)
    save_checkpoint(run.model, out)


if __name__ == "__main__":
    typer.run(main)
