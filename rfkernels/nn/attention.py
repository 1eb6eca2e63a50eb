"""Joint attention with its projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rfkernels
from rfkernels import checks
from rfkernels.bias import linear
from rfkernels.joint_attention.stream import Rope, Stream
from rfkernels.layers import Device, adapted, plain


class StreamAttention(nn.Module):
    """The projections of one stream around a joint attention: `qkv` and `proj`, and the weights of `q_norm` and
    `k_norm`, which are applied inside it, with its eps.

    Args:
        dim: channels of the stream.
        heads, head_dim: of the attention, equal in all streams that meet; head_dim is dim / heads unless given.
        qk_norm: RMSNorm with weight on queries and keys.
        project_out: False for a stream whose output nobody reads (the text of a last block).

    >>> text, image = StreamAttention(64, heads=2), StreamAttention(64, heads=2)
    >>> streams = [text.stream(torch.randn(2, 7, 64)), image.stream(torch.randn(2, 16, 64))]
    >>> image.project(rfkernels.joint_attention(streams)[1]).shape
    torch.Size([2, 16, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        qk_norm: bool = True,
        bias: bool = True,
        project_out: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        checks.positive_int(name, dim=dim, heads=heads, **({} if head_dim is None else {"head_dim": head_dim}))
        if head_dim is None and dim % heads:
            raise ValueError(f"{name}: dim is {dim}; expected a multiple of heads = {heads}, or head_dim to be given")
        self.heads, self.head_dim = heads, head_dim or dim // heads
        inner, where = heads * self.head_dim, {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * inner, bias=bias, **where)
        self.proj = nn.Linear(inner, dim, bias=bias, **where) if project_out else None
        self.q_norm = nn.RMSNorm(self.head_dim, **where) if qk_norm else None                       # type: ignore[arg-type]
        self.k_norm = nn.RMSNorm(self.head_dim, **where) if qk_norm else None                       # type: ignore[arg-type]

    def stream(
        self, x: Tensor, lengths: Tensor | None = None, rope: Rope | None = None, *, queries: bool = True
    ) -> Stream:
        """x [B, S, dim] as a stream for `rfkernels.joint_attention`; see Stream for the other arguments."""
        heads = (-1, self.heads, self.head_dim)
        q, k = (norm if norm is None else norm.weight for norm in (self.q_norm, self.k_norm))
        low_rank = adapted(self.qkv)
        readable = low_rank or plain(self.qkv)
        if queries and readable:
            whole = (3, *heads[1:])
            qkv = linear(x, self.qkv.weight, self.qkv.bias, whole, before="joint_attention")
            qkv = qkv + self.qkv.low_rank(x).unflatten(-1, whole) if low_rank else qkv              # type: ignore[operator]
            return Stream.packed(qkv, q, k, lengths, rope)
        if queries:
            return Stream.packed(self.qkv(x).unflatten(-1, heads), q, k, lengths, rope)
        if not readable:
            return Stream.packed(self.qkv(x).unflatten(-1, heads)[:, :, 1:], None, k, lengths, rope, queries=False)
        inner = self.heads * self.head_dim          # keys and values only: a third of the projection is not needed
        bias = None if self.qkv.bias is None else self.qkv.bias[inner:]
        kv = F.linear(x, self.qkv.weight[inner:], bias)
        kv = kv + self.qkv.low_rank(x, inner) if low_rank else kv                                   # type: ignore[operator]
        kv = kv.unflatten(-1, heads)
        return Stream.packed(kv, None, k, lengths, rope, queries=False)

    def project(self, attended: Tensor) -> Tensor:
        """[B, S, heads, head_dim] -> [B, S, dim]."""
        out = attended.flatten(2)
        if self.proj is None:
            return out
        low_rank = adapted(self.proj)
        if low_rank or plain(self.proj):
            projected = linear(out, self.proj.weight, self.proj.bias, before="gated_adaln")
            return projected + self.proj.low_rank(out) if low_rank else projected                   # type: ignore[operator]
        called: Tensor = self.proj(out)
        return called

    def extra_repr(self) -> str:
        norm, out = "" if self.q_norm else ", qk_norm=False", "" if self.proj else ", project_out=False"
        return f"heads={self.heads}, head_dim={self.head_dim}{norm}{out}"


class JointAttention(nn.Module):
    """Streams of tokens, each with weights of its own, that meet in one attention; nothing is concatenated.

    Args:
        dims: channels of each stream: (1536, 1536) for the text and image of SD3.
        heads: of the attention. The others as for StreamAttention.
        silent: indices of streams that give keys and values only and have no `proj` (the text of a last block). Their
            query projection and its norm are there, as in the released weights, but never read.
        eps: of the norms of queries and keys.

    >>> text, image = JointAttention((64, 64), heads=2)([torch.randn(2, 7, 64), torch.randn(2, 16, 64)])
    >>> image.shape
    torch.Size([2, 16, 64])
    """

    def __init__(
        self, dims: Sequence[int], heads: int, *, silent: Sequence[int] = (), eps: float = 1e-6, **settings: Any
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not dims:
            raise ValueError(f"{name}: dims is empty; expected the channels of each stream")
        checks.positive_int(name, heads=heads, **{f"dims[{i}]": dim for i, dim in enumerate(dims)})
        checks.positive(name, eps=eps)
        outside = [i for i in silent if not 0 <= i < len(dims)]
        if outside:
            raise ValueError(f"{name}: silent names streams {outside}; expected 0 to {len(dims) - 1}")
        self.silent, self.eps = frozenset(silent), eps
        settings.setdefault("head_dim", max(dims) // heads if max(dims) % heads == 0 else None)
        self.streams = nn.ModuleList(
            StreamAttention(dim, heads, project_out=i not in self.silent, **settings)
            for i, dim in enumerate(dims)
        )

    def forward(
        self,
        xs: Sequence[Tensor],
        lengths: Sequence[Tensor | None] | None = None,
        ropes: Sequence[Rope | None] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """
        Args:
            xs: one [B, S_i, dims[i]] per stream.
            lengths: of each stream None or [B], where its padding begins. ropes: of each stream None or its tables.
        Returns: one [B, S_i, dims[i]] per stream, None for a silent one.
        Raises: ValueError if the counts differ, and what `rfkernels.joint_attention` raises.
        """
        nothing = [None] * len(self.streams)
        for name, given in (("xs", xs), ("lengths", lengths or nothing), ("ropes", ropes or nothing)):
            if len(given) != len(self.streams):
                raise ValueError(
                    f"{type(self).__name__}: {name} has {len(given)} entries; expected {len(self.streams)}"
                )
        made = [
            half.stream(x, length, rope, queries=i not in self.silent)                            # type: ignore[operator]
            for i, (half, x, length, rope) in enumerate(
                zip(self.streams, xs, lengths or nothing, ropes or nothing, strict=True)
            )
        ]
        outs = rfkernels.joint_attention(made, eps=self.eps)
        return tuple(
            out if out is None else half.project(out)                                             # type: ignore[operator]
            for half, out in zip(self.streams, outs, strict=True)
        )

    def extra_repr(self) -> str:
        return f"silent={sorted(self.silent)}, eps={self.eps}" if self.silent else f"eps={self.eps}"
