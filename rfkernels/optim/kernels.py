"""Triton kernel of AdamW with states of few bits: reference.py, in one pass over any number of parameters."""

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
    return _mixed(_mixed(_mixed(key ^ PURPOSE) ^ rows) ^ columns) >> 8


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


@triton.jit
def _array(entry, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address of the table as a pointer."""
    array = tl.load(entry + FIELD).to(tl.pointer_type(TYPE))
    if ALIGNED:
        array = tl.multiple_of(array, 16)
    return array


@triton.jit
def adamw_step(
    table_ptr, programs_ptr, grad_scale_ptr, found_inf_ptr,
    lr, beta1, beta2, rest1, rest2, log1, log2, eps, decay,
    WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr, SCALED: tl.constexpr, CHECKED: tl.constexpr,
    FIELDS: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates p, m and v of parameters in place. rest is 1 - beta, log its logarithm, decay 1 - lr * weight_decay: with
    more digits than fp32 arithmetic would leave them.

    A row of the table is a parameter: launch.Row. A program takes TILES times BLOCKS blocks, each BLOCK elements of a
    row, of the parameter and from the block that `programs` names.
    """
    EIGHT: tl.constexpr = FIRST == tl.int8  # noqa: SIM300
    entry = table_ptr + tl.load(programs_ptr + 2 * tl.program_id(0)).to(tl.int64) * FIELDS
    first_block = tl.load(programs_ptr + 2 * tl.program_id(0) + 1)
    p_ptr, g_ptr = _array(entry, 0, WEIGHT, ALIGNED), _array(entry, 1, GRADIENT, ALIGNED)
    m_ptr, v_ptr = _array(entry, 2, FIRST, ALIGNED), _array(entry, 3, SECOND, ALIGNED)
    m_scale_ptr, v_scale_ptr = _array(entry, 4, tl.float32, False), _array(entry, 5, tl.float32, False)
    step = tl.load(_array(entry, 6, tl.float32, False))
    columns, count = tl.load(entry + 7), tl.load(entry + 8).to(tl.int32)
    if ALIGNED:
        columns = tl.multiple_of(columns, 16)
    first_row, seed = tl.load(entry + 9).to(tl.uint32), tl.load(entry + 10).to(tl.uint32)
    per_row = tl.cdiv(columns, BLOCK).to(tl.int32)
    if CHECKED:                                                            # a step that is not taken touches nothing
        count = tl.where(tl.load(found_inf_ptr) > 0.5, 0, count)
    key = _mixed(step.to(tl.uint32) ^ seed)
    first, second = _one_less_power(step * log1), _one_less_power(step * log2)
    for tile in range(TILES):
        numbers = first_block + tile * BLOCKS + tl.arange(0, BLOCKS)
        rows, column = numbers // per_row, (numbers % per_row * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
        live, there = numbers < count, (numbers < count)[:, None] & (column < columns)
        at = rows.to(tl.int64)[:, None] * columns + column                                    # [BLOCKS, BLOCK]
        g = tl.load(g_ptr + at, mask=there, other=0.0).to(tl.float32)
        if SCALED:
            g = tl.div_rn(g, tl.load(grad_scale_ptr).to(tl.float32))
        m, v = tl.load(m_ptr + at, mask=there, other=0), tl.load(v_ptr + at, mask=there, other=0)
        p = tl.load(p_ptr + at, mask=there, other=0.0).to(tl.float32)
        if EIGHT:
            m = _decoded(m, tl.load(m_scale_ptr + numbers, mask=live, other=0.0), 127)
            r = _decoded(v, tl.load(v_scale_ptr + numbers, mask=live, other=0.0), 255)
            v = r * r
        m = beta1 * m.to(tl.float32) + rest1 * g
        v = beta2 * v.to(tl.float32) + rest2 * g * g
        p = decay * p - lr * tl.div_rn(tl.div_rn(m, first), tl.sqrt_rn(tl.div_rn(v, second)) + eps)
        if VECTOR:                                                         # a row here, for the noise a column
            row, col = column.to(tl.uint32) + first_row, tl.zeros_like(column).to(tl.uint32)
        else:
            row, col = (rows.to(tl.uint32) + first_row)[:, None], column.to(tl.uint32)
        if WEIGHT == tl.bfloat16:  # noqa: SIM300
            tl.store(p_ptr + at, _to_bf16(p, _noise(key, row, col, 2)), mask=there)
        else:
            tl.store(p_ptr + at, p.to(WEIGHT), mask=there)
        if EIGHT:
            code, scale = _encoded(m, _noise(key, row, col, 0), 127)
            tl.store(m_ptr + at, tl.where(m < 0, -code, code).to(tl.int8), mask=there)
            tl.store(m_scale_ptr + numbers, scale, mask=live)
            code, scale = _encoded(tl.sqrt_rn(v), _noise(key, row, col, 1), 255)
            tl.store(v_ptr + at, tl.maximum(code, 1.0).to(tl.uint8), mask=there)
            tl.store(v_scale_ptr + numbers, scale, mask=live)
        elif FIRST == tl.bfloat16:  # noqa: SIM300
            tl.store(m_ptr + at, _to_bf16(m, _noise(key, row, col, 0)), mask=there)
            tl.store(v_ptr + at, _to_bf16(v, _noise(key, row, col, 1)), mask=there)
        else:
            tl.store(m_ptr + at, m, mask=there)
            tl.store(v_ptr + at, v, mask=there)
