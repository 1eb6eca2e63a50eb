"""Triton kernels for streams that attention cannot take as they are: norm, weight and rotary embedding of q or k.

A rotation mixes channels, so it does not commute with a norm's weight, and folding it into the score as kernels.py does
with the norm is not possible. A head is held as two halves, (0, 2, ...) and (1, 3, ...) if INTERLEAVED, otherwise the
lower and the upper: the pairs that a rotation turns.
"""

import triton
import triton.language as tl

from rfkernels.joint_attention.kernels import _base, _valid


@triton.jit
def _halves(base, stride, token, live, INTERLEAVED: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Both halves of the rows, fp32 [BLOCK, BLOCK_H]; zero outside."""
    i = tl.arange(0, BLOCK_H)
    rows = base + token.to(tl.int64)[:, None] * stride
    mask = live[:, None] & (i < H)[None, :]
    if INTERLEAVED:
        both = tl.arange(0, 2)[None, None, :] + 2 * i[None, :, None]
        return tl.split(tl.load(rows[:, :, None] + both, mask=mask[:, :, None], other=0.0).to(tl.float32))
    else:
        low = tl.load(rows + i[None, :], mask=mask, other=0.0).to(tl.float32)
        return low, tl.load(rows + H + i[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(
    base, stride, token, live, low, high, INTERLEAVED: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr
):
    i = tl.arange(0, BLOCK_H)
    rows = base + token.to(tl.int64)[:, None] * stride
    mask = live[:, None] & (i < H)[None, :]
    dtype = base.dtype.element_ty
    if INTERLEAVED:
        both = tl.arange(0, 2)[None, None, :] + 2 * i[None, :, None]
        tl.store(rows[:, :, None] + both, tl.join(low, high).to(dtype), mask=mask[:, :, None])
    else:
        tl.store(rows + i[None, :], low.to(dtype), mask=mask)
        tl.store(rows + H + i[None, :], high.to(dtype), mask=mask)


@triton.jit
def _columns(INTERLEAVED: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Channels of the two halves, and which of them exist."""
    i = tl.arange(0, BLOCK_H)
    if INTERLEAVED:
        return 2 * i, 2 * i + 1, i < H
    else:
        return i, H + i, i < H


@triton.jit
def _weights(ptr, INTERLEAVED: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr):
    low, high, inside = _columns(INTERLEAVED, H, BLOCK_H)
    w_low = tl.load(ptr + low, mask=inside, other=0.0).to(tl.float32)[None, :]
    return w_low, tl.load(ptr + high, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _angles(cos_ptr, sin_ptr, b, token, live, stride_b, stride_s, H: tl.constexpr, BLOCK_H: tl.constexpr):
    i = tl.arange(0, BLOCK_H)
    here = b.to(tl.int64) * stride_b + token.to(tl.int64)[:, None] * stride_s + i[None, :]
    mask = live[:, None] & (i < H)[None, :]
    cos = tl.load(cos_ptr + here, mask=mask, other=0.0).to(tl.float32)
    return cos, tl.load(sin_ptr + here, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _scaled(low, high, eps, H: tl.constexpr):
    """rstd of the rows, [BLOCK, 1]."""
    return tl.rsqrt(tl.sum(low * low + high * high, 1) / (2 * H) + eps)[:, None]


@triton.jit(do_not_specialize=["S"])
def prepare_fwd(
    x_ptr, out_ptr, weight_ptr, cos_ptr, sin_ptr, lengths_ptr, x_strides, out_strides, angle_strides, S, eps,
    NORM: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, LENGTHS: tl.constexpr,
    H: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out = rotate(rmsnorm(x) * weight), [B, S, heads, 2 H]. Program: BLOCK tokens, a head, a sample."""
    token, h, b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1), tl.program_id(2)
    live = token < _valid(b, S, lengths_ptr, LENGTHS)                       # padding is not read, and becomes zeros
    low, high = _halves(_base(x_ptr, b, h, x_strides), x_strides[1], token, live, INTERLEAVED, H, BLOCK_H)
    if NORM:
        rstd = _scaled(low, high, eps, H)
        w_low, w_high = _weights(weight_ptr, INTERLEAVED, H, BLOCK_H)
        low, high = low * rstd * w_low, high * rstd * w_high
    if ROPE:
        cos, sin = _angles(cos_ptr, sin_ptr, b, token, live, angle_strides[0], angle_strides[1], H, BLOCK_H)
        low, high = low * cos - high * sin, high * cos + low * sin
    out = _base(out_ptr, b, h, out_strides)
    _store_halves(out, out_strides[1], token, token < S, low, high, INTERLEAVED, H, BLOCK_H)


@triton.jit(do_not_specialize=["S"])
def prepare_bwd(
    dout_ptr, x_ptr, dx_ptr, weight_ptr, cos_ptr, sin_ptr, lengths_ptr, partials_ptr,
    dout_strides, x_strides, dx_strides, angle_strides, S, eps,
    NORM: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, LENGTHS: tl.constexpr,
    H: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dx, and a row of partials [tiles * heads * B, 2 H] of dweight."""
    token, h, b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1), tl.program_id(2)
    live = token < _valid(b, S, lengths_ptr, LENGTHS)                       # padding is not read, and becomes zeros
    low, high = _halves(_base(dout_ptr, b, h, dout_strides), dout_strides[1], token, live, INTERLEAVED, H, BLOCK_H)
    if ROPE:
        cos, sin = _angles(cos_ptr, sin_ptr, b, token, live, angle_strides[0], angle_strides[1], H, BLOCK_H)
        low, high = low * cos + high * sin, high * cos - low * sin
    if NORM:
        n_low, n_high = _halves(_base(x_ptr, b, h, x_strides), x_strides[1], token, live, INTERLEAVED, H, BLOCK_H)
        rstd = _scaled(n_low, n_high, eps, H)
        n_low, n_high = n_low * rstd, n_high * rstd
        columns_low, columns_high, inside = _columns(INTERLEAVED, H, BLOCK_H)
        row = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + b) * tl.num_programs(1) + h
        tl.store(partials_ptr + row * 2 * H + columns_low, tl.sum(low * n_low, 0), mask=inside)
        tl.store(partials_ptr + row * 2 * H + columns_high, tl.sum(high * n_high, 0), mask=inside)
        w_low, w_high = _weights(weight_ptr, INTERLEAVED, H, BLOCK_H)
        low, high = low * w_low, high * w_high
        mean = (tl.sum(low * n_low + high * n_high, 1) / (2 * H))[:, None]
        low, high = rstd * (low - n_low * mean), rstd * (high - n_high * mean)
    dx = _base(dx_ptr, b, h, dx_strides)
    _store_halves(dx, dx_strides[1], token, token < S, low, high, INTERLEAVED, H, BLOCK_H)
