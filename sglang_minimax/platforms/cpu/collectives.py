"""Collectives of uneven sizes over gloo, where SGLang demands PyNccl."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

Rows = Sequence[int]


def gather_uneven_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `GroupCoordinator.all_gatherv(input_, sizes, output)`."""

    @functools.wraps(original)
    def all_gatherv(
        self: Any,
        input_: torch.Tensor | list[torch.Tensor],
        sizes: list[int] | None = None,
        output: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        if output is not None and not isinstance(input_, torch.Tensor):
            raise ValueError("all_gatherv: an output buffer takes one input tensor, not a list")
        inputs = [input_] if isinstance(input_, torch.Tensor) else input_
        rows = sizes or [inputs[0].shape[0]] * self.world_size
        return [_gather(self, tensor, rows, output) for tensor in inputs]

    return all_gatherv


def _gather(
    group: Any, tensor: torch.Tensor, rows: Rows, output: torch.Tensor | None
) -> torch.Tensor:
    """The `rows[r]` rows of every rank r, one after the other: [sum(rows), ...]."""
    _check(group, rows)
    if tensor.shape[0] != rows[group.rank_in_group]:
        raise ValueError(
            f"all_gatherv: rank {group.rank_in_group} brings {tensor.shape[0]} rows instead of "
            f"{rows[group.rank_in_group]}"
        )
    if output is None:
        output = tensor.new_empty((sum(rows), *tensor.shape[1:]))
    if output.shape != (sum(rows), *tensor.shape[1:]):
        raise ValueError(
            f"all_gatherv: an output of shape {tuple(output.shape)} for {sum(rows)} rows of "
            f"{tuple(tensor.shape[1:])}"
        )
    # gloo gathers equal shapes only, so every rank sends as many rows as the longest.
    padded = tensor.new_zeros((max(rows), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    pieces = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(pieces, padded, group=group.device_group)
    return torch.cat([piece[:count] for piece, count in zip(pieces, rows, strict=True)], out=output)


def scatter_uneven_sums(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `GroupCoordinator.reduce_scatterv(input_, output, sizes)`.

    Sums all rows and keeps this rank's, which is also what gloo does inside its own reduce-scatter.
    """

    @functools.wraps(original)
    def reduce_scatterv(
        self: Any,
        input_: torch.Tensor,
        output: torch.Tensor | None = None,
        sizes: list[int] | None = None,
    ) -> torch.Tensor:
        if sizes is None and input_.shape[0] % self.world_size:
            raise ValueError(
                f"reduce_scatterv: {input_.shape[0]} rows cannot be shared equally by "
                f"{self.world_size} ranks; name the sizes"
            )
        rows = sizes or [input_.shape[0] // self.world_size] * self.world_size
        _check(self, rows)
        if input_.shape[0] != sum(rows):
            raise ValueError(
                f"reduce_scatterv: {input_.shape[0]} rows for sizes that add up to {sum(rows)}"
            )
        total = input_.clone()  # the caller's tensor stays as it is
        dist.all_reduce(total, group=self.device_group)
        mine = total.split(list(rows))[self.rank_in_group]
        if output is None:
            return mine.clone()
        if output.shape != mine.shape:
            raise ValueError(
                f"reduce_scatterv: an output of shape {tuple(output.shape)} for {tuple(mine.shape)}"
            )
        return output.copy_(mine)

    return reduce_scatterv


def gather_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `GroupCoordinator._all_gather_into_tensor(output, input)`.

    NCCL fills memory, so SGLang may pass an output of [ranks, rows, ...]; gloo wants the ranks'
    rows one after the other.
    """

    @functools.wraps(original)
    def _all_gather_into_tensor(self: Any, output: torch.Tensor, input: torch.Tensor) -> Any:
        rows = self.world_size * input.shape[0]
        return original(self, output.view(rows, *input.shape[1:]), input)

    return _all_gather_into_tensor


def _check(group: Any, rows: Rows) -> None:
    if len(rows) != group.world_size:
        raise ValueError(f"{len(rows)} sizes for a group of {group.world_size} ranks")
