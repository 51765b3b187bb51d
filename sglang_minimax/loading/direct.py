"""Tensors that are copied as they are into parameters of the same name, past every loader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from sglang_minimax.loading.problems import Problems
from sglang_minimax.loading.slots import SCALAR
from sglang_minimax.loading.values import invalid_values

NamedTensors = Iterable[tuple[str, torch.Tensor]]


def is_scale(name: str) -> bool:
    """Whether a parameter holds scales that multiply: finite and above zero."""
    return name.endswith(("weight_scale_inv", "weight_scale", "k_scale", "v_scale"))


def direct_problems(
    parameters: Mapping[str, torch.nn.Parameter], weights: NamedTensors
) -> Problems:
    """What does not fit where tensors are copied as they are into parameters of the same name.

    Each must have the shape of this rank's parameter, and its type where either is of one byte.
    """
    problems, seen = Problems(), set()
    for name, tensor in weights:
        parameter = parameters.get(name)
        if parameter is None:
            problems.add("unexpected", f"{name} (the model has no such parameter)")
        elif name in seen:
            problems.add("duplicate", name)
        elif tensor.shape != parameter.shape:
            problems.add(
                "misshapen", f"{name} is {list(tensor.shape)}, expected {list(parameter.shape)}"
            )
        elif tensor.dtype != parameter.dtype and (
            1 in (tensor.itemsize, parameter.itemsize)
            or tensor.is_floating_point() != parameter.is_floating_point()
        ):
            problems.add("invalid", f"{name} is {tensor.dtype}, expected {parameter.dtype}")
        elif is_scale(name) and (invalid := invalid_values(SCALAR, tensor)):
            problems.add("invalid", f"{name} {invalid}")
        seen.add(name)
    return problems
