"""Triton kernels of qk_norm: RMSNorm over the head dimension of q and k in one launch, many narrow rows a program.

A row is one head of one token of one sample; rows are numbered (sample, token, head), so a program's rows are next to
each other in a packed qkv as well as in a tensor of their own.
"""

import triton
import triton.language as tl


@triton.jit
def _offsets(row, strides, S, H, columns):
    """Where rows of [B, S, H, D] start, plus columns; int64 [ROWS, BLOCK_D]."""
    h, token = row % H, row // H
    s, b = (token % S).to(tl.int64), (token // S).to(tl.int64)
    return (b * strides[0] + s * strides[1] + h.to(tl.int64) * strides[2])[:, None] + columns[None, :]


@triton.jit
def _norm(
    x_ptr, weight_ptr, out_ptr, strides, S, H, rows, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + _offsets(row, strides, S, H, columns), mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    here = row.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(out_ptr + here, (x * rstd[:, None] * weight[None, :]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["q_rows", "k_rows", "q_length", "k_length"])
def qk_norm_fwd(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr, q_strides, k_strides,
    q_length, k_length, q_heads, k_heads, q_rows, k_rows, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program: ROWS rows of q (second index 0) or k (1)."""
    if tl.program_id(1) == 0:
        _norm(q_ptr, q_weight_ptr, q_out_ptr, q_strides, q_length, q_heads, q_rows, eps, D, ROWS, BLOCK_D)
    else:
        _norm(k_ptr, k_weight_ptr, k_out_ptr, k_strides, k_length, k_heads, k_rows, eps, D, ROWS, BLOCK_D)


@triton.jit
def _norm_backward(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, partials_ptr, dy_strides, strides, S, H, rows, span, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx of `span` rows, ROWS at a time, and the sum of their shares of dweight, partials[program, D] fp32."""
    columns = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([ROWS, BLOCK_D], tl.float32)
    first = tl.program_id(0) * span
    end = tl.minimum(first + span, rows)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & (columns < D)[None, :]
        x = tl.load(x_ptr + _offsets(row, strides, S, H, columns), mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + _offsets(row, dy_strides, S, H, columns), mask=mask, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        n = x * rstd
        dweight += dy * n
        g = dy * weight
        dx = rstd * (g - n * (tl.sum(g * n, 1) / D)[:, None])
        here = row.to(tl.int64)[:, None] * D + columns[None, :]
        tl.store(dx_ptr + here, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(partials_ptr + tl.program_id(0) * D + columns, tl.sum(dweight, 0), mask=columns < D)


@triton.jit(do_not_specialize=["q_rows", "k_rows", "q_length", "k_length", "q_span", "k_span"])
def qk_norm_bwd(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, dq_ptr, dk_ptr, q_partials_ptr, k_partials_ptr,
    dq_strides, dk_strides, q_strides, k_strides, q_length, k_length, q_heads, k_heads, q_rows, k_rows, q_span, k_span,
    eps, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program: a span of rows of q (second index 0) or k (1)."""
    if tl.program_id(1) == 0:
        _norm_backward(dq_out_ptr, q_ptr, q_weight_ptr, dq_ptr, q_partials_ptr, dq_strides, q_strides, q_length,
                       q_heads, q_rows, q_span, eps, D, ROWS, BLOCK_D)  # fmt: skip
    else:
        _norm_backward(dk_out_ptr, k_ptr, k_weight_ptr, dk_ptr, k_partials_ptr, dk_strides, k_strides, k_length,
                       k_heads, k_rows, k_span, eps, D, ROWS, BLOCK_D)  # fmt: skip
