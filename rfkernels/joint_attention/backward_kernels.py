"""Triton kernels of joint attention's backward. Conventions as in kernels.py.

Two kernels, no atomics: one walks over keys for a tile of queries, one over queries for a tile of keys, each with the
gradient of its own tile in registers, and both end with the norm's backward before they store. The first leaves what
the second needs: delta = sum(out * dout), and the folded query tiles, so that both recompute the scores of the forward
to the bit: a softmax recomputed from other roundings does not sum to one. With n = x * rstd, g the gradient of n * w:
    dx = rstd * (w * g - n * mean(w * g * n)),    dw = sum over tokens of g * n
A key's w * g is what the second kernel accumulates; g itself is in the first one, which sums both weights' gradients.
"""

import triton
import triton.language as tl

from rfkernels.joint_attention.kernels import (
    _base,
    _locate,
    _of,
    _row,
    _rows,
    _rstd,
    _valid,
    _weight,
    folded_queries,
    normalized,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _norm_backward(g, n, rstd, D: tl.constexpr):
    """dx of n = x * rstd for g, the gradient of n; all fp32 [BLOCK, BLOCK_D], rstd [BLOCK, 1]."""
    return rstd * (g - n * (tl.sum(g * n, 1) / D)[:, None])


@triton.jit
def _store_sum(partials_ptr, section, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sum over the tile's tokens to this program's row in a section of partials [sections, programs, D]."""
    tiles, heads, batch = tl.num_programs(0).to(tl.int64), tl.num_programs(1), tl.num_programs(2)
    row = ((section * tiles + tl.program_id(0)) * batch + tl.program_id(2)) * heads + tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    tl.store(partials_ptr + row * D + d, tl.sum(value, 0), mask=d < D)


@triton.jit
def _store(base, stride, first, size, value, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    token, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    here = base + tl.cast(first, tl.int64) * stride + (token[:, None] * stride + d[None, :])
    tl.store(here, value.to(base.dtype.element_ty), mask=((first + token) < size)[:, None] & (d < D)[None, :])


@triton.jit
def _query_gradient(
    acc, q, dout, lse, delta, k_base, v_base, rstd_ptr, scale, stride_k, stride_v, first, stop,
    MASKED: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """acc += dS K for one tile of keys, as read; their weight is still to come."""
    k = _rows(k_base, stride_k, first, stop, MASKED, D, BLOCK_N, BLOCK_D)
    v = _rows(v_base, stride_v, first, stop, MASKED, D, BLOCK_N, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)                              # [BLOCK_M, BLOCK_N]
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if NORM:
        rstd = _row(rstd_ptr, first, stop, 0.0, MASKED, BLOCK_N)[None, :]
        s = s * rstd                                                                   # the scale is in q
    else:
        s = s * scale
    p = tl.exp2(s - lse[:, None])
    if MASKED:
        p = tl.where((first + tl.arange(0, BLOCK_N) < stop)[None, :], p, 0.0)
    ds = p * (dp - delta[:, None])
    if NORM and k.dtype == tl.float16:               # ds * rstd would leave fp16's range; k * rstd is near 1
        own = _row(rstd_ptr, first, stop, 0.0, MASKED, BLOCK_N)[:, None]
        k = (k.to(tl.float32) * own).to(k.dtype)
    elif NORM:
        ds = ds * rstd
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["queries", "keys", "Q0", "Q1", "Q2", "Q3", "S0", "S1", "S2", "S3"])
def attention_bwd_q(
    qs, ks, vs, outs, douts, dqs, folds, q_weights, k_weights, q_lengths, k_lengths,
    q_strides, k_strides, v_strides, dout_strides, dq_strides,
    rstd_ptr, lse_ptr, delta_ptr, partials_ptr, scale, eps, queries, keys, Q0, Q1, Q2, Q3, S0, S1, S2, S3,
    NORM: tl.constexpr, LENGTHS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, NQ: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq, delta [B, H, queries] and, if NORM, the folded queries [N, B, S, H, D] in the input's dtype and partials
    [1 + N, tiles * B * H, D] of dq_weight and each dk_weight. If BIAS, one more section of them: sums of dq over the
    tokens of a tile. `scale` is in units of log2, as in the forward."""
    q_sizes, sizes = (Q0, Q1, Q2, Q3), (S0, S1, S2, S3)
    which, first, before = _locate(tl.program_id(0), q_sizes, NQ, BLOCK_M)
    h, b = tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    size = _of(which, q_sizes, NQ)
    valid = _valid(b, size, _of(which, q_lengths, NQ), LENGTHS)
    strides = (_of(which, q_strides[0], NQ), _of(which, q_strides[1], NQ), _of(which, q_strides[2], NQ))
    q_base = _base(_of(which, qs, NQ), b, h, strides)
    weight_ptr = _of(which, q_weights, NQ)
    q = _rows(q_base, strides[1], first, valid, True, D, BLOCK_M, BLOCK_D)
    folded, _ = folded_queries(q, eps, scale, weight_ptr, k_weights, NORM, D, N, BLOCK_M, BLOCK_D)
    dout_at = (_of(which, dout_strides[0], NQ), _of(which, dout_strides[1], NQ), _of(which, dout_strides[2], NQ))
    dout_base = _base(_of(which, douts, NQ), b, h, dout_at)
    dout = _rows(dout_base, dout_at[1], first, valid, True, D, BLOCK_M, BLOCK_D)
    own = (size.to(tl.int64) * heads * D, heads * D, D)                   # a contiguous tensor of this stream
    out = _rows(_base(_of(which, outs, NQ), b, h, own), own[1], first, valid, True, D, BLOCK_M, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    bh = b.to(tl.int64) * heads + h
    token = first + tl.arange(0, BLOCK_M)
    tl.store(delta_ptr + bh * queries + before + token, delta, mask=token < size)
    lse = _row(lse_ptr + bh * queries + before, first, valid, float("inf"), True, BLOCK_M)
    if NORM:
        for i in tl.static_range(N):
            fold = _of(which, folds, NQ) + i * tl.num_programs(2).to(tl.int64) * own[0]
            _store(_base(fold, b, h, own), own[1], first, size, folded[i], D, BLOCK_M, BLOCK_D)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    rstd_ptr += bh * keys
    for i in tl.static_range(N):
        strides_k = (k_strides[0][i], k_strides[1][i], k_strides[2][i])
        strides_v = (v_strides[0][i], v_strides[1][i], v_strides[2][i])
        k_base, v_base = _base(ks[i], b, h, strides_k), _base(vs[i], b, h, strides_v)
        stop = tl.where(first < valid, _valid(b, sizes[i], k_lengths[i], LENGTHS), 0)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        full = stop // BLOCK_N * BLOCK_N
        for start in range(0, full, BLOCK_N):
            acc = _query_gradient(
                acc, folded[i], dout, lse, delta, k_base, v_base, rstd_ptr, scale, strides_k[1], strides_v[1],
                start, stop, False, NORM, PRECISION, D, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        if full < stop:
            acc = _query_gradient(
                acc, folded[i], dout, lse, delta, k_base, v_base, rstd_ptr, scale, strides_k[1], strides_v[1],
                full, stop, True, NORM, PRECISION, D, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        acc = acc * (scale * LN2)                                         # back from units of log2
        if NORM:
            again = _rows(q_base, strides[1], first, valid, True, D, BLOCK_M, BLOCK_D)      # not kept over the loops
            _store_sum(partials_ptr, 1 + i, acc * normalized(again, eps, weight_ptr, D, BLOCK_D), D, BLOCK_D)
            acc = acc * _weight(k_weights[i], D, BLOCK_D)
        dq += acc
        rstd_ptr += sizes[i]
    if NORM:
        q = _rows(q_base, strides[1], first, valid, True, D, BLOCK_M, BLOCK_D).to(tl.float32)
        rstd = _rstd(q, eps, D)
        _store_sum(partials_ptr, 0, dq * q * rstd, D, BLOCK_D)
        dq = _norm_backward(dq * _weight(weight_ptr, D, BLOCK_D), q * rstd, rstd, D)
    dq_at = (_of(which, dq_strides[0], NQ), _of(which, dq_strides[1], NQ), _of(which, dq_strides[2], NQ))
    _store(_base(_of(which, dqs, NQ), b, h, dq_at), dq_at[1], first, size, dq, D, BLOCK_M, BLOCK_D)
    if BIAS:
        _store_sum(partials_ptr, 1 + N if NORM else 0, dq, D, BLOCK_D)


@triton.jit
def _key_gradient(
    dk, dv, k, v, factor, q_base, dout_base, lse_ptr, delta_ptr, stride_q, stride_dout, first, stop,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk += dS^T Q and dv += P^T dO for one tile of queries. Beyond `stop` lse is infinite, so p is 0."""
    q = _rows(q_base, stride_q, first, stop, MASKED, D, BLOCK_M, BLOCK_D)
    dout = _rows(dout_base, stride_dout, first, stop, MASKED, D, BLOCK_M, BLOCK_D)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor                     # [BLOCK_N, BLOCK_M]
    p = tl.exp2(s - _row(lse_ptr, first, stop, float("inf"), MASKED, BLOCK_M)[None, :])
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    ds = p * (dp - _row(delta_ptr, first, stop, 0.0, MASKED, BLOCK_M)[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit(do_not_specialize=["queries", "Q0", "Q1", "Q2", "Q3", "S0", "S1", "S2", "S3"])
def attention_bwd_kv(
    queries_of, ks, vs, douts, dks, dvs, q_lengths, k_lengths,
    q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides,
    lse_ptr, delta_ptr, sums_ptr, scale, eps, queries, Q0, Q1, Q2, Q3, S0, S1, S2, S3,
    NORM: tl.constexpr, LENGTHS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, NQ: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv. Program: BLOCK_N keys of one of N streams, a head, a sample. If NORM, queries_of are those folded for
    each key stream, [N, B, S, H, D], and scores take the keys' rstd; otherwise the queries as they are, and `scale`. If
    BIAS, sums [2, tiles * B * H, D] of dk and dv over the tokens of a tile."""
    q_sizes, sizes = (Q0, Q1, Q2, Q3), (S0, S1, S2, S3)
    which, first, _ = _locate(tl.program_id(0), sizes, N, BLOCK_N)
    h, b = tl.program_id(1), tl.program_id(2)
    size = _of(which, sizes, N)
    valid = _valid(b, size, _of(which, k_lengths, N), LENGTHS)
    strides_k = (_of(which, k_strides[0], N), _of(which, k_strides[1], N), _of(which, k_strides[2], N))
    strides_v = (_of(which, v_strides[0], N), _of(which, v_strides[1], N), _of(which, v_strides[2], N))
    k_base, v_base = _base(_of(which, ks, N), b, h, strides_k), _base(_of(which, vs, N), b, h, strides_v)
    k = _rows(k_base, strides_k[1], first, valid, True, D, BLOCK_N, BLOCK_D)
    factor = _rstd(k.to(tl.float32), eps, D) if NORM else scale
    v = _rows(v_base, strides_v[1], first, valid, True, D, BLOCK_N, BLOCK_D)
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    bh = b.to(tl.int64) * tl.num_programs(1) + h
    lse_ptr += bh * queries
    delta_ptr += bh * queries
    for i in tl.static_range(NQ):
        strides_q = (q_strides[0][i], q_strides[1][i], q_strides[2][i])
        strides_o = (dout_strides[0][i], dout_strides[1][i], dout_strides[2][i])
        q_ptr = queries_of[i]
        if NORM:
            q_ptr += which * tl.num_programs(2).to(tl.int64) * q_strides[0][i]
        q_base, dout_base = _base(q_ptr, b, h, strides_q), _base(douts[i], b, h, strides_o)
        stop = tl.where(first < valid, _valid(b, q_sizes[i], q_lengths[i], LENGTHS), 0)
        full = stop // BLOCK_M * BLOCK_M
        for start in range(0, full, BLOCK_M):
            dk, dv = _key_gradient(
                dk, dv, k, v, factor, q_base, dout_base, lse_ptr, delta_ptr, strides_q[1], strides_o[1], start,
                stop,
                False, PRECISION, D, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        if full < stop:
            dk, dv = _key_gradient(
                dk, dv, k, v, factor, q_base, dout_base, lse_ptr, delta_ptr, strides_q[1], strides_o[1], full, stop,
                True, PRECISION, D, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        lse_ptr += q_sizes[i]
        delta_ptr += q_sizes[i]
    seen = (first + tl.arange(0, BLOCK_N) < valid)[:, None]
    dv = tl.where(seen, dv, 0.0)                                     # leaves first: there is no room for all at once
    dv_at = (_of(which, dv_strides[0], N), _of(which, dv_strides[1], N), _of(which, dv_strides[2], N))
    _store(_base(_of(which, dvs, N), b, h, dv_at), dv_at[1], first, size, dv, D, BLOCK_N, BLOCK_D)
    if BIAS:
        _store_sum(sums_ptr, 1, dv, D, BLOCK_D)
    if NORM:
        k = _rows(k_base, strides_k[1], first, valid, True, D, BLOCK_N, BLOCK_D).to(tl.float32)
        rstd = _rstd(k, eps, D)
        dk = tl.where(seen, _norm_backward(dk * LN2, k * rstd, rstd, D), 0.0)
    else:
        dk = tl.where(seen, dk * (scale * LN2), 0.0)
    dk_at = (_of(which, dk_strides[0], N), _of(which, dk_strides[1], N), _of(which, dk_strides[2], N))
    _store(_base(_of(which, dks, N), b, h, dk_at), dk_at[1], first, size, dk, D, BLOCK_N, BLOCK_D)
    if BIAS:
        _store_sum(sums_ptr, 0, dk, D, BLOCK_D)


@triton.jit(do_not_specialize=["R0", "R1", "R2", "R3", "R4", "R5", "R6", "R7"])
def sum_rows(
    outs, partials_ptr, R0, R1, R2, R3, R4, R5, R6, R7,
    D: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (v, i) sums COLUMNS columns of the R_v rows of partials [R_0 + R_1 + ..., D], in a fixed order, into
    outs[v] [D]. Few columns and many rows at a time: a sum of thousands of rows is a chain of loads."""
    counts = (R0, R1, R2, R3, R4, R5, R6, R7)
    v, first = tl.program_id(0), tl.program_id(0).to(tl.int64) * 0
    for i in tl.static_range(1, N):
        first += tl.where(v >= i, counts[i - 1], 0).to(tl.int64)
    count = _of(v, counts, N)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        here = partials_ptr + (first + row)[:, None] * D + d[None, :]
        total += tl.load(here, mask=(row < count)[:, None] & (d < D)[None, :], other=0.0)
    out_ptr = _of(v, outs, N)
    tl.store(out_ptr + d, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["batch", "S0", "S1", "S2", "S3"])
def sum_heads(
    outs, q_sums_ptr, kv_sums_ptr, batch, S0, S1, S2, S3, D: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """outs[i] [3, H, D] of stream i: sums over all tokens of dq, dk, dv, from those of tiles of BLOCK_M queries,
    [tiles, B, H, D], and of BLOCK_N keys, [2, tiles, B, H, D]. Program: a head, a stream's q, k or v."""
    sizes = (S0, S1, S2, S3)
    h, heads = tl.program_id(0), tl.num_programs(0)
    which, part = tl.program_id(1) // 3, tl.program_id(1) % 3
    first_m, first_n, all_n = 0, 0, 0
    for i in tl.static_range(N):
        first_m += tl.where(which > i, tl.cdiv(sizes[i], BLOCK_M), 0)
        first_n += tl.where(which > i, tl.cdiv(sizes[i], BLOCK_N), 0)
        all_n += tl.cdiv(sizes[i], BLOCK_N)
    size = _of(which, sizes, N)
    tile = tl.where(part == 0, first_m, (part - 1) * all_n + first_n)
    count = tl.where(part == 0, tl.cdiv(size, BLOCK_M), tl.cdiv(size, BLOCK_N)) * batch
    base = tl.where(part == 0, q_sums_ptr, kv_sums_ptr) + (tile.to(tl.int64) * batch * heads + h) * D
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, count, ROWS):
        total += _rows(base, heads * D, start, count, True, D, ROWS, BLOCK_D)
    d = tl.arange(0, BLOCK_D)
    out_ptr = _of(which, outs, N) + (part * heads + h) * D
    tl.store(out_ptr + d, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=d < D)
