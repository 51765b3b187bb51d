"""transformers' own MiniMax-M2, as the judge of every engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class TransformersOracle:
    """A checkpoint in transformers, on the CPU, in fp32 or bf16.

    In bf16 the router stays in fp32, as the architecture wants it: transformers would run it in
    the weight's dtype, which changes the choice of experts and so is no judge of it.
    """

    def __init__(self, checkpoint: Path | str, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        routers = {
            name: value.clone()
            for name, value in model.state_dict().items()
            if name.endswith(("gate.weight", "e_score_correction_bias"))
        }
        model.to(dtype)
        for name, value in routers.items():
            owner, _, attribute = name.rpartition(".")
            getattr(model.get_submodule(owner), attribute).data = value
        self.model = model.eval()
        self.vocab_size: int = model.config.vocab_size

    @torch.inference_mode()
    def log_probabilities(self, tokens: Sequence[int]) -> torch.Tensor:
        """[len(tokens), vocabulary] fp32: row i is the distribution after `tokens[: i + 1]`."""
        logits = self.model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return logits.float().log_softmax(-1)

    @torch.inference_mode()
    def routing_margins(self, tokens: Sequence[int]) -> torch.Tensor:
        """[len(tokens)]: how close any layer came to choosing another expert for each token.

        The difference between the last score chosen and the first left out, smallest over the
        layers. Where it is below the noise of the activations, two correct bf16 computations may
        choose differently and then differ by a whole expert's output.
        """
        margins: list[torch.Tensor] = []

        def record(router: Any, inputs: tuple[torch.Tensor, ...], _: object) -> None:
            hidden, bias = inputs
            scores = (hidden.float() @ router.weight.float().T).sigmoid() + bias.float()
            if router.top_k == scores.shape[-1]:  # every expert is chosen, always
                margins.append(torch.full(scores.shape[:-1], torch.inf))
                return
            best = scores.topk(router.top_k + 1, dim=-1).values
            margins.append(best[:, -2] - best[:, -1])

        routers = [m for n, m in self.model.named_modules() if n.endswith("mlp.gate")]
        hooks = [router.register_forward_hook(record) for router in routers]
        try:
            self.log_probabilities(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(margins).amin(0)

    @torch.inference_mode()
    def layer_outputs(self, tokens: Sequence[int]) -> list[torch.Tensor]:
        """[len(tokens), hidden] of each layer: the residual stream behind it."""
        outputs: list[torch.Tensor] = []

        def record(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            outputs.append(hidden.reshape(len(tokens), -1))

        hooks = [layer.register_forward_hook(record) for layer in self.model.model.layers]
        try:
            self.log_probabilities(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs

    def greedy(self, prompt: Sequence[int], steps: int) -> list[int]:
        """The `steps` most likely tokens after `prompt`, each given the ones before."""
        tokens = list(prompt)
        for _ in range(steps):
            tokens.append(int(self.log_probabilities(tokens)[-1].argmax()))
        return tokens[len(prompt) :]
