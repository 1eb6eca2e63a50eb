"""Triton kernel of AdamW with states of few bits: reference.py, in one pass. A program takes BLOCKS blocks of BLOCK
elements of rows, numbered row by row."""

import triton
import triton.language as tl


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _noise(key, rows, columns, PURPOSE: tl.constexpr):
    """24 random bits for each element."""
    row = _mixed(_mixed(key ^ PURPOSE) ^ rows)[:, None]
    return _mixed(row ^ columns) >> 8


@triton.jit
def _to_bf16(x, bits):
    raised = x.to(tl.uint32, bitcast=True) + (bits >> 8)
    return (raised & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _fourth(code, CODES: tl.constexpr):
    share = code / CODES
    square = share * share
    return square * square


@triton.jit
def _encoded(x, bits, CODES: tl.constexpr):
    """(codes of the magnitudes, the scale of each block)"""
    scale = tl.max(tl.abs(x), 1)
    least = 1.1754943508222875e-38
    share = tl.minimum(tl.div_rn(tl.abs(x), tl.maximum(scale, least)[:, None] + 0.0 * x), 1.0)
    low = tl.minimum(tl.floor(tl.sqrt_rn(tl.sqrt_rn(share)) * CODES), CODES - 1.0)
    below, above = _fourth(low, CODES), _fourth(low + 1.0, CODES)
    up = bits.to(tl.float32) * 5.960464477539063e-08 < tl.div_rn(share - below, above - below)
    return low + tl.where(up, 1.0, 0.0), scale


@triton.jit
def _decoded(code, scale, CODES: tl.constexpr):
    code = code.to(tl.float32)
    value = _fourth(code, CODES) * scale[:, None]
    return tl.where(code < 0, -value, value)


@triton.jit
def _one_less_power(x):
    """1 - e^x for x <= 0, also near 0, where 1 - exp(x) has few digits left."""
    series = 1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6))))
    return tl.where(x > -0.25, -x * series, 1.0 - tl.exp(x))


@triton.jit(do_not_specialize=["count", "first_row", "seed"])
def adamw_step(
    p_ptr, g_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, step_ptr, grad_scale_ptr, found_inf_ptr,
    count, columns, per_row, first_row, seed, lr, beta1, beta2, rest1, rest2, log1, log2, eps, decay,
    EIGHT: tl.constexpr, BF16: tl.constexpr, BF16_WEIGHT: tl.constexpr, SCALED: tl.constexpr, CHECKED: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates `count` blocks of p, m and v in place; rest is 1 - beta, log its logarithm, decay 1 - lr * weight_decay:
    with more digits than fp32 arithmetic would leave them."""
    numbers = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    if CHECKED:                                                            # a step that is not taken touches nothing
        count = tl.where(tl.load(found_inf_ptr) > 0.5, 0, count)
    rows, column = numbers // per_row, (numbers % per_row * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    live, there = numbers < count, (numbers < count)[:, None] & (column < columns)
    at = rows[:, None] * columns + column                                                     # [BLOCKS, BLOCK]
    step = tl.load(step_ptr)
    g = tl.load(g_ptr + at, mask=there, other=0.0).to(tl.float32)
    if SCALED:
        g = tl.div_rn(g, tl.load(grad_scale_ptr).to(tl.float32))
    m, v = tl.load(m_ptr + at, mask=there, other=0), tl.load(v_ptr + at, mask=there, other=0)
    if EIGHT:
        m = _decoded(m, tl.load(m_scale_ptr + numbers, mask=live, other=0.0), 127)
        r = _decoded(v, tl.load(v_scale_ptr + numbers, mask=live, other=0.0), 255)
        v = r * r
    m = beta1 * m.to(tl.float32) + rest1 * g
    v = beta2 * v.to(tl.float32) + rest2 * g * g
    first, second = _one_less_power(step * log1), _one_less_power(step * log2)
    p = tl.load(p_ptr + at, mask=there, other=0.0).to(tl.float32)
    p = decay * p - lr * tl.div_rn(tl.div_rn(m, first), tl.sqrt_rn(tl.div_rn(v, second)) + eps)
    key = _mixed(step.to(tl.uint32) ^ seed.to(tl.uint32))
    row, col = (rows + first_row).to(tl.uint32), column.to(tl.uint32)
    if BF16_WEIGHT:
        tl.store(p_ptr + at, _to_bf16(p, _noise(key, row, col, 2)), mask=there)
    else:
        tl.store(p_ptr + at, p.to(p_ptr.dtype.element_ty), mask=there)
    if EIGHT:
        code, scale = _encoded(m, _noise(key, row, col, 0), 127)
        tl.store(m_ptr + at, tl.where(m < 0, -code, code).to(tl.int8), mask=there)
        tl.store(m_scale_ptr + numbers, scale, mask=live)
        code, scale = _encoded(tl.sqrt_rn(v), _noise(key, row, col, 1), 255)
        tl.store(v_ptr + at, tl.maximum(code, 1.0).to(tl.uint8), mask=there)
        tl.store(v_scale_ptr + numbers, scale, mask=live)
    elif BF16:
        tl.store(m_ptr + at, _to_bf16(m, _noise(key, row, col, 0)), mask=there)
        tl.store(v_ptr + at, _to_bf16(v, _noise(key, row, col, 1)), mask=there)
    else:
        tl.store(m_ptr + at, m, mask=there)
        tl.store(v_ptr + at, v, mask=there)
