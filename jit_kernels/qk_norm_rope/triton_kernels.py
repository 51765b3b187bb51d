"""The two Triton kernels of the attention prologue; `triton` chooses their arguments and launches.

A program serves one token. Each head is held in up to three tiles of [heads, columns]: the two
halves that a rotation pairs, and the rest. So the partner of a value is at the same place of the
other tile, and each address of a row is loaded in one place of the program and stored in one. Which
threads do so is Triton's choice: several warps load a tile that is smaller than they are together
(K's at TP8), and rows that are not aligned are stored by other threads than load them. Hence the
barrier between the loads and the stores in place. Heads and columns are padded to powers of two and
masked. Arithmetic is fp32. Offsets of rows, pages and slots are int64, within a row int32.

There is no inline assembly, so all of this also runs in Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets [heads, columns] of the first columns of each head of a row, and which are real."""
    head = tl.arange(0, triton.next_power_of_2(HEADS))[:, None]
    column = tl.arange(0, triton.next_power_of_2(COLUMNS))[None, :]
    return head * HEAD_DIM + column, (head < HEADS) & (column < COLUMNS)


@triton.jit
def _load(row, offsets, real):
    """Load a tile as it is stored, 0 where nothing is."""
    return tl.load(row + offsets, mask=real, other=0.0)


@triton.jit
def _store(row, offsets, real, x):
    """Store a tile of fp32 values, rounded once."""
    tl.store(row + offsets, x.to(row.dtype.element_ty), mask=real)


@triton.jit
def _squares(x):
    """The squares of a tile, fp32."""
    x = x.to(tl.float32)
    return x * x


@triton.jit
def _inverse(square_sum, divisor, eps):
    """1 / sqrt(square_sum / divisor + eps), each step rounded correctly, subnormals kept."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square_sum, divisor) + eps))


@triton.jit
def _scaled(x, inverse, weight):
    """x * inverse * weight, in this order: what overflows must overflow as in the reference."""
    return x.to(tl.float32) * inverse * weight.to(tl.float32)


@triton.jit
def _fp8_bits(x, scale, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """The bits of x / scale (fp32) as FP8: saturated, rounded once to nearest even, NaN kept.

    MANTISSA, BIAS: of the format. LARGEST: its largest finite value, as bits of an fp32.
    In integers, since Triton converts exactly to FP8 neither on every GPU nor in its interpreter.
    """
    SHIFT: tl.constexpr = 23 - MANTISSA
    SMALLEST_NORMAL: tl.constexpr = (127 + 1 - BIAS) << 23
    # The fp32 power of two whose unit in the last place is the smallest subnormal of the format.
    UNIT_BITS: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23
    bits = tl.div_rn(x, scale).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    saturated = tl.minimum(size, LARGEST)
    odd = (saturated >> SHIFT) & 1
    rounded = (saturated + ((1 << (SHIFT - 1)) - 1) + odd) >> SHIFT
    normal = rounded - ((127 - BIAS) << MANTISSA)
    unit = tl.full((1, 1), UNIT_BITS, tl.int32).to(tl.float32, bitcast=True)
    # This addition is what rounds a value that becomes subnormal.
    shifted = (saturated.to(tl.float32, bitcast=True) + unit).to(tl.int32, bitcast=True)
    code = tl.where(saturated < SMALLEST_NORMAL, shifted - UNIT_BITS, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _store_cached(
    row, offsets, real, x, scale, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr
):
    """Store a tile of fp32 values in a cache: FP8 bits of x / scale where MANTISSA is not 0."""
    if MANTISSA > 0:
        tl.store(row + offsets, _fp8_bits(x, scale, MANTISSA, BIAS, LARGEST), mask=real)
    else:
        _store(row, offsets, real, x)


@triton.jit
def _slot_row(cache, slot, page_stride, slot_stride, PAGE_SIZE: tl.constexpr):
    """Where `slot` (int64) begins in a cache of pages."""
    return cache + slot // PAGE_SIZE * page_stride + slot % PAGE_SIZE * slot_stride


@triton.jit
def sums_kernel(q, k, sums, q_stride, k_stride, Q_WIDTH: tl.constexpr, KV_WIDTH: tl.constexpr):
    """Write the sums of squares of this rank's q and k to sums [tokens, 2]; a program a token."""
    token = tl.program_id(0).to(tl.int64)
    q_columns, q_real = _tile(1, Q_WIDTH, Q_WIDTH)
    k_columns, k_real = _tile(1, KV_WIDTH, KV_WIDTH)
    q_row = _load(q + token * q_stride, q_columns, q_real)
    k_row = _load(k + token * k_stride, k_columns, k_real)
    tl.store(sums + token * 2, tl.sum(_squares(q_row)))
    tl.store(sums + token * 2 + 1, tl.sum(_squares(k_row)))


@triton.jit
def prologue_kernel(
    q,
    k,
    v,
    q_weight,
    k_weight,
    sums,
    positions,
    cos_sin,
    k_cache,
    v_cache,
    slots,
    q_stride,
    k_stride,
    v_stride,
    k_page_stride,
    k_slot_stride,
    v_page_stride,
    v_slot_stride,
    q_divisor,
    k_divisor,
    eps,
    k_scale,
    v_scale,
    first_slot,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    ALONE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Norm, rotate and store one token in place, and write K and V to the cache; a program a token.

    ALONE: the sums are taken here, else `sums` [tokens, 2] holds those of the group. PAGE_SIZE: 0
    where no cache is written, 1 where it is by slot. MANTISSA, BIAS, LARGEST: see `_fp8_bits`;
    MANTISSA is 0 where the cache is not FP8. What a variant does not use may be any tensor.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    REST: tl.constexpr = HEAD_DIM - ROTARY_DIM
    token = tl.program_id(0).to(tl.int64)
    q_row = q + token * q_stride
    k_row = k + token * k_stride
    # All loads come first, so that they wait for memory together.
    if ROTARY_DIM > 0:
        q_pair, q_pair_real = _tile(Q_HEADS, HEAD_DIM, HALF)
        k_pair, k_pair_real = _tile(KV_HEADS, HEAD_DIM, HALF)
        q_a, q_b = _load(q_row, q_pair, q_pair_real), _load(q_row + HALF, q_pair, q_pair_real)
        k_a, k_b = _load(k_row, k_pair, k_pair_real), _load(k_row + HALF, k_pair, k_pair_real)
        wq_a = _load(q_weight, q_pair, q_pair_real)
        wq_b = _load(q_weight + HALF, q_pair, q_pair_real)
        wk_a = _load(k_weight, k_pair, k_pair_real)
        wk_b = _load(k_weight + HALF, k_pair, k_pair_real)
        angle, angle_real = _tile(1, ROTARY_DIM, HALF)
        angles = cos_sin + tl.load(positions + token).to(tl.int64) * ROTARY_DIM
        cos = _load(angles, angle, angle_real).to(tl.float32)
        sin = _load(angles + HALF, angle, angle_real).to(tl.float32)
    if REST > 0:
        q_rest, q_rest_real = _tile(Q_HEADS, HEAD_DIM, REST)
        k_rest, k_rest_real = _tile(KV_HEADS, HEAD_DIM, REST)
        q_c = _load(q_row + ROTARY_DIM, q_rest, q_rest_real)
        k_c = _load(k_row + ROTARY_DIM, k_rest, k_rest_real)
        wq_c = _load(q_weight + ROTARY_DIM, q_rest, q_rest_real)
        wk_c = _load(k_weight + ROTARY_DIM, k_rest, k_rest_real)
    if PAGE_SIZE > 0:
        slot = tl.load(slots + token).to(tl.int64)
        v_tile, v_real = _tile(KV_HEADS, HEAD_DIM, HEAD_DIM)
        values = _load(v + token * v_stride, v_tile, v_real).to(tl.float32)

    if ALONE:
        q_sum, k_sum = 0.0, 0.0
        if ROTARY_DIM > 0:
            q_sum += tl.sum(_squares(q_a) + _squares(q_b))
            k_sum += tl.sum(_squares(k_a) + _squares(k_b))
        if REST > 0:
            q_sum += tl.sum(_squares(q_c))
            k_sum += tl.sum(_squares(k_c))
    else:
        q_sum, k_sum = tl.load(sums + token * 2), tl.load(sums + token * 2 + 1)
    # No warp stores in place what another has still to load.
    tl.debug_barrier()
    q_inverse = _inverse(q_sum, q_divisor, eps)
    k_inverse = _inverse(k_sum, k_divisor, eps)

    if PAGE_SIZE > 0:
        written = slot >= first_slot
        k_slot = _slot_row(k_cache, slot, k_page_stride, k_slot_stride, PAGE_SIZE)
        v_slot = _slot_row(v_cache, slot, v_page_stride, v_slot_stride, PAGE_SIZE)
        _store_cached(v_slot, v_tile, v_real & written, values, v_scale, MANTISSA, BIAS, LARGEST)
    if ROTARY_DIM > 0:
        a, b = _scaled(q_a, q_inverse, wq_a), _scaled(q_b, q_inverse, wq_b)
        _store(q_row, q_pair, q_pair_real, a * cos - b * sin)
        _store(q_row + HALF, q_pair, q_pair_real, b * cos + a * sin)
        a, b = _scaled(k_a, k_inverse, wk_a), _scaled(k_b, k_inverse, wk_b)
        x, y = a * cos - b * sin, b * cos + a * sin
        _store(k_row, k_pair, k_pair_real, x)
        _store(k_row + HALF, k_pair, k_pair_real, y)
        if PAGE_SIZE > 0:
            real = k_pair_real & written
            _store_cached(k_slot, k_pair, real, x, k_scale, MANTISSA, BIAS, LARGEST)
            _store_cached(k_slot + HALF, k_pair, real, y, k_scale, MANTISSA, BIAS, LARGEST)
    if REST > 0:
        _store(q_row + ROTARY_DIM, q_rest, q_rest_real, _scaled(q_c, q_inverse, wq_c))
        c = _scaled(k_c, k_inverse, wk_c)
        _store(k_row + ROTARY_DIM, k_rest, k_rest_real, c)
        if PAGE_SIZE > 0:
            real = k_rest_real & written
            _store_cached(k_slot + ROTARY_DIM, k_rest, real, c, k_scale, MANTISSA, BIAS, LARGEST)
