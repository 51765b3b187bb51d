"""What of the attention prologue runs in one call, and why the rest does not: rules over facts.

Facts are plain values that `rotation.py` and `kv_store.py` read from SGLang's objects; a rule is
a test and the sentence for the start-up line. Where no rule applies, our call and SGLang's leave
the same bytes behind, up to one rounding less. No SGLang here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

#: Attention backends of SGLang that divide K and V by the layer's scales when they store them, and
#: multiply when they read. The others ignore the scales, do so for one dtype only, or nobody has
#: looked.
SCALING_BACKENDS = ("FlashAttentionBackend", "FlashInferAttnBackend", "TritonAttnBackend")
#: Its store of E4M3 is one launch, which on SM100 also converts q; it skips that where K and V are
#: stored already, and converts q in another one.
CONVERTS_Q = "TRTLLMHAAttnBackend"


@dataclass(frozen=True, slots=True)
class RotationFacts:
    """SGLang's rotary module and who would rotate instead.

    own_forward: whether its class computes something else than cos/sin pairs from one cache.
    native: whether SGLang was asked for its plain PyTorch rotation, to match a trainer bit by bit.
    """

    module: str
    own_forward: bool
    neox: bool
    native: bool
    head_size: int
    rotary_dim: int
    cache_shape: tuple[int, ...]
    cache_dtype: torch.dtype
    head_dim: int
    implementation: str
    device: str


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """SGLang's KV pool, the layer that writes to it, and who would write instead.

    plain: whether the pool is exactly SGLang's MHA pool, no subclass. layout: its name for it.
    hnd: heads outside of slots. quantised: a recipe with block scales. dtype: what the pool holds;
    compute: the dtype of k and v. k_shape, v_shape: of one layer's buffers. heads: (KV heads, head
    dimension) of the layer. context_ranks, decode_context_ranks: the two kinds of context
    parallelism. backends: of attention, as classes are called: two where prefill and decode have
    their own. checked: SGLang checks every slot (SGLANG_ENABLE_ASYNC_ASSERT). scales: the
    layer's, as Python numbers; None where one is a tensor alone. rotated: by us.
    """

    pool: str
    plain: bool
    layout: str
    hnd: bool
    quantised: bool
    dtype: torch.dtype
    compute: torch.dtype
    k_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    heads: tuple[int, int]
    backends: tuple[str, ...]
    scales: tuple[float, float] | None
    rotated: bool
    implementation: str
    device: str
    context_ranks: int = 1
    decode_context_ranks: int = 1
    checked: bool = False

    @property
    def fp8(self) -> bool:
        """Whether what is stored is divided by a scale and rounded to FP8."""
        return self.dtype in FP8_TYPES

    @property
    def ignoring(self) -> str:
        """The first backend that may ignore the scales, empty where none does."""
        return next((each for each in self.backends if each not in SCALING_BACKENDS), "")


FactsT = TypeVar("FactsT")


@dataclass(frozen=True)
class Rule(Generic[FactsT]):
    """Where `applies`, SGLang's own code runs instead; `sentence` says why, `{facts.x}` filled."""

    applies: Callable[[FactsT], bool]
    sentence: str


#: When SGLang's rotary module runs after our norm.
ROTATION_RULES: tuple[Rule[RotationFacts], ...] = (
    Rule(lambda f: f.own_forward, "{facts.module} rotates in its own way"),
    Rule(lambda f: not f.neox, "{facts.module} rotates neighbours, not halves"),
    Rule(lambda f: f.native, "SGLang was asked to rotate as its trainer does"),
    Rule(
        lambda f: f.head_size != f.head_dim or f.cache_shape[1:] != (f.rotary_dim,),
        "{facts.module} holds {facts.cache_shape} for heads of {facts.head_size}",
    ),
    Rule(
        lambda f: f.implementation == "reference" and f.device != "cpu",
        "the reference would be slower than SGLang's kernel on {facts.device}",
    ),
    Rule(
        lambda f: f.implementation != "reference" and f.cache_dtype != torch.float32,
        "{facts.implementation} wants cos and sin in fp32, SGLang holds {facts.cache_dtype}",
    ),
)

#: When SGLang's attention backend stores K and V itself.
STORE_RULES: tuple[Rule[StoreFacts], ...] = (
    Rule(lambda f: not f.rotated, "K is rotated after our call"),
    Rule(
        lambda f: f.implementation == "reference" and f.device != "cpu",
        "the reference would make the host wait for {facts.device}",
    ),
    # Subclasses stripe, translate, quantise, mirror to the host, or hold nothing.
    Rule(lambda f: not f.plain, "{facts.pool} is not SGLang's plain KV pool"),
    Rule(lambda f: f.hnd or f.layout != "nhd", "the layout of the KV pool is {facts.layout}"),
    Rule(lambda f: f.quantised, "the KV pool is quantised in blocks"),
    Rule(
        lambda f: f.dtype != f.compute and not f.fp8,
        "the KV pool holds {facts.dtype}, k and v are {facts.compute}",
    ),
    Rule(
        lambda f: f.k_shape != f.v_shape or f.k_shape[1:] != f.heads,
        "the KV pool holds {facts.k_shape} and {facts.v_shape}, the layer has {facts.heads}",
    ),
    # A rank stores other rows than it computes, or a part of them.
    Rule(lambda f: f.context_ranks > 1, "{facts.context_ranks} context-parallel ranks share K, V"),
    Rule(
        lambda f: f.decode_context_ranks > 1,
        "{facts.decode_context_ranks} ranks share the context of a decode",
    ),
    Rule(lambda f: f.checked, "SGLANG_ENABLE_ASYNC_ASSERT checks slots in SGLang's store"),
    Rule(lambda f: f.fp8 and f.scales is None, "the FP8 scales are not known to the host"),
    Rule(
        lambda f: f.dtype == torch.float8_e4m3fn and CONVERTS_Q in f.backends,
        f"{CONVERTS_Q} stores FP8 in the launch that converts q",
    ),
    Rule(
        lambda f: f.fp8 and f.scales != (1.0, 1.0) and bool(f.ignoring),
        "{facts.ignoring} may not apply the FP8 scales {facts.scales}",
    ),
)


def first_reason(rules: Iterable[Rule[FactsT]], facts: FactsT) -> str:
    """The sentence of the first rule that applies; empty where none does."""
    for rule in rules:
        if rule.applies(facts):
            return rule.sentence.format(facts=facts)
    return ""


def expected_cache_dtype(
    setting: str, compute: torch.dtype, algorithm: str | None = None
) -> torch.dtype | None:
    """What `--kv-cache-dtype` will make of the pool, before there is one; None where unsure.

    algorithm: the checkpoint's `kv_cache_quant_algo`, which `auto` follows where it is FP8. Only
    what is compiled ahead of the first forward depends on the answer.
    """
    if setting == "auto":
        if not isinstance(algorithm, str) or algorithm.upper() != "FP8":
            return compute
        # AMD's FP8 may be another type.
        return torch.float8_e4m3fn if torch.version.hip is None else None
    named = {
        "bf16": torch.bfloat16,
        "bfloat16": torch.bfloat16,
        "fp8_e4m3": torch.float8_e4m3fn,
        "fp8_e5m2": torch.float8_e5m2,
    }
    dtype = named.get(setting)
    return dtype if dtype == compute or dtype in FP8_TYPES else None
