"""The loop around both training runs: a run that stops ends in the weights of one that did not."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ci.tiny_m2.training import Recipe, TrainingRun
from sglang_minimax.errors import LoadError

RECIPE = Recipe(steps=6, warmup=2, learning_rate=0.1)


class Line(TrainingRun):
    """Fits a line to points that depend on the step alone."""

    def __init__(self, work: Path, recipe: Recipe = RECIPE, stop_after: int | None = None) -> None:
        torch.manual_seed(0)
        self.line, self.stop_after, self.probes = torch.nn.Linear(3, 1), stop_after, 0
        super().__init__(recipe, self.line, work)

    def backward(self) -> float:
        if self.step == self.stop_after:
            raise KeyboardInterrupt
        points = torch.randn(8, 3, generator=torch.Generator().manual_seed(self.step))
        loss = (self.line(points) - points.sum(-1, keepdim=True)).square().mean()
        loss.backward()
        return loss.item()

    def probe(self) -> str:
        self.probes += 1
        return ""


def weights(run: Line) -> dict[str, list[float]]:
    return {name: value.flatten().tolist() for name, value in run.line.state_dict().items()}


def test_a_run_that_stopped_ends_in_the_same_weights(tmp_path):
    whole = Line(tmp_path / "whole")
    whole.finish(save_every=2, probe_every=4)
    assert (whole.step, whole.probes) == (6, 2)

    with pytest.raises(KeyboardInterrupt):
        Line(tmp_path / "cut", stop_after=5).finish(save_every=2, probe_every=4)
    resumed = Line(tmp_path / "cut")
    resumed.resume()
    assert resumed.step == 4
    resumed.finish(save_every=2, probe_every=4)
    assert weights(resumed) == weights(whole)
    # Without its optimizer's moments it would end elsewhere.
    forgetful = Line(tmp_path / "forgetful")
    forgetful.line.load_state_dict(torch.load(tmp_path / "cut/state.pt")["module"])
    forgetful.step = 4
    forgetful.finish(save_every=2, probe_every=4)
    assert weights(forgetful) != weights(whole)


def test_a_run_of_another_recipe_is_not_continued(tmp_path):
    Line(tmp_path).save()
    other = dataclasses.replace(RECIPE, steps=7)
    with pytest.raises(LoadError, match=r"of another recipe.*another --work"):
        Line(tmp_path, other).resume()
    with pytest.raises(SystemExit, match="of another recipe"):
        Line(tmp_path, other).finish(save_every=1, probe_every=1)


def test_the_rate_rises_and_falls_to_a_fiftieth():
    rates = [RECIPE.rate(step) for step in range(7)]
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[6] == pytest.approx(0.002)
