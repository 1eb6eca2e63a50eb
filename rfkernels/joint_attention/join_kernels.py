"""Triton kernels around a library's attention: the packed projections of several streams as one q, one k and one v,
with the norms of q and k, and back.

A program holds some tokens of one stream, HEADS heads of them, and one of q, k and v: whole lines of the projection.
Tokens are numbered through the samples of their stream. Conventions as in kernels.py.
"""

import triton
import triton.language as tl

from rfkernels.joint_attention.kernels import _locate, _of


@triton.jit
def _one_of(part, q, k, v):
    return tl.where(part == 0, q, tl.where(part == 1, k, v))


@triton.jit
def _before(which, sizes, N: tl.constexpr):
    """Tokens of a sample in the streams before this one."""
    passed = which * 0
    for i in tl.static_range(1, N):
        passed += tl.where(which >= i, sizes[i - 1], 0)
    return passed


@triton.jit
def _tile(token, size, before, h, strides, BLOCK_D: tl.constexpr):
    """Element offsets of tokens, numbered through samples of `size`, the first of them at `before`; strides (batch,
    token, head). int64 [TOKENS, HEADS, BLOCK_D]."""
    b, s = (token // size).to(tl.int64), (token % size + before).to(tl.int64)
    rows = (b * strides[0] + s * strides[1])[:, None] + h.to(tl.int64)[None, :] * strides[2]
    return rows[:, :, None] + tl.arange(0, BLOCK_D)[None, None, :]


@triton.jit
def _inside(live, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    if D < BLOCK_D:
        return live[:, None, None] & (tl.arange(0, BLOCK_D) < D)[None, None, :]
    else:
        return live[:, None, None]


@triton.jit
def _weight(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    return tl.load(ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, None, :]


@triton.jit(do_not_specialize=["batch", "total", "S0", "S1", "S2", "S3"])
def join_fwd(
    packed, q_weights, k_weights, q_ptr, k_ptr, v_ptr, strides, batch, total, eps, S0, S1, S2, S3,
    NORM: tl.constexpr, D: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q, k, v [batch, total, H, D], contiguous, of N projections [batch, S_i, 3, H, D]; strides (batch, token, part,
    head). Program: TOKENS tokens of a stream, HEADS heads, one of q, k, v."""
    sizes = (S0, S1, S2, S3)
    which, first, _ = _locate(tl.program_id(0), (S0 * batch, S1 * batch, S2 * batch, S3 * batch), N, TOKENS)
    size, before, part = _of(which, sizes, N), _before(which, sizes, N), tl.program_id(2)
    token, h = first + tl.arange(0, TOKENS), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = _inside(token < size * batch, HEADS, D, BLOCK_D)
    own = (_of(which, strides[0], N), _of(which, strides[1], N), _of(which, strides[3], N))
    here = _of(which, packed, N) + part * _of(which, strides[2], N) + _tile(token, size, 0, h, own, BLOCK_D)
    x = tl.load(here, mask=inside, other=0.0)
    heads = tl.num_programs(1) * HEADS
    joint = (total.to(tl.int64) * heads * D, heads * D, D)
    out = _one_of(part, q_ptr, k_ptr, v_ptr) + _tile(token, size, before, h, joint, BLOCK_D)
    if NORM and part < 2:
        wide = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, 2) / D + eps)[:, :, None]
        weight = _weight(tl.where(part == 0, _of(which, q_weights, N), _of(which, k_weights, N)), D, BLOCK_D)
        tl.store(out, (wide * rstd * weight).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out, x, mask=inside)


@triton.jit
def _part(
    dy_ptr, x_ptr, dx_ptr, weight_ptr, weight_sums_ptr, bias_sums_ptr, dy_strides, x_strides, dx_strides,
    first, stop, size, before, h, eps,
    NORM: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx of the tokens from `first` to `stop`, and its sum over them; if NORM, the norm's share of dweight too."""
    bias = tl.zeros([TOKENS, HEADS, BLOCK_D], tl.float32)
    weight = tl.zeros([TOKENS, HEADS, BLOCK_D], tl.float32)
    d = tl.arange(0, BLOCK_D)
    for start in tl.range(first, stop, TOKENS, num_stages=STAGES):
        token = start + tl.arange(0, TOKENS)
        inside = _inside(token < stop, HEADS, D, BLOCK_D)
        dx = tl.load(dy_ptr + _tile(token, size, before, h, dy_strides, BLOCK_D), mask=inside, other=0.0)
        dx = dx.to(tl.float32)
        if NORM:
            x = tl.load(x_ptr + _tile(token, size, 0, h, x_strides, BLOCK_D), mask=inside, other=0.0).to(tl.float32)
            rstd = tl.rsqrt(tl.sum(x * x, 2) / D + eps)[:, :, None]
            n = x * rstd
            weight += dx * n
            g = dx * _weight(weight_ptr, D, BLOCK_D)
            dx = rstd * (g - n * (tl.sum(g * n, 2) / D)[:, :, None])
        bias += dx
        out = dx_ptr + _tile(token, size, 0, h, dx_strides, BLOCK_D)
        tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(bias_sums_ptr + h[:, None] * D + d[None, :], tl.sum(bias, 0), mask=(d < D)[None, :])
    if NORM:
        tl.store(weight_sums_ptr + d, tl.sum(tl.sum(weight, 0), 0), mask=d < D)


@triton.jit(do_not_specialize=["batch", "span", "S0", "S1", "S2", "S3"])
def join_bwd(
    dq_ptr, dk_ptr, dv_ptr, packed, dpacked, q_weights, k_weights, weight_sums_ptr, bias_sums_ptr,
    dq_strides, dk_strides, dv_strides, strides, dstrides, batch, span, eps, S0, S1, S2, S3,
    NORM: tl.constexpr, D: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the projections from those of the joint q, k, v. Program (p, g, part): `span` tokens of a stream,
    HEADS heads, one of q, k, v. It leaves sums over its tokens: of the gradient in a part of row p of bias_sums [P, 3,
    H, D] and, of q and k if NORM, of the norm weight's in weight_sums [2, P, H / HEADS, D]."""
    sizes = (S0, S1, S2, S3)
    p, g, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    which, first, _ = _locate(p, (S0 * batch, S1 * batch, S2 * batch, S3 * batch), N, span)
    size, before = _of(which, sizes, N), _before(which, sizes, N)
    stop = tl.minimum(first + span, size * batch)
    h, heads = g * HEADS + tl.arange(0, HEADS), tl.num_programs(1) * HEADS
    own = (_of(which, strides[0], N), _of(which, strides[1], N), _of(which, strides[3], N))
    out = (_of(which, dstrides[0], N), _of(which, dstrides[1], N), _of(which, dstrides[3], N))
    x_ptr = _of(which, packed, N) + part * _of(which, strides[2], N)
    dx_ptr = _of(which, dpacked, N) + part * _of(which, dstrides[2], N)
    bias_sums_ptr += (p.to(tl.int64) * 3 + part) * heads * D
    weight_sums_ptr += ((part.to(tl.int64) * tl.num_programs(0) + p) * tl.num_programs(1) + g) * D
    if part == 0:
        weight_ptr = _of(which, q_weights, N)
        _part(dq_ptr, x_ptr, dx_ptr, weight_ptr, weight_sums_ptr, bias_sums_ptr, dq_strides, own, out, first, stop,
              size, before, h, eps, NORM, D, TOKENS, HEADS, BLOCK_D, STAGES)  # fmt: skip
    elif part == 1:
        weight_ptr = _of(which, k_weights, N)
        _part(dk_ptr, x_ptr, dx_ptr, weight_ptr, weight_sums_ptr, bias_sums_ptr, dk_strides, own, out, first, stop,
              size, before, h, eps, NORM, D, TOKENS, HEADS, BLOCK_D, STAGES)  # fmt: skip
    else:
        _part(dv_ptr, x_ptr, dx_ptr, x_ptr, weight_sums_ptr, bias_sums_ptr, dv_strides, own, out, first, stop,
              size, before, h, eps, False, D, TOKENS, HEADS, BLOCK_D, STAGES)  # fmt: skip
