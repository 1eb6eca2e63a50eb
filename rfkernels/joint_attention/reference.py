"""Joint attention in plain PyTorch: norm, rotate, concatenate, softmax in fp32, split."""

from __future__ import annotations

import torch
from torch import Tensor

from rfkernels.joint_attention.stream import Rope, Stream
from rfkernels.qk_norm.reference import rms_norm


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """x [B, S, H, D] rotated by the angles of its token."""
    cos, sin = (t.unsqueeze(-2).to(torch.promote_types(x.dtype, torch.float32)) for t in (rope.cos, rope.sin))
    first, second = (x[..., 0::2], x[..., 1::2]) if rope.interleaved else x.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    out = torch.stack(turned, -1).flatten(-2) if rope.interleaved else torch.cat(turned, -1)
    return out.to(x.dtype)


def prepared(x: Tensor, weight: Tensor | None, rope: Rope | None, eps: float) -> Tensor:
    if weight is not None:
        x = rms_norm(x, weight, eps)
    return x if rope is None else rotate(x, rope)


def key_mask(streams: tuple[Stream, ...]) -> Tensor | None:
    """[B, 1, 1, all keys] bool, True where a key may be seen; None if all may."""
    if all(s.lengths is None for s in streams):
        return None
    masks = []
    for s in streams:
        valid = s.valid()
        masks.append(torch.ones(s.k.shape[:2], dtype=torch.bool, device=s.k.device) if valid is None else valid)
    return torch.cat(masks, 1)[:, None, None, :]


def joint_attention(streams: tuple[Stream, ...], scale: float, eps: float) -> tuple[Tensor | None, ...]:
    wide = torch.promote_types(streams[0].k.dtype, torch.float32)
    k = torch.cat([prepared(s.k.to(wide), s.k_weight, s.rope, eps) for s in streams], 1)
    v = torch.cat([s.v.to(wide) for s in streams], 1)
    seen = key_mask(streams)
    outputs: list[Tensor | None] = []
    for stream in streams:
        if not stream.queries or stream.q is None:
            outputs.append(None)
            continue
        q = prepared(stream.q.to(wide), stream.q_weight, stream.rope, eps)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
        if seen is not None:
            scores = scores.masked_fill(~seen, torch.finfo(wide).min)
        p = scores.softmax(-1)
        if seen is not None:
            p = p * seen                       # a sample without any key gets zeros, not the mean of padding
        out = torch.einsum("bhqk,bkhd->bqhd", p, v)
        valid = stream.valid()
        if valid is not None:
            out = out * valid[:, :, None, None]
        outputs.append(out.to(stream.q.dtype))
    return tuple(outputs)
