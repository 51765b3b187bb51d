"""The router's two launches: partial logits on the tensor cores, then their sum and the choice.

The gate's weight is fp32, and tensor cores multiply bf16. So each weight is split into three bf16
numbers that add up to it, and each part meets the activations in a product of its own. A product of
two bf16 numbers is exact in the fp32 accumulator, so what is lost is what any fp32 sum in some
order loses. fp16 activations are split in two in the same way; fp32 ones are multiplied in fp32.
The idea of splitting: Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores
while surpassing the FP32 theoretical peak performance", 2022, and 3xTF32 in CUTLASS.

Offsets of rows are 64 bits wide. No inline assembly, so Triton's interpreter can run both kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter keeps bf16 as its 16 bits and would multiply those, so there the parts, which are
# rounded to bf16 all the same, meet in fp32; the products are exact either way.
OPERAND = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


@triton.jit
def rounded(x):
    """x, fp32, as bf16 and what that leaves of it, which fp32 holds exactly."""
    part = x.to(tl.bfloat16)
    return part.to(OPERAND), x - part.to(tl.float32)


@triton.jit
def add_product(sums, x, w):
    """sums [tokens, experts] + x [tokens, hidden] * w [hidden, experts]; w fp32, sums fp32.

    An infinite activation meets the first part of a weight alone: the others may be zero or of the
    other sign, and would make a NaN of what is infinite in fp32.
    """
    if x.dtype == tl.float32:
        return tl.dot(x, w, sums, input_precision="ieee")
    first, rest = rounded(w)
    second, rest = rounded(rest)
    third, rest = rounded(rest)
    finite = tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x.to(tl.float32), 0.0)
    high, low = rounded(finite)
    sums = tl.dot(high, third, sums)
    sums = tl.dot(high, second, sums)
    if x.dtype == tl.float16:  # 11 bits of significand where bf16 has 8
        low, _ = rounded(low)
        sums = tl.dot(low, third, sums)
        sums = tl.dot(low, second, sums)
        sums = tl.dot(low, first, sums)
    return tl.dot(x.to(tl.float32).to(tl.bfloat16).to(OPERAND), first, sums)


@triton.jit(do_not_specialize=["tokens", "steps"])
def partial_logits(
    x_ptr,  # [tokens, HIDDEN], rows x_stride apart
    w_ptr,  # [EXPERTS, HIDDEN] fp32, contiguous
    partial_ptr,  # [parts, tokens, EXPERTS] fp32, contiguous
    tokens,
    x_stride,
    steps,  # blocks of HIDDEN that a part adds up
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Program (i, j, p): tokens of block i against experts of block j over part p of HIDDEN."""
    part = tl.program_id(2)
    t = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    e = tl.program_id(1) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    h = part * steps * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    x_rows = x_ptr + t.to(tl.int64)[:, None] * x_stride
    w_rows = w_ptr + e.to(tl.int64)[None, :] * HIDDEN
    here, known = t[:, None] < tokens, e[None, :] < EXPERTS

    sums = tl.zeros((BLOCK_TOKENS, BLOCK_EXPERTS), dtype=tl.float32)
    for _ in range(steps):
        x = tl.load(x_rows + h[None, :], mask=here & (h[None, :] < HIDDEN), other=0.0)
        w = tl.load(w_rows + h[:, None], mask=known & (h[:, None] < HIDDEN), other=0.0)
        sums = add_product(sums, x, w)
        h += BLOCK_HIDDEN
    row = part.to(tl.int64) * tokens + t
    tl.store(partial_ptr + row[:, None] * EXPERTS + e[None, :], sums, mask=here & known)


@triton.jit
def ordered(score):
    """fp32 -> int32 in the same order, with any NaN above everything."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit(do_not_specialize=["tokens", "parts"])
def select(
    partial_ptr,  # [parts, tokens, EXPERTS] fp32, contiguous
    bias_ptr,  # [EXPERTS] fp32
    weights_ptr,  # [tokens, TOP_K] fp32
    ids_ptr,  # [tokens, TOP_K] int32
    logits_ptr,  # [tokens, EXPERTS] fp32, where WRITE_LOGITS
    tokens,
    parts,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    WRITE_LOGITS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,  # a power of two, at least EXPERTS
    BLOCK_K: tl.constexpr,  # a power of two, at least TOP_K
):
    """Add the parts in their order, score, choose and renormalise BLOCK_TOKENS tokens."""
    t = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    e = tl.arange(0, BLOCK_EXPERTS)
    here, known = t[:, None] < tokens, e[None, :] < EXPERTS
    cell = t[:, None] * EXPERTS + e[None, :]

    logits = tl.load(partial_ptr + cell, mask=here & known, other=0.0)
    for part in range(1, parts):
        plane = tokens.to(tl.int64) * EXPERTS * part
        logits += tl.load(partial_ptr + plane + cell, mask=here & known, other=0.0)
    if WRITE_LOGITS:
        tl.store(logits_ptr + cell, logits, mask=here & known)

    scores = tl.sigmoid(logits)
    biased = scores + tl.load(bias_ptr + e, mask=e < EXPERTS, other=0.0)[None, :]
    # One number to compare: the biased score first, then the lower id. Every expert has its own,
    # above that of the padding, so that what is chosen differs and exists whatever the scores are.
    last = -(2**63)
    key = (ordered(biased).to(tl.int64) << 32) | (BLOCK_EXPERTS - 1 - e)[None, :].to(tl.int64)
    key = tl.where(known, key, last)

    k = tl.arange(0, BLOCK_K)[None, :]
    weights = tl.zeros((BLOCK_TOKENS, BLOCK_K), dtype=tl.float32)
    ids = tl.zeros((BLOCK_TOKENS, BLOCK_K), dtype=tl.int32)
    total = tl.zeros((BLOCK_TOKENS, 1), dtype=tl.float32)
    for rank in tl.static_range(TOP_K):
        best = tl.max(key, axis=1)[:, None]
        taken = key == best
        score = tl.sum(tl.where(taken, scores, 0.0), axis=1)[:, None]
        weights = tl.where(k == rank, score, weights)
        ids = tl.where(k == rank, BLOCK_EXPERTS - 1 - (best & 0xFFFFFFFF).to(tl.int32), ids)
        total += score
        key = tl.where(taken, last, key)
    weights = tl.div_rn(weights, tl.where(total == 0.0, 1.0, total))
    slot = t[:, None] * TOP_K + k
    tl.store(weights_ptr + slot, weights, mask=here & (k < TOP_K))
    tl.store(ids_ptr + slot, ids, mask=here & (k < TOP_K))
