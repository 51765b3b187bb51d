"""A small random MiniMax-M2, and what a fixture of a quantisation format is.

Each module here that has FIXTURES quantises `tiny()` in its own way: with the quantiser's library
where there is one, else by the published layout. What the weights stand for (`dequantised`) comes
from that library or from plain arithmetic, never from our package.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sglang_minimax.validation.random_checkpoint import _draw

State = dict[str, torch.Tensor]

LAYERS, HIDDEN, HEAD_DIM, HEADS, KV_HEADS = 3, 128, 64, 8, 4
EXPERTS, TOP_K, WIDTH, VOCABULARY = 8, 2, 384, 512

#: config.json of `tiny()`, in the form of the hub. Blocks of 64 make the expert width six blocks,
#: which two ranks share evenly and four do not; heads are whole blocks up to TP4.
CONFIG: Mapping[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "rotary_dim": 32,
    "rope_theta": 10000,
    "max_position_embeddings": 4096,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "vocab_size": VOCABULARY,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "use_routing_bias": True,
    "scoring_func": "sigmoid",
    "num_mtp_modules": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "dtype": "bfloat16",
}

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Fixture:
    """One checkpoint of a format.

    config: the whole config.json. tensors: as the checkpoint stores them. dequantised: fp32, what
    they stand for, under the published names. activations: how inputs of quantised modules are
    rounded on a GPU: `group-64`, `token-fp8`, `tensor-fp8`, `static-fp8`, `token-int8`, None for
    not at all. files: further ones beside config.json, name -> text. arguments: options that SGLang
    needs.
    """

    name: str
    config: dict[str, Any]
    tensors: State
    dequantised: State
    activations: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)


#: Fixtures by name; each is made when it is asked for.
Fixtures = Mapping[str, Callable[[], Fixture]]


def config(quantization: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A config.json of `tiny()`, with a quantization_config where one is given."""
    result = {**copy.deepcopy(dict(CONFIG)), **changes}
    if quantization is not None:
        result["quantization_config"] = copy.deepcopy(dict(quantization))
    return result


def quantised_modules(layers: int = LAYERS) -> list[str]:
    """The modules that quantisers convert: attention projections and experts."""
    modules = []
    for layer in range(layers):
        path = f"model.layers.{layer}"
        modules += [f"{path}.self_attn.{name}" for name in ATTENTION]
        for expert in range(EXPERTS):
            experts = f"{path}.block_sparse_moe.experts.{expert}"
            modules += [f"{experts}.{name}" for name in ("w1", "w2", "w3")]
    return modules


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the plain checkpoint under its published name."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        path = f"model.layers.{layer}"
        attention, moe = f"{path}.self_attn", f"{path}.block_sparse_moe"
        result |= {
            f"{path}.input_layernorm.weight": (HIDDEN,),
            f"{path}.post_attention_layernorm.weight": (HIDDEN,),
            f"{attention}.q_proj.weight": (q, HIDDEN),
            f"{attention}.k_proj.weight": (kv, HIDDEN),
            f"{attention}.v_proj.weight": (kv, HIDDEN),
            f"{attention}.o_proj.weight": (HIDDEN, q),
            f"{attention}.q_norm.weight": (q,),
            f"{attention}.k_norm.weight": (kv,),
            f"{moe}.gate.weight": (EXPERTS, HIDDEN),
            f"{moe}.e_score_correction_bias": (EXPERTS,),
        }
        for expert in range(EXPERTS):
            result |= {
                f"{moe}.experts.{expert}.w1.weight": (WIDTH, HIDDEN),
                f"{moe}.experts.{expert}.w2.weight": (HIDDEN, WIDTH),
                f"{moe}.experts.{expert}.w3.weight": (WIDTH, HIDDEN),
            }
    return {**result, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


@lru_cache(maxsize=1)
def _tiny() -> State:
    generator = torch.Generator().manual_seed(20)
    state = {}
    for name, shape in shapes().items():
        value = _draw(name, torch.Size(shape), generator)
        if ".gate." in name:
            value *= 2  # spreads the scores, so that few tokens are near a tie
        # The published checkpoints have the router in fp32 and the rest in bf16.
        state[name] = value if _is_router(name) else value.bfloat16().float()
    return state


def _is_router(name: str) -> bool:
    return ".gate." in name or name.endswith("e_score_correction_bias")


def tiny() -> State:
    """A random model in fp32 under the published names, always the same; a new dict each time."""
    return dict(_tiny())


def stored_plain(name: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor that the quantiser leaves alone, as checkpoints store it: exactly `value`."""
    return value.clone() if _is_router(name) else value.bfloat16()


def fixture_of(
    name: str,
    quantization: Mapping[str, Any],
    stored: Mapping[str, State],
    dequantised: Mapping[str, torch.Tensor],
    **more: Any,
) -> Fixture:
    """A fixture from its quantised modules; the rest of `tiny()` is left as it is.

    stored: module -> its tensors by the last part of their name. dequantised: module -> weight.
    """
    tensors: State = {}
    truth: State = {}
    for published, value in tiny().items():
        module = published.removesuffix(".weight")
        if module in stored:
            tensors |= {f"{module}.{kind}": each for kind, each in stored[module].items()}
            truth[published] = dequantised[module].float()
        else:
            tensors[published] = stored_plain(published, value)
            truth[published] = value
    return Fixture(name, config(quantization), tensors, truth, **more)


def write(fixture: Fixture, folder: Path) -> Path:
    """The checkpoint in `folder`, which is made; returns it."""
    return _write(folder, fixture.config, fixture.tensors, fixture.files)


def write_reference(fixture: Fixture, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A plain checkpoint of what the fixture stands for, in `dtype`; fp32 holds it exactly."""
    plain = {
        key: value
        for key, value in fixture.config.items()
        if key not in ("quantization_config", "compression_config")
    }
    plain["dtype"] = str(dtype).removeprefix("torch.")
    tensors = {
        name: value if _is_router(name) else value.to(dtype)
        for name, value in fixture.dequantised.items()
    }
    return _write(folder, plain, tensors, {})


def _write(
    folder: Path, config: Mapping[str, Any], tensors: State, files: Mapping[str, str]
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    # A view of a larger tensor would be written whole; safetensors wants tensors of their own.
    own = {name: value.clone().contiguous() for name, value in tensors.items()}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder
