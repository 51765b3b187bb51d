"""What both training runs have in common: a seeded, resumable loop around an optimizer step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from sglang_minimax.errors import LoadError


@dataclass(frozen=True)
class Recipe:
    """What decides the result of every run, whatever it trains."""

    seed: int = 0
    steps: int = 2000
    learning_rate: float = 3e-3
    warmup: int = 80
    weight_decay: float = 0.02

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to 2 % of the peak."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, done))))


def optimizer_for(module: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    groups = [
        {
            "params": [p for p in module.parameters() if (p.dim() > 1) == matrices],
            "weight_decay": recipe.weight_decay * matrices,
        }
        for matrices in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)


class TrainingRun(ABC):
    """A training run of one module, and its saved state in the work folder.

    Step `s` depends on the seed and `s` alone, so a run that stops continues from its last save.
    """

    def __init__(self, recipe: Recipe, module: nn.Module, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self._recipe, self._module, self._state_file = recipe, module, work / "state.pt"
        self._optimizer = optimizer_for(module, recipe)
        self.step = 0

    @abstractmethod
    def backward(self) -> float:
        """Leave the gradients of this step in the module; returns its loss."""

    @abstractmethod
    def probe(self) -> str:
        """A line on how well it does so far."""

    def resume(self) -> None:
        """Continue from the work folder's state, if there is one.

        Raises LoadError for a state of another recipe, which would end in neither's weights.
        """
        if not self._state_file.exists():
            return
        state = torch.load(self._state_file, weights_only=True)
        if state["recipe"] != asdict(self._recipe):
            raise LoadError(
                f"{self._state_file} is of another recipe, {state['recipe']}; ask for the same "
                "one, or give another --work."
            )
        self._module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def save(self) -> None:
        """Write the state, then move it into place."""
        state = {
            "module": self._module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "recipe": asdict(self._recipe),
        }
        part = self._state_file.with_suffix(".part")
        torch.save(state, part)
        part.replace(self._state_file)

    def advance(self) -> float:
        """One optimizer step; returns its loss."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._recipe.rate(self.step)
        loss = self.backward()
        torch.nn.utils.clip_grad_norm_(self._module.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss

    def finish(self, save_every: int, probe_every: int) -> None:
        """Resume, and train to the last step: a bar, a save and a probe every so many steps.

        Raises SystemExit with a sentence for the state of another recipe.
        """
        try:
            self.resume()
        except LoadError as error:
            raise SystemExit(str(error)) from error
        steps, smooth = self._recipe.steps, 0.0
        with tqdm(total=steps, initial=self.step, unit="step", mininterval=5) as bar:
            while self.step < steps:
                loss = self.advance()
                smooth = loss if not smooth else 0.95 * smooth + 0.05 * loss
                bar.update()
                bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
                if self.step % save_every == 0 or self.step == steps:
                    self.save()
                if self.step % probe_every == 0 or self.step == steps:
                    tqdm.write(f"step {self.step} loss {smooth:.4f} | {self.probe()}")
