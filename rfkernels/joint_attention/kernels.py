"""Triton kernels of joint attention: the forward, and what it needs to know of keys beforehand.

Streams come as tuples, one entry each: pointers, sizes, strides (batch, token, head; channels are contiguous). Query
tiles and key tiles belong to one stream, so nothing is concatenated. Scores are kept in units of log2: `scale` is the
softmax scale times log2(e). Sizes are not specialised: one binary serves all lengths and batches.
"""

import triton
import triton.language as tl


@triton.jit
def _of(which, options, N: tl.constexpr):
    """options[which] for a `which` known at run time; options that no stream has are None."""
    taken = options[0]
    for i in tl.static_range(1, N):
        if options[i] is not None:
            taken = tl.where(which == i, options[i], taken)
    return taken


@triton.jit
def _locate(tile, sizes, N: tl.constexpr, BLOCK):
    """(stream, first token in it, tokens of the streams before it) of a tile; tiles run through one stream, then the
    next."""
    which, first, before, passed = 0, tile * BLOCK, 0, 0
    tiles = tl.cdiv(sizes[0], BLOCK)
    for i in tl.static_range(1, N):
        passed += sizes[i - 1]
        here = tile >= tiles
        which = tl.where(here, i, which)
        first = tl.where(here, (tile - tiles) * BLOCK, first)
        before = tl.where(here, passed, before)
        tiles += tl.cdiv(sizes[i], BLOCK)
    return which, first, before


@triton.jit
def _valid(b, size, lengths_ptr, LENGTHS: tl.constexpr):
    """Tokens of sample b that are not padding."""
    if LENGTHS:
        size = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), size).to(tl.int32)       # clamped, then narrowed
    return size


@triton.jit
def _base(ptr, b, h, strides):
    return ptr + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[2]


@triton.jit
def _rows(base, stride, first, stop, MASKED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens first ... first + BLOCK as [BLOCK, BLOCK_D]; zero from `stop` on if MASKED, and beyond D. Offsets within
    the tile are 32 bits wide: strides stay below launch.MAX_TOKEN_STRIDE."""
    token, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    here = base + tl.cast(first, tl.int64) * stride + (token[:, None] * stride + d[None, :])
    if MASKED:
        return tl.load(here, mask=((first + token) < stop)[:, None] & (d < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        return tl.load(here, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(here)


@triton.jit
def _row(ptr, first, stop, other, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """One number per token, [BLOCK]."""
    token = first + tl.arange(0, BLOCK)
    if MASKED:
        return tl.load(ptr + token, mask=token < stop, other=other)
    else:
        return tl.load(ptr + token)


@triton.jit
def _weight(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A norm's weight as fp32 [1, BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _rstd(x, eps, D: tl.constexpr):
    """1 / root mean square of fp32 rows, [BLOCK, 1]."""
    return tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]


@triton.jit(do_not_specialize=["total", "S0", "S1", "S2", "S3"])
def key_rstd(
    ks, k_strides, lengths, rstd_ptr, eps, total, S0, S1, S2, S3,
    LENGTHS: tl.constexpr, D: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """rstd of every key, [B, H, total] fp32; padding is not read, it counts as zeros. Program: BLOCK tokens of a
    stream, a head, a sample."""
    sizes = (S0, S1, S2, S3)
    which, first, before = _locate(tl.program_id(0), sizes, N, BLOCK)
    h, b = tl.program_id(1), tl.program_id(2)
    size = _of(which, sizes, N)
    strides = (_of(which, k_strides[0], N), _of(which, k_strides[1], N), _of(which, k_strides[2], N))
    valid = _valid(b, size, _of(which, lengths, N), LENGTHS)
    k = _rows(_base(_of(which, ks, N), b, h, strides), strides[1], first, valid, True, D, BLOCK, BLOCK_D).to(tl.float32)
    token = first + tl.arange(0, BLOCK)
    out = rstd_ptr + (b.to(tl.int64) * tl.num_programs(1) + h) * total + before
    tl.store(out + token, tl.sum(_rstd(k, eps, D), 1), mask=token < size)


@triton.jit
def normalized(x, eps, weight_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """RMSNorm of a tile [BLOCK, BLOCK_D] and its weight, in fp32."""
    x = x.to(tl.float32)
    return x * _rstd(x, eps, D) * _weight(weight_ptr, D, BLOCK_D)


@triton.jit
def folded_queries(
    q, eps, scale, q_weight_ptr, k_weights, NORM: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(one query tile per key stream, with the norm, both weights and the scale in it; the largest |row|^2 of them).
    All at once, so that they wait in shared memory for their stream, not in registers. q as it is if not NORM."""
    tiles, longest = (), tl.zeros([BLOCK], tl.float32)
    if NORM:
        q_hat = normalized(q, eps, q_weight_ptr, D, BLOCK_D) * scale
    for i in tl.static_range(N):
        if NORM:
            q_i = q_hat * _weight(k_weights[i], D, BLOCK_D)
            longest = tl.maximum(longest, tl.sum(q_i * q_i, 1))
            tiles = tiles + (q_i.to(q.dtype),)
        else:
            tiles = tiles + (q,)
    return tiles, longest


@triton.jit
def _attend(
    acc, total, shift, q, k_base, v_base, rstd_ptr, scale, stride_k, stride_v, first, stop,
    ONLINE: tl.constexpr, MASKED: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of keys: scores, softmax, sum of values. `shift`: each row's running maximum if ONLINE, fixed if not."""
    k = _rows(k_base, stride_k, first, stop, MASKED, D, BLOCK_N, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)                              # [BLOCK_M, BLOCK_N]
    if NORM:
        s = s * _row(rstd_ptr, first, stop, 0.0, MASKED, BLOCK_N)[None, :]             # the scale is in q
    else:
        s = s * scale
    inside = (first + tl.arange(0, BLOCK_N) < stop)[None, :]
    if ONLINE:
        if MASKED:
            s = tl.where(inside, s, float("-inf"))
        highest = tl.maximum(shift, tl.max(s, 1))
        kept = tl.exp2(shift - highest)
        acc, total, shift = acc * kept[:, None], total * kept, highest
        p = tl.exp2(s - shift[:, None])
    else:
        p = tl.exp2(s - shift[:, None])
        if MASKED:
            p = tl.where(inside, p, 0.0)
    v = _rows(v_base, stride_v, first, stop, MASKED, D, BLOCK_N, BLOCK_D)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total + tl.sum(p, 1), shift


@triton.jit
def _over_keys(
    folded, shift, b, h, live, ks, vs, lengths, k_strides, v_strides, rstd_ptr, scale, sizes,
    ONLINE: tl.constexpr, NORM: tl.constexpr, LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All keys of all streams: full tiles without a mask, then what is left of each stream."""
    acc, total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(N):
        strides_k = (k_strides[0][i], k_strides[1][i], k_strides[2][i])
        strides_v = (v_strides[0][i], v_strides[1][i], v_strides[2][i])
        k_base, v_base = _base(ks[i], b, h, strides_k), _base(vs[i], b, h, strides_v)
        stop = tl.where(live, _valid(b, sizes[i], lengths[i], LENGTHS), 0)
        full = stop // BLOCK_N * BLOCK_N
        for first in range(0, full, BLOCK_N):
            acc, total, shift = _attend(
                acc, total, shift, folded[i], k_base, v_base, rstd_ptr, scale, strides_k[1], strides_v[1], first, stop,
                ONLINE, False, NORM, PRECISION, D, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        if full < stop:
            acc, total, shift = _attend(
                acc, total, shift, folded[i], k_base, v_base, rstd_ptr, scale, strides_k[1], strides_v[1], full, stop,
                ONLINE, True, NORM, PRECISION, D, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        rstd_ptr += sizes[i]
    return acc, total, shift


@triton.jit(do_not_specialize=["queries", "keys", "Q0", "Q1", "Q2", "Q3", "S0", "S1", "S2", "S3"])
def attention_fwd(
    qs, ks, vs, outs, q_weights, k_weights, q_lengths, k_lengths, q_strides, k_strides, v_strides,
    rstd_ptr, lse_ptr, scale, eps, queries, keys, Q0, Q1, Q2, Q3, S0, S1, S2, S3,
    NORM: tl.constexpr, BOUNDED: tl.constexpr, LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
    CENTRE: tl.constexpr, LIMIT: tl.constexpr, D: tl.constexpr, NQ: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_i = softmax(scale q_hat_i K_hat^T) V over the keys of all streams; lse [B, H, queries] in units of log2.

    Program: BLOCK_M queries of one of NQ streams, a head, a sample. NORM: q and k are normalised here: q and both
    weights in the query tile, k by its rstd on the scores. BOUNDED: keys are unit rows of length sqrt(D) times a
    weight, which bounds a row's scores by b; while 2 b <= CENTRE + what the exponent range has below zero (b <= LIMIT),
    exp2(s - (b - CENTRE)) neither overflows nor vanishes, and softmax needs no running maximum.
    """
    q_sizes, sizes = (Q0, Q1, Q2, Q3), (S0, S1, S2, S3)
    which, first, before = _locate(tl.program_id(0), q_sizes, NQ, BLOCK_M)
    h, b = tl.program_id(1), tl.program_id(2)
    size = _of(which, q_sizes, NQ)
    valid = _valid(b, size, _of(which, q_lengths, NQ), LENGTHS)
    strides = (_of(which, q_strides[0], NQ), _of(which, q_strides[1], NQ), _of(which, q_strides[2], NQ))
    q = _rows(_base(_of(which, qs, NQ), b, h, strides), strides[1], first, valid, True, D, BLOCK_M, BLOCK_D)
    bh = b.to(tl.int64) * tl.num_programs(1) + h
    rstd_ptr += bh * keys
    live = first < valid
    folded, longest = folded_queries(q, eps, scale, _of(which, q_weights, NQ), k_weights, NORM, D, N, BLOCK_M, BLOCK_D)
    if BOUNDED and not NORM:                          # prepared keys: their weight is in them
        length = tl.sum(q.to(tl.float32) * q.to(tl.float32), 1) * scale * scale
        for i in tl.static_range(N):
            stretch = tl.max(tl.abs(_weight(k_weights[i], D, BLOCK_D)))
            longest = tl.maximum(longest, length * stretch * stretch)
    nothing = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if BOUNDED:
        bound = tl.sqrt(longest * D)
        if tl.max(bound) <= LIMIT:
            acc, total, shift = _over_keys(
                folded, bound - CENTRE, b, h, live, ks, vs, k_lengths, k_strides, v_strides, rstd_ptr, scale,
                sizes, False, NORM, LENGTHS, PRECISION, D, N, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        else:
            acc, total, shift = _over_keys(
                folded, nothing, b, h, live, ks, vs, k_lengths, k_strides, v_strides, rstd_ptr, scale,
                sizes, True, NORM, LENGTHS, PRECISION, D, N, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    else:
        acc, total, shift = _over_keys(
            folded, nothing, b, h, live, ks, vs, k_lengths, k_strides, v_strides, rstd_ptr, scale, sizes,
            True, NORM, LENGTHS, PRECISION, D, N, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    token, d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    seen = (token < valid) & (total != 0.0)                               # padding, and rows without keys, give zeros
    total = tl.where(seen, total, 1.0)
    out = tl.where(seen[:, None], acc / total[:, None], 0.0)
    lse = tl.where(seen, shift + tl.log2(total), float("inf"))            # so that the backward's exp2(s - lse) is 0
    out_ptr = _of(which, outs, NQ)
    rows = (b.to(tl.int64) * size + token) * tl.num_programs(1) + h
    tl.store(
        out_ptr + rows[:, None] * D + d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(token < size)[:, None] & (d < D)[None, :],
    )
    tl.store(lse_ptr + bh * queries + before + token, lse, mask=token < size)
