"""Joint attention on `scaled_dot_product_attention`: norm, concatenate, call, split."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rfkernels.joint_attention.reference import key_mask, prepared
from rfkernels.joint_attention.stream import Stream


def joint_attention(streams: tuple[Stream, ...], scale: float, eps: float) -> tuple[Tensor | None, ...]:
    asking = [s for s in streams if s.queries and s.q is not None]
    if not asking:
        return (None,) * len(streams)
    q = joined([prepared(s.q, s.q_weight, s.rope, eps) for s in asking if s.q is not None])
    k = joined([prepared(s.k, s.k_weight, s.rope, eps) for s in streams])
    v = joined([s.v for s in streams])
    seen = key_mask(streams)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    if seen is not None:
        out = out.masked_fill(~seen.any(-1, keepdim=True), 0)     # no key: zeros, whatever the backend of SDPA does
    parts = iter(out.transpose(1, 2).split([s.k.shape[1] for s in asking], 1))
    return tuple(cut(next(parts), s) if s.queries and s.q is not None else None for s in streams)


def joined(tensors: list[Tensor]) -> Tensor:
    """[B, S_i, H, D] each -> [B, H, S, D]."""
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)).transpose(1, 2)


def cut(out: Tensor, stream: Stream) -> Tensor:
    valid = stream.valid()
    return out if valid is None else out * valid[:, :, None, None]
