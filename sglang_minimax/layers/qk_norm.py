"""The weights of a norm over the full projection, one rank's part of them."""

from __future__ import annotations

import torch
from torch import nn


class ShardedNormWeight(nn.Module):
    """This rank's rows of a norm weight that spans all heads.

    rows: the rows of the global weight. The parameter is [len(rows)] in the default dtype; its
    loader takes the full [total] tensor and keeps these rows.
    """

    def __init__(self, rows: range, total: int) -> None:
        super().__init__()
        self.rows = rows
        self.total = total
        self.weight = nn.Parameter(torch.empty(len(rows)), requires_grad=False)
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, parameter: nn.Parameter, full: torch.Tensor) -> None:
        """Copy this rank's rows out of the full weight, [total]."""
        parameter.data.copy_(full[self.rows.start : self.rows.stop])

    def extra_repr(self) -> str:
        return f"rows={self.rows.start}:{self.rows.stop} of {self.total}"
