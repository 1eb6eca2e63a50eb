"""Triton kernels of rectified flow: noising with its target, and the weighted squared error.

A sample is a row of N elements, wherever it starts; a program takes BLOCK of them at a time.
"""

import triton
import triton.language as tl


@triton.jit
def _place(N, BLOCK: tl.constexpr):
    """(sample, first element, which of the BLOCK elements from there on exist) of a program; programs run through one
    sample, then the next."""
    blocks = (N - 1) // BLOCK + 1
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    return tl.program_id(0) // blocks, first, tl.arange(0, BLOCK) < N - first


@triton.jit
def _row(ptr, b, stride):
    return ptr + b.to(tl.int64) * stride


@triton.jit
def _block(ptr, b, stride, first, BLOCK: tl.constexpr):
    return _row(ptr, b, stride) + first + tl.arange(0, BLOCK)


@triton.jit
def rectified_flow_fwd(
    x0_ptr, noise_ptr, t_ptr, z_ptr, target_ptr, N, stride_x0, stride_noise, BLOCK: tl.constexpr
):  # fmt: skip
    """z = (1 - t) x0 + t noise; target = noise - x0; both [B, N] contiguous."""
    b, first, mask = _place(N, BLOCK)
    t = tl.load(t_ptr + b).to(tl.float32)
    x0 = tl.load(_block(x0_ptr, b, stride_x0, first, BLOCK), mask=mask, other=0.0).to(tl.float32)
    noise = tl.load(_block(noise_ptr, b, stride_noise, first, BLOCK), mask=mask, other=0.0).to(tl.float32)
    dtype = z_ptr.dtype.element_ty
    tl.store(_block(z_ptr, b, N, first, BLOCK), ((1.0 - t) * x0 + t * noise).to(dtype), mask=mask)
    tl.store(_block(target_ptr, b, N, first, BLOCK), (noise - x0).to(dtype), mask=mask)


@triton.jit
def rectified_flow_bwd(
    dz_ptr, dtarget_ptr, t_ptr, x0_ptr, noise_ptr, dx0_ptr, dnoise_ptr, partials_ptr,
    N, stride_dz, stride_dtarget, stride_x0, stride_noise, TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx0 = (1 - t) dz - dtarget; dnoise = t dz + dtarget; if TIME, a partial sum of dz (noise - x0) per program."""
    b, first, mask = _place(N, BLOCK)
    t = tl.load(t_ptr + b).to(tl.float32)
    dz = tl.load(_block(dz_ptr, b, stride_dz, first, BLOCK), mask=mask, other=0.0).to(tl.float32)
    dtarget = tl.load(_block(dtarget_ptr, b, stride_dtarget, first, BLOCK), mask=mask, other=0.0).to(tl.float32)
    dtype = dx0_ptr.dtype.element_ty
    tl.store(_block(dx0_ptr, b, N, first, BLOCK), ((1.0 - t) * dz - dtarget).to(dtype), mask=mask)
    tl.store(_block(dnoise_ptr, b, N, first, BLOCK), (t * dz + dtarget).to(dtype), mask=mask)
    if TIME:
        x0 = tl.load(_block(x0_ptr, b, stride_x0, first, BLOCK), mask=mask, other=0.0).to(tl.float32)
        noise = tl.load(_block(noise_ptr, b, stride_noise, first, BLOCK), mask=mask, other=0.0).to(tl.float32)
        tl.store(partials_ptr + tl.program_id(0), tl.sum(dz * (noise - x0), 0))


@triton.jit
def weighted_mse_fwd(
    prediction_ptr, target_ptr, partials_ptr, N, stride_p, stride_t, BLOCK: tl.constexpr
):  # fmt: skip
    """partials[program] = sum of (prediction - target)^2 over BLOCK elements of one sample, fp32."""
    b, first, mask = _place(N, BLOCK)
    prediction = tl.load(_block(prediction_ptr, b, stride_p, first, BLOCK), mask=mask, other=0.0).to(tl.float32)
    target = tl.load(_block(target_ptr, b, stride_t, first, BLOCK), mask=mask, other=0.0).to(tl.float32)
    error = prediction - target
    tl.store(partials_ptr + tl.program_id(0), tl.sum(error * error, 0))


@triton.jit(do_not_specialize=["count"])
def sum_per_sample(partials_ptr, sums_ptr, count, COLUMNS: tl.constexpr):
    """sums[b] = the `count` partials of sample b, added in a fixed order. Program: a sample."""
    b = tl.program_id(0)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, count, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        total += tl.load(_row(partials_ptr, b, count) + column, mask=column < count, other=0.0)
    tl.store(sums_ptr + b, tl.sum(total, 0).to(sums_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["batch", "count"])
def weighted_mse_total(
    partials_ptr, weight_ptr, sums_ptr, loss_ptr, batch, count, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """sums[b] = the `count` partials of sample b; loss = scale * sum of weight[b] sums[b]. One program, fixed order."""
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, batch, ROWS):
        row = first + tl.arange(0, ROWS)
        tile = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, count, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            here = partials_ptr + row.to(tl.int64)[:, None] * count + column[None, :]
            tile += tl.load(here, mask=(row < batch)[:, None] & (column < count)[None, :], other=0.0)
        sums = tl.sum(tile, 1)
        tl.store(sums_ptr + row, sums, mask=row < batch)
        total += sums * tl.load(weight_ptr + row, mask=row < batch, other=0.0).to(tl.float32)
    tl.store(loss_ptr, tl.sum(total, 0) * scale)


@triton.jit
def weighted_mse_bwd(
    prediction_ptr, target_ptr, weight_ptr, dloss_ptr, dprediction_ptr, dtarget_ptr, N, stride_p, stride_t, scale,
    TARGET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dprediction = 2 dloss weight[b] (prediction - target) scale; dtarget its negative, if TARGET. scale is 1 over the
    number of elements."""
    b, first, mask = _place(N, BLOCK)
    factor = 2.0 * tl.load(dloss_ptr).to(tl.float32) * tl.load(weight_ptr + b).to(tl.float32) * scale
    prediction = tl.load(_block(prediction_ptr, b, stride_p, first, BLOCK), mask=mask, other=0.0).to(tl.float32)
    target = tl.load(_block(target_ptr, b, stride_t, first, BLOCK), mask=mask, other=0.0).to(tl.float32)
    gradient = factor * (prediction - target)
    here = _block(dprediction_ptr, b, N, first, BLOCK)
    tl.store(here, gradient.to(dprediction_ptr.dtype.element_ty), mask=mask)
    if TARGET:
        tl.store(_block(dtarget_ptr, b, N, first, BLOCK), (-gradient).to(dtarget_ptr.dtype.element_ty), mask=mask)
