"""transformers' model of a fixture, with the inputs of its quantised modules rounded as on a GPU.

The weights are the fixture's `dequantised` ones. Rounding is `tests/quantised/rounding.py`, written
from the kernels' sources apart from our platform. Rules that look at a whole row look at a rank's
slice of it on a GPU, so an oracle is made for the number of ranks that share heads and experts;
rules of groups must not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from sglang_minimax.validation.oracle import TransformersOracle
from tests.formats.base import Fixture, write_reference
from tests.quantised import rounding

#: x: [rows, columns] -> the same shape and dtype.
Rule = Callable[[torch.Tensor], torch.Tensor]

#: Rules that our CPU platform leaves out, as docs/cpu-platform.md says.
NOT_EMULATED = ("group-mxfp4",)


def rules(fixture: Fixture) -> tuple[Rule | None, Rule | None]:
    """How the inputs of attention projections and of experts are rounded, None for not at all."""
    name = fixture.activations
    if name is None or name in NOT_EMULATED:
        return None, None
    if name == "group-nvfp4":
        given = _given(fixture, lambda row, scale, _: rounding.nvfp4(row, rounding.ONE / scale))
        return given, given
    if name.startswith("group-"):
        size = int(name.removeprefix("group-"))
        groups = _rows(lambda row: rounding.fp8_group(row, size))
        return groups, groups
    if name == "token-fp8":
        return _rows(rounding.fp8_token), _rows(rounding.fp8_token)
    if name == "tensor-fp8":
        return _rows(rounding.fp8_token), _as_one
    if name == "static-fp8":
        given = _given(fixture, lambda row, scale, _: rounding.fp8_given(row, scale))
        return given, given
    dynamic = _rows(rounding.ascend_token if fixture.files else rounding.int8_token)
    if name == "static-int8":
        return _given(fixture, rounding.ascend_given), dynamic
    return dynamic, dynamic


def _rows(rule: Callable[[Any], Any]) -> Rule:
    return lambda x: rounding.by_row(x, rule)


def _as_one(x: torch.Tensor) -> torch.Tensor:
    scale = rounding.largest(x)
    return rounding.by_row(x, lambda row: rounding.fp8_given(row, scale))


def _given(fixture: Fixture, rule: Callable[[Any, Any, Any], Any]) -> Rule:
    """With the checkpoint's scale, which is the same for all modules of a fixture."""

    def only(kind: str) -> Any:
        found = {t.float().item() for name, t in fixture.tensors.items() if name.endswith(kind)}
        assert len(found) <= 1, f"the fixture has several {kind}"
        return torch.tensor(next(iter(found), 0.0)).numpy()[()]

    scale, offset = only(".input_scale"), only(".input_offset")
    return lambda x: rounding.by_row(x, lambda row: rule(row, scale, offset))


class RoundedOracle(TransformersOracle):
    """What an engine with `fixture` should compute, in the steps in which it computes."""

    def __init__(
        self, fixture: Fixture, folder: Path, *, attention_ranks: int = 1, expert_ranks: int = 1
    ) -> None:
        """folder: for a plain checkpoint. The ranks share the heads, and the width of an expert."""
        super().__init__(write_reference(fixture, folder))
        attention, experts = rules(fixture)
        if (fixture.activations or "").startswith("group-"):
            # A rank holds whole groups, also where blocks are dealt, so nobody's groups differ.
            attention_ranks = expert_ranks = 1
        for name, module in self.model.named_modules():
            last = name.rpartition(".")[2]
            if last in ("q_proj", "k_proj", "v_proj", "o_proj") and attention:
                if not _is_plain(fixture, name):
                    ranks = attention_ranks if last == "o_proj" else 1
                    module.register_forward_pre_hook(_on_input(attention, ranks))
            elif name.endswith(".mlp.experts") and experts:
                module.forward = _rounded_experts(module, experts, expert_ranks)

    @torch.inference_mode()
    def along(self, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """[len(tokens), vocabulary]: the distributions before each of `tokens`, one step at a time.

        The prompt in one batch, then each token in one of its own, as an engine without other
        requests does: a rule may look at the whole batch.
        """
        rows, cache = [], None
        for batch in ([*prompt], *([token] for token in tokens[:-1])):
            output = self.model(torch.tensor([batch]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits[0, -1].float().log_softmax(-1))
        return torch.stack(rows)


def _is_plain(fixture: Fixture, module: str) -> bool:
    kinds = [name for name in fixture.tensors if name.startswith(f"{module}.")]
    return kinds == [f"{module}.weight"]


def _on_input(rule: Rule, ranks: int) -> Callable[..., Any]:
    def round_input(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        (x,) = inputs
        return (_on_slices(rule, x.reshape(-1, x.shape[-1]), ranks).reshape(x.shape),)

    return round_input


def _on_slices(rule: Rule, x: torch.Tensor, ranks: int) -> torch.Tensor:
    if not x.shape[0]:
        return x
    return torch.cat([rule(part.contiguous()) for part in x.chunk(ranks, dim=-1)], dim=-1)


def _rounded_experts(module: Any, rule: Rule, ranks: int) -> Callable[..., torch.Tensor]:
    """The experts of transformers with both their inputs rounded, all tokens of a batch at once."""

    def forward(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rounded = rule(hidden.contiguous())
        token, slot = (index.flatten() for index in torch.where(torch.ones_like(chosen) > 0))
        expert = chosen[token, slot]
        inner = torch.stack(
            [
                F.silu(gate) * up
                for t, e in zip(token, expert, strict=True)
                for gate, up in [F.linear(rounded[t], module.gate_up_proj[e]).chunk(2)]
            ]
        )
        inner = _on_slices(rule, inner, ranks)
        total = torch.zeros_like(hidden)
        for row, (t, s, e) in enumerate(zip(token, slot, expert, strict=True)):
            total[t] += F.linear(inner[row], module.down_proj[e]) * weights[t, s]
        return total

    return forward
