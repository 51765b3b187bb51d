"""Random weights for any MiniMax-M2 configuration, made so that a mistake shows.

An initialisation for training hides mistakes: norm weights of one, biases of zero and tiny
matrices make a wrong head or a missing norm nearly invisible. Here every norm weight differs,
the correction bias changes which experts are chosen, and activations stay of order one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def write_random_checkpoint(
    folder: Path, config: dict[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> None:
    """Write `config` (its form is kept) and random weights of it to `folder`.

    config: a config.json of either form. Weights are stored in `dtype` under the published names,
    by transformers. Matrices are drawn with standard deviation 1/sqrt(columns), norm weights from
    0.5 to 1.5, the correction bias from -0.2 to 0.2.
    """
    import json

    from transformers import AutoModelForCausalLM, MiniMaxM2Config

    model = AutoModelForCausalLM.from_config(MiniMaxM2Config(**config))
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        value.copy_(_draw(name, value.shape, generator))
    model.to(dtype).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("e_score_correction_bias"):
        return (torch.rand(shape, generator=generator) - 0.5) * 0.4
    if "norm" in name:
        return torch.rand(shape, generator=generator) + 0.5
    scale = 1.0 if "embed" in name else shape[-1] ** -0.5
    return torch.randn(shape, generator=generator) * scale
