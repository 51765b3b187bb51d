"""Synthetic FP8 checkpoints of MiniMax-M2 for the loading benchmark, written in seconds.

`names` has every tensor name of the published checkpoint, 96,103, with small matrices: what it
costs is handling. `bytes` has few tensors of the published size: what it costs is moving them. In
`names` every cut at TP8 falls between blocks; in `bytes` pure TP8 cuts expert blocks, as published.

The safetensors library writes the files, so that offsets lie where real ones do (ordered by type,
then by name). Values are random: finite FP8, positive scales.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from safetensors import TensorSpec, serialize_file

INDEX = "model.safetensors.index.json"
ITEMSIZE = {"float8_e4m3fn": 1, "bfloat16": 2, "float32": 4}
#: Prime, so that tensors of one shape do not begin at the same place of the pool.
STRIDE = 1_000_003
POOL = 1 << 23


@dataclass(frozen=True)
class Size:
    """A checkpoint's dimensions, and into how many files it is written."""

    layers: int
    experts: int
    hidden: int
    width: int
    head_dim: int
    rotary: int
    vocabulary: int
    block: int
    files: int
    heads: int = 48
    kv_heads: int = 8


SIZES = {
    "names": Size(62, 256, 128, 64, 8, 4, 512, 8, files=16),
    "bytes": Size(4, 16, 3072, 1536, 128, 64, 4096, 128, files=8),
}
Entry = tuple[str, str, tuple[int, ...]]


def entries(size: Size) -> Iterator[Entry]:
    """(name, type, shape) of every tensor, in the order of the model."""
    hidden, width = size.hidden, size.width
    q, kv = size.heads * size.head_dim, size.kv_heads * size.head_dim
    yield "model.embed_tokens.weight", "bfloat16", (size.vocabulary, hidden)
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}"
        attention, moe = f"{prefix}.self_attn", f"{prefix}.block_sparse_moe"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", "bfloat16", (hidden,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield from _matrix(f"{attention}.{name}_proj", rows, hidden, size.block)
        yield from _matrix(f"{attention}.o_proj", hidden, q, size.block)
        yield f"{attention}.q_norm.weight", "bfloat16", (q,)
        yield f"{attention}.k_norm.weight", "bfloat16", (kv,)
        yield f"{moe}.gate.weight", "float32", (size.experts, hidden)
        yield f"{moe}.e_score_correction_bias", "float32", (size.experts,)
        for expert in range(size.experts):
            for name, rows, columns in (
                ("w1", width, hidden),
                ("w2", hidden, width),
                ("w3", width, hidden),
            ):
                yield from _matrix(f"{moe}.experts.{expert}.{name}", rows, columns, size.block)
    yield "model.norm.weight", "bfloat16", (hidden,)
    yield "lm_head.weight", "bfloat16", (size.vocabulary, hidden)


def _matrix(name: str, rows: int, columns: int, block: int) -> Iterator[Entry]:
    yield f"{name}.weight", "float8_e4m3fn", (rows, columns)
    yield f"{name}.weight_scale_inv", "float32", (-(-rows // block), -(-columns // block))


def config(size: Size) -> dict[str, Any]:
    """config.json in the form of the hub."""
    return {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "intermediate_size": size.width,
        "num_hidden_layers": size.layers,
        "num_local_experts": size.experts,
        "num_experts_per_tok": 8,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "rotary_dim": size.rotary,
        "rope_theta": 5_000_000,
        "rms_norm_eps": 1e-6,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "attn_type_list": [1] * size.layers,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "float8_e4m3fn",
            "activation_scheme": "dynamic",
            "weight_block_size": [size.block, size.block],
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        },
    }


class Pools:
    """Random bytes for each type; a tensor takes a stretch of them."""

    def __init__(self, seed: int = 0) -> None:
        random = numpy.random.default_rng(seed)
        fp8 = random.integers(0, 256, POOL, dtype=numpy.uint8)
        fp8[(fp8 & 0x7F) == 0x7F] -= 1  # the two NaNs
        values = random.random(POOL // 4, dtype=numpy.float32) + 0.5
        self._pools = {
            "float8_e4m3fn": fp8,
            "float32": (values * 1e-2).view(numpy.uint8),
            "bfloat16": (values.view(numpy.uint32) >> 16).astype(numpy.uint16).view(numpy.uint8),
        }
        self._at = 0

    def take(self, kind: str, nbytes: int) -> numpy.ndarray:
        """`nbytes` bytes of valid values of type `kind`; another stretch each time."""
        pool = self._pools[kind]
        room = len(pool) - nbytes
        if room <= 0:
            return numpy.resize(pool, nbytes)
        self._at += STRIDE
        start = self._at % room & ~3
        return pool[start : start + nbytes]


def write(folder: Path, size: Size) -> dict[str, int]:
    """Write a checkpoint into `folder`: how many tensors, bytes and files it has."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = list(entries(size))
    total = sum(map(_nbytes, everything))
    pools, where = Pools(), {}
    shards = list(_shards(everything, total // size.files + 1))
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / name, shard, pools)
        where.update(dict.fromkeys((entry[0] for entry in shard), name))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(size), indent=1))
    return {"tensors": len(everything), "bytes": total, "files": len(shards)}


def _write_file(path: Path, shard: list[Entry], pools: Pools) -> None:
    arrays = {entry[0]: pools.take(entry[1], _nbytes(entry)) for entry in shard}
    specs = {
        name: TensorSpec(
            dtype=kind,
            shape=shape,
            data_ptr=arrays[name].ctypes.data,
            data_len=arrays[name].nbytes,
        )
        for name, kind, shape in shard
    }
    serialize_file(specs, path, {"format": "pt"})


def _nbytes(entry: Entry) -> int:
    return int(numpy.prod(entry[2])) * ITEMSIZE[entry[1]]


def _shards(everything: list[Entry], limit: int) -> Iterator[list[Entry]]:
    """Cut where a file is full, in the order of the model, as transformers does."""
    shard: list[Entry] = []
    used = 0
    for entry in everything:
        if shard and used + _nbytes(entry) > limit:
            yield shard
            shard, used = [], 0
        shard.append(entry)
        used += _nbytes(entry)
    yield shard
