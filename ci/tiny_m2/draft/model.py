"""The Eagle3 draft in plain PyTorch, its published config, and the folder that is shipped.

The forward pass is the one of SGLang's `srt/models/llama_eagle3.py`, which follows EAGLE-3 (Li et
al. 2025, https://arxiv.org/abs/2503.01840): one Llama layer that reads the embedding of the next
token beside the target's hidden state. Row `i` of the draft pairs what the target computed at
position `i` with token `i + 1`, and predicts token `i + 2`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import silu

from sglang_minimax.drafts.config import LAYERS_KEY, LLAMA
from sglang_minimax.drafts.judgement import draft_config

LAYER_IDS = (0, 1, 3)  # of tiny-m2's four layers; id i is the residual after layer i
DRAFT_VOCAB_SIZE = 256  # replies have 84 of the 896; SGLang pads to multiples of 64


def published_config(target: dict[str, Any]) -> dict[str, Any]:
    """`config.json` as SpecForge writes it, for a target with this `config.json`.

    Width and heads are the target's: SGLang gives the draft the target's embedding, and the draft
    is then split by the same tensor-parallel sizes.
    """
    return {
        "architectures": [LLAMA],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": target["bos_token_id"],
        "draft_vocab_size": DRAFT_VOCAB_SIZE,
        "dtype": "bfloat16",
        "eagle_config": {
            LAYERS_KEY: list(LAYER_IDS),
            "use_aux_hidden_state": True,
        },
        "eos_token_id": target["eos_token_id"],
        "head_dim": target["head_dim"],
        "hidden_act": "silu",
        "hidden_size": target["hidden_size"],
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": target["max_position_embeddings"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": target["num_attention_heads"],
        "num_hidden_layers": 1,
        "num_key_value_heads": target["num_key_value_heads"],
        "pad_token_id": target["pad_token_id"],
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "target_hidden_size": target["hidden_size"],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": target["vocab_size"],
    }


@dataclass
class Chain:
    """Draft steps that start at every chosen row at once.

    rows: [batch, chains] int64, the row of the first step. keys, values: [batch, kv_heads,
    length, head_dim] of the rows that saw the target. own: (key, value) of each later step,
    [batch, kv_heads, 1, chains, head_dim]. hidden: [batch, chains, hidden], before the last norm.
    mask: [batch, 1, 1, chains, length], added to the scores: no row after the first step's.
    """

    rows: Tensor
    keys: Tensor
    values: Tensor
    hidden: Tensor
    mask: Tensor
    own: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Attention(nn.Module):
    """Grouped-query attention over the target's rows and over a chain's own steps."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, self.head_dim = config["hidden_size"], config["head_dim"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(2 * hidden, q_width, bias=False)
        self.k_proj = nn.Linear(2 * hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(2 * hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, hidden, bias=False)
        exponents = torch.arange(0, self.head_dim, 2) / self.head_dim
        self.register_buffer("frequency", config["rope_theta"] ** -exponents, persistent=False)

    def rotated(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Heads [batch, rows, heads, dim] by full rotary at positions [.., rows], halves paired."""
        angle = (positions[..., None] * self.frequency)[..., None, :]  # [.., rows, 1, dim / 2]
        cos, sin = angle.cos(), angle.sin()
        first, second = heads.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def queries(self, x: Tensor, positions: Tensor) -> Tensor:
        """[batch, kv_heads, group, rows, head_dim] of x, [batch, rows, 2 * hidden]."""
        q = self.rotated(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)), positions)
        return q.unflatten(2, (self.kv_heads, -1)).permute(0, 2, 3, 1, 4)

    def keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Each [batch, kv_heads, rows, head_dim]."""
        shape = (self.kv_heads, self.head_dim)
        k = self.rotated(self.k_proj(x).unflatten(-1, shape), positions)
        return k.transpose(1, 2), self.v_proj(x).unflatten(-1, shape).transpose(1, 2)

    def attend(self, q: Tensor, chain: Chain) -> Tensor:
        """[batch, chains, hidden]: over the rows up to a chain's first and over its later steps."""
        q = q * self.head_dim**-0.5
        scores = (q.flatten(2, 3) @ chain.keys.transpose(-1, -2)).unflatten(2, q.shape[2:4])
        scores = scores + chain.mask  # [batch, kv_heads, group, chains, length]
        own = [(q * key).sum(-1, keepdim=True) for key, _ in chain.own]
        largest = torch.stack([part.detach().amax(-1) for part in (scores, *own)]).amax(0)
        # Numerator and denominator of the softmax apart: a step adds to both without a copy.
        weights = (scores - largest[..., None]).exp()
        out, total = weights.flatten(2, 3) @ chain.values, weights.sum(-1, keepdim=True)
        out = out.unflatten(2, q.shape[2:4])
        for score, (_, value) in zip(own, chain.own, strict=True):
            weight = (score - largest[..., None]).exp()
            out, total = out + weight * value, total + weight
        return self.o_proj((out / total).permute(0, 3, 1, 2, 4).flatten(2))


class MLP(nn.Module):
    """Llama's gated MLP."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, width = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class MidLayer(nn.Module):
    """The one decoder layer, its parts under the published names."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.hidden_norm = nn.RMSNorm(hidden, eps)
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)

    def inputs(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        """[..., 2 * hidden]: the embedding and the hidden state, each normalised."""
        return torch.cat([self.input_layernorm(embeds), self.hidden_norm(hidden)], -1)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The residual stream after attention and MLP."""
        residual = residual + attended
        return residual + self.mlp(self.post_attention_layernorm(residual))


class Draft(nn.Module):
    """The draft; its state dict has the published names. The embedding is the target's, not saved.

    embedding: [vocab, hidden]. d2t: [draft_vocab] int64, target id minus draft id. t2d: [vocab]
    bool, whether the draft can say the token.
    """

    def __init__(self, config: dict[str, Any], embedding: Tensor) -> None:
        super().__init__()
        hidden, words = config["hidden_size"], config["draft_vocab_size"]
        layer_ids = config["eagle_config"][LAYERS_KEY]
        self.fc = nn.Linear(config["target_hidden_size"] * len(layer_ids), hidden, bias=False)
        self.midlayer = MidLayer(config)
        self.norm = nn.RMSNorm(hidden, config["rms_norm_eps"])
        self.lm_head = nn.Linear(hidden, words, bias=False)
        self.register_buffer("d2t", torch.zeros(words, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config["vocab_size"], dtype=torch.bool))
        self.register_buffer("embedding", embedding.detach().clone(), persistent=False)

    def set_vocabulary(self, token_ids: Tensor) -> None:
        """Let the draft say these target ids, int64, as many as the config has room for."""
        words = token_ids.sort().values
        self.d2t.copy_(words - torch.arange(len(words)))
        self.t2d.zero_()[words] = True

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """The target's ids of the draft's, int64, any shape."""
        return draft_ids + self.d2t[draft_ids]

    def start(self, features: Tensor, tokens: Tensor, rows: Tensor) -> Chain:
        """The first step of the chains, over what the target has computed.

        features: [batch, length, ids * hidden], the captured residuals. tokens: [batch, length]
        int64, the token after each position. rows: [batch, chains] int64.
        """
        hidden = self.fc(features)
        x = self.midlayer.inputs(self.embedding[tokens], hidden)
        positions = torch.arange(tokens.shape[1])
        keys, values = self.midlayer.self_attn.keys_values(x, positions)
        x, residual = gathered(x, rows), gathered(hidden, rows)
        mask = torch.zeros(*rows.shape, tokens.shape[1])
        mask.masked_fill_(positions > rows[..., None], float("-inf"))
        chain = Chain(rows, keys, values, residual, mask[:, None, None])
        return self._advanced(chain, x, rows)

    def step(self, chain: Chain, tokens: Tensor) -> Chain:
        """One more step of each chain on its own hidden state; tokens: [batch, chains] int64."""
        positions = chain.rows + len(chain.own) + 1
        x = self.midlayer.inputs(self.embedding[tokens], chain.hidden)
        key, value = self.midlayer.self_attn.keys_values(x, positions)
        chain.own.append((key[:, :, None], value[:, :, None]))
        return self._advanced(chain, x, positions)

    def _advanced(self, chain: Chain, x: Tensor, positions: Tensor) -> Chain:
        attention = self.midlayer.self_attn
        attended = attention.attend(attention.queries(x, positions), chain)
        chain.hidden = self.midlayer.finish(chain.hidden, attended)
        return chain

    def logits(self, chain: Chain) -> Tensor:
        """[batch, chains, draft_vocab] of the chains' next tokens."""
        return self.lm_head(self.norm(chain.hidden))


def gathered(values: Tensor, rows: Tensor) -> Tensor:
    """values [batch, length, width] at rows [batch, chains]: [batch, chains, width]."""
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))


@torch.inference_mode()
def drafted_tokens(draft: Draft, features: Tensor, ids: Tensor, rows: Tensor, steps: int) -> Tensor:
    """The greedy drafts from each row, target ids [batch, chains, steps].

    features: [batch, length, ids * hidden] and ids: [batch, length] of the target's tokens; a
    chain at row i has seen token i + 1, so rows are below length - 1.
    """
    chain = draft.start(features[:, :-1], ids[:, 1:], rows)
    tokens = [draft.target_ids(draft.logits(chain).argmax(-1))]
    for _ in range(steps - 1):
        chain = draft.step(chain, tokens[-1])
        tokens.append(draft.target_ids(draft.logits(chain).argmax(-1)))
    return torch.stack(tokens, -1)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write `config.json` in one move."""
    part = folder / "config.json.part"
    part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, folder / "config.json")


def save_draft(draft: Draft, config: dict[str, Any], folder: Path) -> None:
    """Write the config and the bf16 weights, each replaced in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: (weight.bfloat16() if weight.is_floating_point() else weight).contiguous()
        for name, weight in draft.state_dict().items()
    }
    part = folder / "model.safetensors.part"
    save_file(weights, part, metadata={"format": "pt"})
    part.chmod(0o644)
    os.replace(part, folder / "model.safetensors")
    write_config(folder, config)


def load_draft(folder: Path, embedding: Tensor) -> Draft:
    """The shipped draft in fp32 arithmetic, with its target's embedding [vocab, hidden]."""
    draft = Draft(draft_config(folder), embedding.float())
    draft.load_state_dict(load_file(folder / "model.safetensors"))
    return draft.eval()
