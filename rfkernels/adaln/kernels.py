"""Triton kernels of the adaLN family.

One program owns ROWS consecutive tokens of one sample at a time and the whole width, as CHUNKS pieces of CHUNK channels
held in registers, so each input is read once and each output written once. The last chunk is masked, so no byte is
moved for padding. A modulation vector is addressed by a batch and a token stride, either of which may be zero: [B, C]
per sample, [B, S, C] per token and [C] shared are the same code, and one that is not given is a pointer that is None.
Every tensor is read and written in its own dtype: the arithmetic is fp32. Sizes are not specialised: one binary serves
all lengths and batches.
"""

import triton
import triton.language as tl

NONE, SUMMED, STORED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)       # what becomes of a vector's gradient


@triton.jit
def _offsets(b, tokens, stride_b, stride_s):
    """[ROWS, 1] element offsets, in int64."""
    return b.to(tl.int64) * stride_b + tokens.to(tl.int64)[:, None] * stride_s


@triton.jit
def _load(ptr, rows, live, i, C: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk i as fp32 [ROWS, CHUNK]; zero outside."""
    columns = i * CHUNK + tl.arange(0, CHUNK)
    return tl.load(ptr + rows + columns[None, :], mask=live[:, None] & (columns < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, rows, live, i, value, C: tl.constexpr, CHUNK: tl.constexpr):
    columns = i * CHUNK + tl.arange(0, CHUNK)
    tl.store(ptr + rows + columns[None, :], value.to(ptr.dtype.element_ty), mask=live[:, None] & (columns < C)[None, :])


@triton.jit
def _given(ptr, rows, live, i, OTHERWISE: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk i of a vector, or what stands for one that is not given."""
    if ptr is None:
        return OTHERWISE
    else:
        return _load(ptr, rows, live, i, C, CHUNK)


@triton.jit
def _divided(total, C: tl.constexpr):
    """total / C to the last bit: of a constant row the mean's error is all that is left, and rstd magnifies it. The
    compiler's division is a product with the rounded 1 / C; the exact one is a call, which makes registers spill."""
    near = total * (1.0 / C)
    return tl.fma(tl.fma(near, -1.0 * C, total), 1.0 / C, near)


@triton.jit
def _statistics(xs, eps, C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, RMS: tl.constexpr):
    """mean and rstd [ROWS], two passes over registers: the variance is of x - mean, not a difference of squares."""
    if RMS:
        mean = tl.zeros_like(tl.sum(xs[0], 1))
    else:
        total = xs[0]
        for i in tl.static_range(1, CHUNKS):
            total += xs[i]
        mean = _divided(tl.sum(total, 1), C)
    square = tl.zeros_like(xs[0])
    for i in tl.static_range(CHUNKS):
        columns = i * CHUNK + tl.arange(0, CHUNK)
        centred = tl.where((columns < C)[None, :], xs[i] - mean[:, None], 0.0)
        square += centred * centred
    return mean, tl.rsqrt(tl.sum(square, 1) / C + eps)


@triton.jit(do_not_specialize=["S"])
def adaln_fwd(
    x_ptr, shift_ptr, scale_ptr, y_ptr, statistics_ptr,
    S, eps,
    stride_xb, stride_xs, stride_shift_b, stride_shift_s, stride_scale_b, stride_scale_s,
    C: tl.constexpr, RMS: tl.constexpr, ONE: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """y = norm(x) * (ONE + scale) + shift, ONE being 1.0 or 0.0; y [B, S, C] contiguous; statistics [2, B, S] fp32:
    mean, then rstd."""
    blocks = tl.cdiv(S, ROWS)
    b, tokens = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    live = tokens < S
    x_rows = _offsets(b, tokens, stride_xb, stride_xs)
    xs = ()
    for i in tl.static_range(CHUNKS):
        xs = xs + (_load(x_ptr, x_rows, live, i, C, CHUNK),)
    mean, rstd = _statistics(xs, eps, C, CHUNK, CHUNKS, RMS)
    flat = b.to(tl.int64) * S + tokens
    tl.store(statistics_ptr + flat, mean, mask=live)
    tl.store(statistics_ptr + tl.num_programs(0).to(tl.int64) // blocks * S + flat, rstd, mask=live)
    shift_rows = _offsets(b, tokens, stride_shift_b, stride_shift_s)
    scale_rows = _offsets(b, tokens, stride_scale_b, stride_scale_s)
    for i in tl.static_range(CHUNKS):
        shift = _given(shift_ptr, shift_rows, live, i, 0.0, C, CHUNK)
        scale = _given(scale_ptr, scale_rows, live, i, 0.0, C, CHUNK)
        y = (xs[i] - mean[:, None]) * rstd[:, None] * (ONE + scale) + shift
        _store(y_ptr, flat[:, None] * C, live, i, y, C, CHUNK)


@triton.jit(do_not_specialize=["S"])
def gated_adaln_fwd(
    residual_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, h_ptr, y_ptr, statistics_ptr,
    S, eps,
    stride_rb, stride_rs, stride_bb, stride_bs, stride_gate_b, stride_gate_s,
    stride_shift_b, stride_shift_s, stride_scale_b, stride_scale_s,
    C: tl.constexpr, RMS: tl.constexpr, ONE: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """h = residual + gate * branch; y = norm(h as stored) * (ONE + scale) + shift."""
    blocks = tl.cdiv(S, ROWS)
    b, tokens = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    live = tokens < S
    flat = b.to(tl.int64) * S + tokens
    residual_rows, branch_rows = _offsets(b, tokens, stride_rb, stride_rs), _offsets(b, tokens, stride_bb, stride_bs)
    gate_rows = _offsets(b, tokens, stride_gate_b, stride_gate_s)
    hs = ()
    for i in tl.static_range(CHUNKS):
        gate = _given(gate_ptr, gate_rows, live, i, 1.0, C, CHUNK)
        h = _load(residual_ptr, residual_rows, live, i, C, CHUNK)
        h += gate * _load(branch_ptr, branch_rows, live, i, C, CHUNK)
        _store(h_ptr, flat[:, None] * C, live, i, h, C, CHUNK)
        hs = hs + (h.to(h_ptr.dtype.element_ty).to(tl.float32),)
    mean, rstd = _statistics(hs, eps, C, CHUNK, CHUNKS, RMS)
    tl.store(statistics_ptr + flat, mean, mask=live)
    tl.store(statistics_ptr + tl.num_programs(0).to(tl.int64) // blocks * S + flat, rstd, mask=live)
    shift_rows = _offsets(b, tokens, stride_shift_b, stride_shift_s)
    scale_rows = _offsets(b, tokens, stride_scale_b, stride_scale_s)
    for i in tl.static_range(CHUNKS):
        shift = _given(shift_ptr, shift_rows, live, i, 0.0, C, CHUNK)
        scale = _given(scale_ptr, scale_rows, live, i, 0.0, C, CHUNK)
        y = (hs[i] - mean[:, None]) * rstd[:, None] * (ONE + scale) + shift
        _store(y_ptr, flat[:, None] * C, live, i, y, C, CHUNK)


@triton.jit
def _zeros(ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(CHUNKS):
        zeros = zeros + (tl.zeros([ROWS, CHUNK], tl.float32),)
    return zeros


@triton.jit
def _store_sums(ptr, row, sums, C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Sums over the rows of each chunk to one row of partials [.., C], fp32."""
    for i in tl.static_range(CHUNKS):
        columns = i * CHUNK + tl.arange(0, CHUNK)
        tl.store(ptr + row * C + columns, tl.sum(sums[i], 0), mask=columns < C)


@triton.jit(do_not_specialize=["S", "span"])
def adaln_bwd(
    dy_ptr, dh_ptr, x_ptr, branch_ptr, gate_ptr, scale_ptr, statistics_ptr,
    dx_ptr, dbranch_ptr, dshift_ptr, dscale_ptr, dgate_ptr, dbias_ptr,
    S, span,
    stride_dyb, stride_dys, stride_dhb, stride_dhs, stride_xb, stride_xs, stride_bb, stride_bs,
    stride_gate_b, stride_gate_s, stride_scale_b, stride_scale_s,
    C: tl.constexpr, RMS: tl.constexpr, GATED: tl.constexpr,
    SHIFT: tl.constexpr, SCALE: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, ONE: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (b, split) walks over `span` tokens of sample b. SHIFT, SCALE, GATE: what becomes of a vector's gradient.
    SUMMED, of one that tokens share: in registers, it leaves as one row of partials [B * splits, C]. STORED, of a
    per-token one: it leaves with its token. NONE: there is no vector.
    x is the input of the norm (h if GATED); dx is the gradient of x, and of the residual if GATED. If BIAS, dbranch is
    summed like a shared vector: the gradient of the bias of whatever made the branch."""
    b, split = tl.program_id(0), tl.program_id(1)
    last = tl.minimum((split + 1) * span, S)
    tokens_in_all = tl.num_programs(0).to(tl.int64) * S
    dshifts, dscales = _zeros(ROWS, CHUNK, CHUNKS), _zeros(ROWS, CHUNK, CHUNKS)
    dgates, dbiases = _zeros(ROWS, CHUNK, CHUNKS), _zeros(ROWS, CHUNK, CHUNKS)
    for start in tl.range(split * span, last, ROWS, num_stages=STAGES):
        tokens = start + tl.arange(0, ROWS)
        live = tokens < last
        flat = b.to(tl.int64) * S + tokens
        out_rows = flat[:, None] * C
        dy_rows, x_rows = _offsets(b, tokens, stride_dyb, stride_dys), _offsets(b, tokens, stride_xb, stride_xs)
        scale_rows = _offsets(b, tokens, stride_scale_b, stride_scale_s)
        mean = tl.load(statistics_ptr + flat, mask=live, other=0.0)[:, None]
        rstd = tl.load(statistics_ptr + tokens_in_all + flat, mask=live, other=0.0)[:, None]
        gs, x_hats, shifts, scales = (), (), (), ()
        drift = tl.zeros([ROWS, CHUNK], tl.float32)                       # sum of g, for the mean
        along = tl.zeros([ROWS, CHUNK], tl.float32)                       # sum of g * x_hat
        for i in tl.static_range(CHUNKS):
            dy = _load(dy_ptr, dy_rows, live, i, C, CHUNK)
            x_hat = (_load(x_ptr, x_rows, live, i, C, CHUNK) - mean) * rstd      # dy is 0 outside C
            g = dy * (ONE + _given(scale_ptr, scale_rows, live, i, 0.0, C, CHUNK))
            drift += g
            along += g * x_hat
            if SHIFT == STORED:
                _store(dshift_ptr, out_rows, live, i, dy, C, CHUNK)
            if SHIFT == SUMMED:
                shifts = shifts + (dshifts[i] + dy,)
            else:
                shifts = shifts + (dshifts[i],)
            if SCALE == STORED:
                _store(dscale_ptr, out_rows, live, i, dy * x_hat, C, CHUNK)
            if SCALE == SUMMED:
                scales = scales + (dscales[i] + dy * x_hat,)
            else:
                scales = scales + (dscales[i],)
            gs = gs + (g,)
            x_hats = x_hats + (x_hat,)
        dshifts, dscales = shifts, scales
        mean_along = (tl.sum(along, 1) / C)[:, None]
        mean_drift = (tl.sum(drift, 1) / C)[:, None]
        if RMS:
            mean_drift = mean_drift * 0.0
        gates, biases = (), ()
        for i in tl.static_range(CHUNKS):
            dx = (gs[i] - mean_drift - x_hats[i] * mean_along) * rstd
            if GATED:
                dx += _load(dh_ptr, _offsets(b, tokens, stride_dhb, stride_dhs), live, i, C, CHUNK)
                dbranch = dx
                if GATE != NONE:
                    gate = _load(gate_ptr, _offsets(b, tokens, stride_gate_b, stride_gate_s), live, i, C, CHUNK)
                    branch = _load(branch_ptr, _offsets(b, tokens, stride_bb, stride_bs), live, i, C, CHUNK)
                    dbranch = gate * dx
                _store(dbranch_ptr, out_rows, live, i, dbranch, C, CHUNK)
                if BIAS:
                    biases = biases + (dbiases[i] + dbranch,)
                else:
                    biases = biases + (dbiases[i],)
                if GATE == STORED:
                    _store(dgate_ptr, out_rows, live, i, branch * dx, C, CHUNK)
                if GATE == SUMMED:
                    gates = gates + (dgates[i] + branch * dx,)
                else:
                    gates = gates + (dgates[i],)
            else:
                gates = gates + (dgates[i],)
                biases = biases + (dbiases[i],)
            _store(dx_ptr, out_rows, live, i, dx, C, CHUNK)
        dgates, dbiases = gates, biases
    row = b.to(tl.int64) * tl.num_programs(1) + split
    if SHIFT == SUMMED:
        _store_sums(dshift_ptr, row, dshifts, C, CHUNK, CHUNKS)
    if SCALE == SUMMED:
        _store_sums(dscale_ptr, row, dscales, C, CHUNK, CHUNKS)
    if GATE == SUMMED:
        _store_sums(dgate_ptr, row, dgates, C, CHUNK, CHUNKS)
    if BIAS:
        _store_sums(dbias_ptr, row, dbiases, C, CHUNK, CHUNKS)


@triton.jit(do_not_specialize=["total", "count0", "count1", "count2", "count3"])
def sum_partials(
    partials_ptr, out0_ptr, out1_ptr, out2_ptr, out3_ptr,
    total, count0, count1, count2, count3, stride0, stride1, stride2, stride3,
    C: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Second stage: partials [V, total, C] fp32; vector v sums its rows in groups of count_v, in a fixed order, and
    writes group g to out_v + g * stride_v."""
    group, v = tl.program_id(0).to(tl.int64), tl.program_id(2)
    count = tl.where(v == 0, count0, tl.where(v == 1, count1, tl.where(v == 2, count2, count3)))
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = columns < C
    if group * count < total:
        sums = tl.zeros([ROWS, CHUNK], tl.float32)
        first = v.to(tl.int64) * total + group * count
        for start in range(0, count, ROWS):
            rows = start + tl.arange(0, ROWS)
            here = partials_ptr + (first + rows)[:, None] * C + columns[None, :]
            sums += tl.load(here, mask=(rows < count)[:, None] & inside[None, :], other=0.0)
        value = tl.sum(sums, 0)
        if v == 0:
            tl.store(out0_ptr + group * stride0 + columns, value.to(out0_ptr.dtype.element_ty), mask=inside)
        elif v == 1:
            tl.store(out1_ptr + group * stride1 + columns, value.to(out1_ptr.dtype.element_ty), mask=inside)
        elif v == 2:
            tl.store(out2_ptr + group * stride2 + columns, value.to(out2_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(out3_ptr + group * stride3 + columns, value.to(out3_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["S"])
def gated_residual_fwd(
    residual_ptr, branch_ptr, gate_ptr, h_ptr,
    S, stride_rb, stride_rs, stride_bb, stride_bs, stride_gate_b, stride_gate_s,
    C: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """h = residual + gate * branch; h [B, S, C] contiguous."""
    blocks = tl.cdiv(S, ROWS)
    b, tokens = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    live = tokens < S
    flat = b.to(tl.int64) * S + tokens
    residual_rows, branch_rows = _offsets(b, tokens, stride_rb, stride_rs), _offsets(b, tokens, stride_bb, stride_bs)
    gate_rows = _offsets(b, tokens, stride_gate_b, stride_gate_s)
    for i in tl.static_range(CHUNKS):
        h = _load(residual_ptr, residual_rows, live, i, C, CHUNK)
        gate = _given(gate_ptr, gate_rows, live, i, 1.0, C, CHUNK)
        h += gate * _load(branch_ptr, branch_rows, live, i, C, CHUNK)
        _store(h_ptr, flat[:, None] * C, live, i, h, C, CHUNK)


@triton.jit(do_not_specialize=["S", "span"])
def gated_residual_bwd(
    dh_ptr, branch_ptr, gate_ptr, dbranch_ptr, dgate_ptr,
    S, span, stride_dhb, stride_dhs, stride_bb, stride_bs, stride_gate_b, stride_gate_s,
    C: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dbranch = gate * dh; dgate = branch * dh, summed over the program's tokens unless per token. dresidual is dh."""
    b, split = tl.program_id(0), tl.program_id(1)
    last = tl.minimum((split + 1) * span, S)
    dgates = _zeros(ROWS, CHUNK, CHUNKS)
    for start in tl.range(split * span, last, ROWS, num_stages=STAGES):
        tokens = start + tl.arange(0, ROWS)
        live = tokens < last
        out_rows = (b.to(tl.int64) * S + tokens)[:, None] * C
        sums = ()
        for i in tl.static_range(CHUNKS):
            dh = _load(dh_ptr, _offsets(b, tokens, stride_dhb, stride_dhs), live, i, C, CHUNK)
            gate = _load(gate_ptr, _offsets(b, tokens, stride_gate_b, stride_gate_s), live, i, C, CHUNK)
            branch = _load(branch_ptr, _offsets(b, tokens, stride_bb, stride_bs), live, i, C, CHUNK)
            _store(dbranch_ptr, out_rows, live, i, gate * dh, C, CHUNK)
            if GATE == STORED:
                _store(dgate_ptr, out_rows, live, i, branch * dh, C, CHUNK)
                sums = sums + (dgates[i],)
            else:
                sums = sums + (dgates[i] + branch * dh,)
        dgates = sums
    if GATE == SUMMED:
        _store_sums(dgate_ptr, b.to(tl.int64) * tl.num_programs(1) + split, dgates, C, CHUNK, CHUNKS)
