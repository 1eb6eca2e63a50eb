"""Triton kernels between a latent [B, C, H, W] and its tokens [B, h*w, N]: three, for both ways and both backwards.

A patch of P x P latent pixels is a row of K = C P P elements, ordered (channel, row, column) where a latent enters a
model and (row, column, channel) where one leaves (CHANNEL_FIRST false). Patches are read from the latent and written to
it in place, whatever its strides. The weight is w(n, k), addressed by two strides: it may be stored either way round.
Tokens may be wider than latent and weight, whose dtype the products have.
"""

import triton
import triton.language as tl


@triton.jit
def _patches(token, k, h, w, strides, CHANNELS: tl.constexpr, P: tl.constexpr, CHANNEL_FIRST: tl.constexpr):
    """Where elements k of the patches of these tokens lie in a latent with these strides; int64 [tokens, k]."""
    b, row, column = token // (h * w), token // w % h, token % w
    if CHANNEL_FIRST:
        c, r, s = k // (P * P), k // P % P, k % P
    else:
        c, r, s = k % CHANNELS, k // (P * CHANNELS), k // CHANNELS % P
    corner = b.to(tl.int64) * strides[0] + (row * P).to(tl.int64) * strides[2] + (column * P).to(tl.int64) * strides[3]
    inside = c.to(tl.int64) * strides[1] + r.to(tl.int64) * strides[2] + s.to(tl.int64) * strides[3]
    return corner[:, None] + inside[None, :]


@triton.jit
def _rows(token, length, strides):
    """Where the tokens of [B, S, N] start; int64 [tokens]."""
    return (token // length).to(tl.int64) * strides[0] + (token % length).to(tl.int64) * strides[1]


@triton.jit(do_not_specialize=["tokens", "h", "w"])
def patches_to_tokens(
    latent_ptr, weight_ptr, bias_ptr, positions_ptr, out_ptr, tokens, h, w, latent_strides, weight_strides,
    N: tl.constexpr, K: tl.constexpr, CHANNELS: tl.constexpr, P: tl.constexpr, CHANNEL_FIRST: tl.constexpr,
    BIAS: tl.constexpr, POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [B, h*w, N] contiguous: out(m, n) = sum over k of patch(m, k) w(n, k), + bias [N], + positions [h*w, N].
    Program: BLOCK_M tokens, BLOCK_N channels; those of the same tokens follow one another."""
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    token = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    live, inside = token < tokens, n < N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        here = _patches(token, k, h, w, latent_strides, CHANNELS, P, CHANNEL_FIRST)
        patch = tl.load(latent_ptr + here, mask=live[:, None] & (k < K)[None, :], other=0.0)
        at = n.to(tl.int64)[None, :] * weight_strides[0] + k[:, None] * weight_strides[1]
        weight = tl.load(weight_ptr + at, mask=inside[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(patch, weight, acc, input_precision=PRECISION)
    mask = live[:, None] & inside[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if POSITIONS:
        place = (token % (h * w)).to(tl.int64)[:, None] * N + n[None, :]
        acc += tl.load(positions_ptr + place, mask=mask, other=0.0).to(tl.float32)
    here = token.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptr + here, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "h", "w"])
def tokens_to_patches(
    x_ptr, weight_ptr, bias_ptr, latent_ptr, tokens, h, w, x_strides, weight_strides, latent_strides,
    N: tl.constexpr, K: tl.constexpr, CHANNELS: tl.constexpr, P: tl.constexpr, CHANNEL_FIRST: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """latent: patch(m, k) = sum over n of x(m, n) w(n, k), plus bias [K]. Program: BLOCK_M tokens, BLOCK_K elements of
    their patches."""
    across: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    token = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % across * BLOCK_K + tl.arange(0, BLOCK_K)
    live, inside = token < tokens, k < K
    rows = x_ptr + _rows(token, h * w, x_strides)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        x = tl.load(rows[:, None] + n[None, :], mask=live[:, None] & (n < N)[None, :], other=0.0)
        at = n.to(tl.int64)[:, None] * weight_strides[0] + k[None, :] * weight_strides[1]
        weight = tl.load(weight_ptr + at, mask=(n < N)[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(x.to(weight.dtype), weight, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + k, mask=inside, other=0.0).to(tl.float32)[None, :]
    here = _patches(token, k, h, w, latent_strides, CHANNELS, P, CHANNEL_FIRST)
    tl.store(latent_ptr + here, acc.to(latent_ptr.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["tokens", "h", "w", "span"])
def patch_weight_bwd(
    x_ptr, latent_ptr, partials_ptr, sums_ptr, tokens, h, w, span, x_strides, latent_strides, partial_strides,
    N: tl.constexpr, K: tl.constexpr, CHANNELS: tl.constexpr, P: tl.constexpr, CHANNEL_FIRST: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Over `span` tokens: partials[split](n, k) = sum of x(m, n) patch(m, k), and sums[split, n] = sum of x(m, n) if
    SUMS; fp32. Program: BLOCK_N channels and BLOCK_K elements of a patch (first index), a split (second)."""
    across: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    split = tl.program_id(1)
    n = tl.program_id(0) // across * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) % across * BLOCK_K + tl.arange(0, BLOCK_K)
    end = tl.minimum((split + 1) * span, tokens)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in range(split * span, end, BLOCK_M):
        token = start + tl.arange(0, BLOCK_M)
        live = (token < end)[:, None]
        rows = x_ptr + _rows(token, h * w, x_strides)
        x = tl.load(rows[:, None] + n[None, :], mask=live & (n < N)[None, :], other=0.0)
        here = _patches(token, k, h, w, latent_strides, CHANNELS, P, CHANNEL_FIRST)
        patch = tl.load(latent_ptr + here, mask=live & (k < K)[None, :], other=0.0)
        acc = tl.dot(tl.trans(x.to(patch.dtype)), patch, acc, input_precision=PRECISION)
        if SUMS:
            sums += tl.sum(x.to(tl.float32), 0)
    at = n.to(tl.int64)[:, None] * partial_strides[0] + k[None, :] * partial_strides[1]
    tl.store(partials_ptr + split.to(tl.int64) * N * K + at, acc, mask=(n < N)[:, None] & (k < K)[None, :])
    if SUMS:
        tl.store(sums_ptr + split * N + n, sums, mask=(n < N) & (tl.program_id(0) % across == 0))
