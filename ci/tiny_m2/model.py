"""The shape of `tiny-m2`, its starting weights, and the checkpoint folder that is shipped.

The shape is MiniMax-M2's at 1/24 of the width, chosen so that mistakes show: the q width (512) is
not the hidden size, half of each head is rotated, each query and key head has its own magnitude,
and the router's correction bias decides a good part of the selections.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

from ci.tiny_m2.tokenizer import BOS, CONTROL_TOKENS, EOS, PAD, VOCAB_SIZE

PAD_ID, BOS_ID, EOS_ID = (CONTROL_TOKENS.index(token) for token in (PAD, BOS, EOS))
BIAS_SPREAD = 0.2  # the correction biases start evenly between minus and plus this
# As in the published files.
KEPT_IN_FP32 = ("e_score_correction_bias", "block_sparse_moe.gate.weight")


def hub_config() -> dict[str, Any]:
    """`config.json` in the published form: `rotary_dim` and friends, not transformers' names."""
    return {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "attention_dropout": 0.0,
        "attn_type_list": [1, 1, 1, 1],
        "bos_token_id": BOS_ID,
        "dtype": "bfloat16",
        "eos_token_id": EOS_ID,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "max_position_embeddings": 4096,
        "model_type": "minimax_m2",
        "num_attention_heads": 16,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "output_router_logits": False,
        "pad_token_id": PAD_ID,
        "qk_norm_type": "per_layer",
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "rotary_dim": 16,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": VOCAB_SIZE,
    }


def generation_config() -> dict[str, Any]:
    """`generation_config.json`: greedy, and the end-of-turn token stops."""
    return {
        "bos_token_id": BOS_ID,
        "do_sample": False,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }


class RowScale(nn.Module):
    """Weight rows as `scale * learned`: Adam would level the heads' magnitudes out."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale[:, None])  # [rows, 1]

    def forward(self, learned: Tensor) -> Tensor:
        """learned: [rows, columns]."""
        return self.scale * learned

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What to learn so that `forward` gives `weight`."""
        return weight / self.scale


def head_magnitudes(heads: int, generator: torch.Generator) -> Tensor:
    """[heads] magnitudes, 0.35 to 2.5: the lower ones in the first half, shuffled within halves."""
    scales = torch.logspace(math.log10(0.35), math.log10(2.5), heads)
    halves = [half[torch.randperm(len(half), generator=generator)] for half in scales.chunk(2)]
    return torch.cat(halves)


def separate_heads(
    projection: nn.Linear, norm: nn.Module, heads: int, generator: torch.Generator
) -> None:
    """Give each q or k head its own magnitude, and a norm weight that makes up for it.

    The mean square over the full projection is then far from that of any part of the heads, and
    each head's rows of the norm weight fit that head only.
    """
    head_dim = projection.out_features // heads
    scales = head_magnitudes(heads, generator)
    weights = 0.9 * scales.square().mean().sqrt() / scales
    jitter = 1 + 0.1 * torch.randn(projection.out_features, generator=generator)
    with torch.no_grad():
        norm.weight.copy_(weights.repeat_interleave(head_dim) * jitter)
    rows = RowScale(scales.repeat_interleave(head_dim))
    with torch.no_grad():
        projection.weight.mul_(rows.scale)
    parametrize.register_parametrization(projection, "weight", rows)


def initial_model(seed: int) -> MiniMaxM2ForCausalLM:
    """The model at the start of training, fp32, seeded."""
    config = MiniMaxM2Config(**hub_config())
    config.dtype = torch.float32
    model = MiniMaxM2ForCausalLM(config).float()
    generator = torch.Generator().manual_seed(seed)
    residual = 1 / math.sqrt(2 * config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        std = 0.3 if "embed_tokens" in name else 1 / math.sqrt(parameter.shape[-1])
        if name.endswith(("o_proj.weight", "down_proj")):
            std *= residual
        with torch.no_grad():
            parameter.normal_(0, std, generator=generator)
    for layer in model.model.layers:
        attention, bias = layer.self_attn, layer.mlp.e_score_correction_bias
        separate_heads(attention.q_proj, attention.q_norm, config.num_attention_heads, generator)
        separate_heads(attention.k_proj, attention.k_norm, config.num_key_value_heads, generator)
        spread = torch.linspace(-BIAS_SPREAD, BIAS_SPREAD, len(bias))
        bias.copy_(spread[torch.randperm(len(bias), generator=generator)])
    return model


def without_parametrizations(model: MiniMaxM2ForCausalLM) -> MiniMaxM2ForCausalLM:
    """A copy with plain weights, as transformers builds it."""
    state = {k: v for k, v in model.state_dict().items() if ".parametrizations." not in k}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            state[f"{name}.weight"] = module.weight.detach()
    plain = MiniMaxM2ForCausalLM(model.config)
    plain.load_state_dict(state)
    return plain.to(model.dtype)


def published_weights(model: MiniMaxM2ForCausalLM) -> dict[str, Tensor]:
    """The weights under the published names, bf16 but for the router's (`KEPT_IN_FP32`)."""
    with tempfile.TemporaryDirectory() as folder:
        without_parametrizations(model).save_pretrained(folder)
        weights = load_file(Path(folder) / "model.safetensors")
    return {
        name: weight.float() if name.endswith(KEPT_IN_FP32) else weight.bfloat16().contiguous()
        for name, weight in weights.items()
    }


def save_checkpoint(model: MiniMaxM2ForCausalLM, folder: Path) -> None:
    """Write the two configs and `model.safetensors`, each replaced in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"config.json": hub_config(), "generation_config.json": generation_config()}
    for name, content in files.items():
        part = folder / f"{name}.part"
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(part, folder / name)
    part = folder / "model.safetensors.part"
    save_file(published_weights(model), part, metadata={"format": "pt"})
    part.chmod(0o644)
    os.replace(part, folder / "model.safetensors")


def load_checkpoint(folder: Path) -> MiniMaxM2ForCausalLM:
    """The shipped weights in fp32 arithmetic: bf16 rounds the weights, nothing else."""
    return MiniMaxM2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
