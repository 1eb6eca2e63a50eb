"""Triton kernel of the MLP between its two products: the backward of tanh-GELU, its value again, and the bias gradient.

With s = sigmoid(2 u), u = sqrt(2/pi) (h + 0.044715 h^3): gelu(h) = h s, gelu'(h) = s + 2 h s (1 - s) u'.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "span"])
def gelu_bwd(
    h_ptr, da_ptr, a_ptr, dh_ptr, partials_ptr, rows, span, C: tl.constexpr,
    VALUE: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """h, da [rows, C], contiguous. Program: CHUNK columns of `span` rows, ROWS at a time. dh = da gelu'(h); a = gelu(h)
    if VALUE; a row of partials [splits, C] fp32, the sum of dh over its rows, if BIAS."""
    columns = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = (columns < C)[None, :]
    first = tl.program_id(1).to(tl.int64) * span
    count = tl.minimum(span, rows - first).to(tl.int32)
    dtype = h_ptr.dtype.element_ty
    sums = tl.zeros([ROWS, CHUNK], tl.float32)
    h_ptr, da_ptr, a_ptr, dh_ptr = h_ptr + first * C, da_ptr + first * C, a_ptr + first * C, dh_ptr + first * C
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)                                               # from the first
        here = row.to(tl.int64)[:, None] * C + columns[None, :]                        # [ROWS, CHUNK]
        mask = (row < count)[:, None] & inside
        h = tl.load(h_ptr + here, mask=mask, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + here, mask=mask, other=0.0).to(tl.float32)
        square = h * h
        # 2 sqrt(2/pi) = 1.5957691, times log2(e) for exp2; e s is 1 - s without its cancellation
        e = tl.exp2(tl.minimum(-2.3022082 * h * (1.0 + 0.044715 * square), 126.0))
        s = 1.0 / (1.0 + e)
        a = h * s
        dh = (da * (s + a * e * s * (1.5957691 + 0.21406445 * square))).to(dtype)
        tl.store(dh_ptr + here, dh, mask=mask)
        if VALUE:
            tl.store(a_ptr + here, a.to(dtype), mask=mask)
        if BIAS:
            sums += dh.to(tl.float32)                                                   # of what the product reads
    if BIAS:
        tl.store(partials_ptr + tl.program_id(1) * C + columns, tl.sum(sums, 0), mask=columns < C)
