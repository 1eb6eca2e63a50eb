"""Launches of joint attention's kernels: what runs on which tensors. Which implementation runs is decided in op.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import log2
from typing import Any

import torch
from torch import Tensor

from rfkernels.joint_attention.layout import Parts, parse
from rfkernels.launch_tables import attention_launch
from rfkernels.triton_support import MAX_GRID, capability, device_name, kernels_of, on

LOG2_E = log2(2.718281828459045)
# By dtype, (centre, limit) of the shift that replaces a running maximum, in units of log2: a row whose scores are
# within +- limit has exponents from centre - 2 limit to centre. bf16 is normal from 2^-126, and 2^64 leaves sums room.
# fp16 is normal from 2^-14 to 2^15. fp32 stays near 0, where an exponent has more bits behind its point, and above
# 2^-100, so that the remainders its three products are made of are normal too.
EXPONENTS = {torch.bfloat16: (64.0, 94.0), torch.float16: (15.0, 14.5), torch.float32: (0.0, 50.0)}
TOKENS = 128                 # of a program that only reads or writes: enough loads in flight, whole lines
MAX_TOKEN_STRIDE = 2**31 // 128              # no tile has more tokens
SUMMED_ROWS, SUMMED_COLUMNS = 1024, 8        # of a program of sum_rows at a time: eight 16-byte loads a thread


def beyond_grid(shape: torch.Size) -> str | None:
    """Why there are too many samples or heads in [B, S, H, D] for a launch, or None."""
    most = max(shape[0], shape[2])
    return f"a launch takes at most {MAX_GRID} samples and heads, not {most}" if most > MAX_GRID else None


def beyond_tile(*activations: Tensor | None) -> str | None:
    """Why tokens of these [B, S, ...] lie too far apart for 32 bits within a tile of attention, or None."""
    for x in activations:
        if x is not None and x.stride(1) >= MAX_TOKEN_STRIDE and x.shape[1] > 1:
            return f"the kernels take token strides below {MAX_TOKEN_STRIDE}, not {x.stride(1)}"
    return None


_forward_kernels, _backward_kernels, _prepare_kernels = (
    kernels_of(f"{__package__}.{name}") for name in ("kernels", "backward_kernels", "prepare_kernels")
)


@dataclass
class Core:
    """What the attention kernels see: streams that give keys, and among them those that ask."""

    streams: list[Parts]
    asking: list[Parts]
    norm: bool
    """q and k are as projected, and every stream normalises both: the kernels do it."""
    bounded: bool
    """Keys are known to have length sqrt(D) before their weight; a rotation may stretch them, so not with one."""

    @property
    def sizes(self) -> list[int]:
        return [s.k.shape[1] for s in self.streams]

    @property
    def query_sizes(self) -> list[int]:
        return [s.k.shape[1] for s in self.asking]


def _strides(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """(batch, token, head), each a tuple over the streams."""
    return tuple(zip(*[t.stride()[:3] for t in tensors], strict=True))


def _four(sizes: Sequence[int]) -> list[int]:
    return [*sizes, *[0] * (4 - len(sizes))]


def _tiles(sizes: Sequence[int], block: int) -> int:
    return sum(-(-s // block) for s in sizes)


def _alike(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Of one dtype: a kernel picks one of them at run time."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) <= 1:
        return tuple(tensors)
    widest = torch.float32 if any(d.is_floating_point for d in dtypes) else torch.int64
    return tuple(t if t is None else t.to(widest) for t in tensors)


def _query_weights(core: Core) -> tuple[Tensor | None, ...]:
    """For the kernels' own norm only: where not all streams have one, what they have is in the queries already."""
    return _alike([s.q_weight for s in core.asking]) if core.norm else (None,) * len(core.asking)


def _lengths(streams: Sequence[Parts], all_: Sequence[Parts]) -> tuple[Tensor | None, ...]:
    if all(s.lengths is None for s in all_):
        return (None,) * len(streams)
    full = [torch.full(s.k.shape[:1], s.k.shape[1], dtype=torch.int64, device=s.k.device) if s.lengths is None
            else s.lengths.contiguous() for s in streams]  # fmt: skip
    return _alike(full)


def _block_d(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _settings(kernel: str, like: Tensor) -> tuple[int, int, dict[str, Any]]:
    """(queries, keys in a tile, compile-time and launch arguments)."""
    return _settings_at(kernel, like.shape[-1], like.dtype, like.device, capability(like.device))


@lru_cache(maxsize=4096)
def _settings_at(
    kernel: str, dim: int, dtype: torch.dtype, device: torch.device, arch: int
) -> tuple[int, int, dict[str, Any]]:
    launch = attention_launch(kernel, dim, dtype.itemsize, arch, device_name(device))
    constants = {"D": dim, "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BLOCK_D": _block_d(dim)}
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    if launch.registers:
        options["maxnreg"] = launch.registers
    # Three tf32 products for one of fp32; AMD has none. It says nothing about the products of 16-bit numbers.
    precision = "tf32x3" if dtype == torch.float32 and arch else "ieee"
    return launch.block_m, launch.block_n, {**constants, **options, "PRECISION": precision}


def _empty_heads(s: Parts) -> Tensor:
    """[B, S, H, D], contiguous."""
    return torch.empty(s.k.shape, dtype=s.k.dtype, device=s.k.device)


# --- Streams that the kernels cannot take as they are -----------------------------------------------------------------


def prepare(x: Tensor, weight: Tensor | None, s: Parts, eps: float, out: Tensor | None = None) -> Tensor:
    """rotate(rmsnorm(x) * weight), [B, S, H, D]; weight and rotation where the stream has them."""
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    settings = _prepare_settings(x, weight, s)
    if out.numel():
        _prepare_kernels().prepare_fwd[(-(-x.shape[1] // TOKENS), x.shape[2], x.shape[0])](
            x, out, weight, s.cos, s.sin, s.lengths, x.stride()[:3], out.stride()[:3], _angle_strides(s), x.shape[1],
            eps, **settings,
        )  # fmt: skip
    return out


def prepare_backward(
    dout: Tensor, x: Tensor, dx: Tensor, weight: Tensor | None, s: Parts, eps: float
) -> Tensor | None:
    """Fills dx from dout, the gradient of what `prepare` gave; returns the gradient of the weight."""
    if not x.numel():
        return None if weight is None else torch.zeros_like(weight)
    grid = (-(-x.shape[1] // TOKENS), x.shape[2], x.shape[0])
    rows = grid[0] * grid[1] * grid[2]
    partials = None if weight is None else torch.empty(rows, x.shape[3], dtype=torch.float32, device=x.device)
    strides = (dout.stride()[:3], x.stride()[:3], dx.stride()[:3], _angle_strides(s))
    _prepare_kernels().prepare_bwd[grid](
        dout, x, dx, weight, s.cos, s.sin, s.lengths, partials, *strides, x.shape[1], eps,
        **_prepare_settings(x, weight, s),
    )  # fmt: skip
    return None if weight is None or partials is None else _sum_rows(partials, [weight], [rows])[0]


def _prepare_settings(x: Tensor, weight: Tensor | None, s: Parts) -> dict[str, Any]:
    half = x.shape[3] // 2
    flags = {"NORM": weight is not None, "ROPE": s.cos is not None, "LENGTHS": s.lengths is not None}
    sizes = {"INTERLEAVED": s.interleaved, "H": half, "BLOCK": TOKENS, "BLOCK_H": _block_d(half)}
    return {**flags, **sizes, "num_warps": 4, "enable_fp_fusion": True}


def _angle_strides(s: Parts) -> tuple[int, ...]:
    """(batch, token) of the rotary tables."""
    if s.cos is None or s.sin is None:
        return (0, 0)
    return (0, s.cos.stride(0)) if s.cos.ndim == 2 else s.cos.stride()[:2]


def core_of(streams: list[Parts], eps: float) -> Core:
    """The streams with norm and rotation applied where the attention kernels do not do it themselves."""
    asking = [s for s in streams if s.asks]
    plain = all(s.cos is None for s in streams)
    norm = plain and all(s.k_weight is not None for s in streams) and all(s.q_weight is not None for s in asking)
    bounded = plain and all(s.k_weight is not None for s in streams)
    if not norm:
        def seen(s: Parts) -> Parts:
            q, k = s.q, s.k
            if q is not None and s.asks and (s.q_weight is not None or s.cos is not None):
                q = prepare(q, s.q_weight, s, eps)
            if s.k_weight is not None or s.cos is not None:
                k = prepare(k, s.k_weight, s, eps)
            return replace(s, q=q, k=k)

        streams = [seen(s) for s in streams]
        asking = [s for s in streams if s.asks]
    return Core(streams, asking, norm, bounded)


# --- Forward ----------------------------------------------------------------------------------------------------------


def forward(tensors: list[Tensor], layout: str, scale: float, eps: float) -> list[Tensor]:
    """[out of each asking stream [B, S, H, D], lse [B, H, queries], rstd of the keys [B, H, keys] or [0]]."""
    streams = parse(tensors, layout)
    like = streams[0].k
    with on(like.device):
        return _forward(core_of(streams, eps), scale, eps)


def _forward(core: Core, scale: float, eps: float) -> list[Tensor]:
    like = core.streams[0].k
    batch, _, heads, dim = like.shape
    outs = [_empty_heads(s) for s in core.asking]
    keys, queries = sum(core.sizes), sum(core.query_sizes)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=like.device)
    rstd = torch.empty((batch, heads, keys) if core.norm else (0,), dtype=torch.float32, device=like.device)
    if not lse.numel():
        return [*outs, lse, rstd.zero_()]
    kernels = _forward_kernels()
    ks, vs = tuple(s.k for s in core.streams), tuple(s.v for s in core.streams)
    lengths = _lengths(core.streams, core.streams)
    if rstd.numel():
        kernels.key_rstd[(_tiles(core.sizes, TOKENS), heads, batch)](
            ks, _strides(ks), lengths, rstd, eps, keys, *_four(core.sizes), LENGTHS=lengths[0] is not None,
            D=dim, N=len(ks), BLOCK=TOKENS, BLOCK_D=_block_d(dim), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    qs = tuple(s.q for s in core.asking if s.q is not None)
    block, _, settings = _settings("attention_fwd", like)
    centre, limit = EXPONENTS[like.dtype]
    kernels.attention_fwd[(_tiles(core.query_sizes, block), heads, batch)](
        qs, ks, vs, tuple(outs), _query_weights(core), _alike([s.k_weight for s in core.streams]),
        _lengths(core.asking, core.streams), lengths, _strides(qs), _strides(ks), _strides(vs),
        rstd, lse, scale * LOG2_E, eps, queries, keys, *_four(core.query_sizes), *_four(core.sizes),
        NORM=core.norm, BOUNDED=core.bounded, LENGTHS=lengths[0] is not None, CENTRE=centre, LIMIT=limit,
        NQ=len(qs), N=len(ks), **settings,
    )  # fmt: skip
    return [*outs, lse, rstd]


# --- Backward ---------------------------------------------------------------------------------------------------------


@dataclass
class Gradients:
    """Of one stream: q, k, v as parts of one tensor if they came packed."""

    activations: list[Tensor]
    q: Tensor | None
    k: Tensor
    v: Tensor
    weights: dict[str, Tensor]

    @staticmethod
    def empty(s: Parts) -> Gradients:
        if s.packed is not None:
            whole = torch.empty(s.packed.shape, dtype=s.packed.dtype, device=s.packed.device)
            *asked, k, v = whole.unbind(2)
            q = asked[0] if asked else None
            activations = [whole]
        else:
            q, k, v = None if s.q is None else _empty_heads(s), _empty_heads(s), _empty_heads(s)
            activations = [t for t in (q, k, v) if t is not None]
        if q is not None and not s.asks:
            q.zero_()
        return Gradients(activations, q, k, v, {})

    def all(self, s: Parts) -> list[Tensor]:
        """In the order of the stream's differentiable tensors; zeros for a weight that nothing used."""
        present = [(name, w) for name, w in (("q", s.q_weight), ("k", s.k_weight)) if w is not None]
        return [*self.activations, *(self.weights[n] if n in self.weights else torch.zeros_like(w) for n, w in present)]


def backward(
    grads: list[Tensor], outputs: list[Tensor], tensors: list[Tensor], layout: str, scale: float, eps: float, bias: bool
) -> list[Tensor]:
    """Gradients of the differentiable ones of `tensors`, in their order; if `bias`, then of each stream, which all have
    to be as `summable` says, the sum of its gradient over all tokens, [3, H, D]. grads: one per asking stream."""
    streams = parse(tensors, layout)
    with on(streams[0].k.device):
        found, sums = _backward(streams, grads, outputs, scale, eps, bias)
    return [*(t for s, g in zip(streams, found, strict=True) for t in g.all(s)), *sums]


def summable(layout: str) -> bool:
    """Whether the kernels can sum the streams' gradients: all are packed whole, ask, and need no preparation."""
    return {code.replace("l", "") for code in layout.split(",")} in ({"3"}, {"3qk"})


def _backward(
    streams: list[Parts], grads: list[Tensor], outputs: list[Tensor], scale: float, eps: float, bias: bool
) -> tuple[list[Gradients], list[Tensor]]:
    found = [Gradients.empty(s) for s in streams]
    core = core_of(streams, eps)
    lse, rstd = outputs[-2:]
    if not lse.numel():
        for g in found:
            for t in g.activations:
                t.zero_()
        return found, [torch.zeros_like(g.activations[0][0, 0]) for g in found] if bias else []
    asking = [i for i, s in enumerate(streams) if s.asks]
    # Gradients of what the kernels see; of a prepared stream these are not yet those of the stream.
    dqs = [found[i].q if core.streams[i].q is streams[i].q else _empty_heads(streams[i]) for i in asking]
    dks = [g.k if c.k is s.k else _empty_heads(s) for g, c, s in zip(found, core.streams, streams, strict=True)]
    dvs = [g.v for g in found]
    weights, sums = _core_backward(core, grads, outputs[:-2], lse, rstd, dqs, dks, dvs, scale, eps, bias)
    for which, i in enumerate(asking):
        if core.norm:
            found[i].weights["q"] = weights[which]
        elif core.streams[i].q is not streams[i].q:
            s, dq = streams[i], found[i].q
            dweight = prepare_backward(dqs[which], s.q, dq, s.q_weight, s, eps)       # type: ignore[arg-type]
            if dweight is not None:
                found[i].weights["q"] = dweight
    for i, (s, g) in enumerate(zip(streams, found, strict=True)):
        if core.norm:
            g.weights["k"] = weights[len(asking) + i]
        elif core.streams[i].k is not s.k:
            dweight = prepare_backward(dks[i], s.k, g.k, s.k_weight, s, eps)
            if dweight is not None:
                g.weights["k"] = dweight
    return found, sums


def _core_backward(
    core: Core, grads: Sequence[Tensor], outs: Sequence[Tensor], lse: Tensor, rstd: Tensor,
    dqs: Sequence[Tensor | None], dks: Sequence[Tensor], dvs: Sequence[Tensor], scale: float, eps: float, bias: bool,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Fills dqs, dks, dvs. Returns the gradients of the norm weights if the kernels normalise, queries', then keys';
    and if `bias` the sums of each stream's gradients, [3, H, D]."""
    like = core.streams[0].k
    batch, _, heads, dim = like.shape
    kernels = _backward_kernels()
    qs = tuple(s.q for s in core.asking if s.q is not None)
    ks, vs = tuple(s.k for s in core.streams), tuple(s.v for s in core.streams)
    douts = tuple(g if g.stride(-1) == 1 and g.stride(1) < MAX_TOKEN_STRIDE else g.contiguous() for g in grads)
    delta = torch.empty_like(lse)
    folds = [torch.empty((len(ks), *q.shape), dtype=q.dtype, device=q.device) for q in qs] if core.norm else []
    queries = tuple(folds) if core.norm else qs                           # as the second kernel reads them
    strides_q = _strides([f[0] for f in folds] if core.norm else qs)
    block_q, _, settings_q = _settings("attention_bwd_q", like)
    _, block_k, settings_k = _settings("attention_bwd_kv", like)
    q_rows = [-(-s // block_q) * heads * batch for s in core.query_sizes]
    sections = (1 + len(ks)) if core.norm else 0
    partials = torch.empty((sections + bias) * sum(q_rows), dim, dtype=torch.float32, device=like.device)
    q_weights, k_weights = _query_weights(core), _alike([s.k_weight for s in core.streams])
    q_lengths, k_lengths = _lengths(core.asking, core.streams), _lengths(core.streams, core.streams)
    sizes = (*_four(core.query_sizes), *_four(core.sizes))
    flags = {"NORM": core.norm, "LENGTHS": k_lengths[0] is not None, "NQ": len(qs), "N": len(ks), "BIAS": bias}
    tiles_q, tiles_k = _tiles(core.query_sizes, block_q), _tiles(core.sizes, block_k)
    sums_kv = torch.empty(2 * tiles_k * batch * heads * bias, dim, dtype=torch.float32, device=like.device)
    strides_k, strides_v, strides_o = _strides(ks), _strides(vs), _strides(douts)
    filled = tuple(t for t in dqs if t is not None)
    kernels.attention_bwd_q[(tiles_q, heads, batch)](
        qs, ks, vs, tuple(outs), douts, filled, queries, q_weights, k_weights, q_lengths, k_lengths,
        _strides(qs), strides_k, strides_v, strides_o, _strides(filled),
        rstd, lse, delta, partials, scale * LOG2_E, eps, lse.shape[2], sum(core.sizes), *sizes, **flags,
        **settings_q,
    )  # fmt: skip
    kernels.attention_bwd_kv[(tiles_k, heads, batch)](
        queries, ks, vs, douts, tuple(dks), tuple(dvs), q_lengths, k_lengths,
        strides_q, strides_k, strides_v, strides_o, _strides(dks), _strides(dvs),
        lse, delta, sums_kv, scale * LOG2_E, eps, lse.shape[2], *sizes, **flags, **settings_k,
    )  # fmt: skip
    sums = [torch.empty((3, heads, dim), dtype=like.dtype, device=like.device) for _ in ks] if bias else []
    if bias:
        kernels.sum_heads[(heads, 3 * len(ks))](
            tuple(sums), partials[sections * sum(q_rows) :], sums_kv, batch, *_four(core.sizes), D=dim, N=len(ks),
            BLOCK_M=block_q, BLOCK_N=block_k, ROWS=64, BLOCK_D=_block_d(dim), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    if not core.norm:
        return [], sums
    weights = [s.q_weight for s in core.asking] + [s.k_weight for s in core.streams]
    return _sum_rows(partials, [w for w in weights if w is not None], q_rows + [sum(q_rows)] * len(ks)), sums


def _sum_rows(partials: Tensor, like: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    """Consecutive runs of rows of partials, summed: one gradient for each weight."""
    dim = partials.shape[1]
    dtypes = {w.dtype for w in like}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32               # the kernel picks one of them at run time
    outs = [torch.empty(w.shape, dtype=dtype, device=w.device) for w in like]
    _backward_kernels().sum_rows[(len(outs), -(-dim // SUMMED_COLUMNS))](
        tuple(outs), partials, *rows, *[0] * (8 - len(rows)), D=dim, N=len(outs), ROWS=SUMMED_ROWS,
        COLUMNS=SUMMED_COLUMNS, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return [o.to(w.dtype) for o, w in zip(outs, like, strict=True)]
