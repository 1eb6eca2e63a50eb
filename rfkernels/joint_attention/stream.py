"""One modality's share of a joint attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rfkernels import checks, native
from rfkernels.autocast import autocast_dtype


class Rope(NamedTuple):
    """Rotary position embedding of one stream, applied to q and k after their norm."""

    cos: Tensor
    """[S, D/2], [1, S, D/2] or [B, S, D/2], fp32: an angle once, not for both of its pair."""
    sin: Tensor
    """Shape of cos."""
    interleaved: bool = True
    """Pairs are (0, 1), (2, 3), ... (FLUX); False: (0, D/2), (1, D/2 + 1), ... (half-split)."""


class Stream:
    """Queries, keys and values of one stream (text, image, ...).

    Args:
        q, k, v: [B, S, H, D]; one dtype. Read with their strides if the last dimension's is 1, else copied. q may be
            None if `queries` is False.
        q_weight, k_weight: [D], weights of an RMSNorm over D of q and k; None: that side is not normalised.
        lengths: [B], integer; tokens from lengths[b] on are padding: no query sees them, and their own rows are zeros.
        rope: rotary embedding, a `Rope` or its (cos, sin), or None.
        queries: False for a stream that only gives keys and values; its output is None.
    Raises: ValueError or TypeError that names the argument.

    `like` is a tensor with the dtype and device of q, k and v, `copied` names what had to be.
    """

    def __init__(
        self,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        lengths: Tensor | None = None,
        rope: Rope | tuple[Tensor, Tensor] | None = None,
        queries: bool = True,
    ) -> None:
        op = "Stream"
        q, k, v = _autocast(q, k, v)
        checks.is_float(op, k=k, v=v)
        checks.has_rank(op, 4, "[B, S, H, D]", k=k, v=v)
        if q is None and queries:
            raise ValueError(f"{op}: q is None; expected [B, S, H, D], or queries=False")
        given = {"v": v} if q is None else {"q": q, "v": v}
        checks.is_float(op, **given)
        checks.same_shape(op, "k", k, **given)
        checks.same_dtype(op, "k", k, **given)
        checks.same_device(op, "k", k, **given)
        given = {"k": k, "v": v, **({} if q is None else {"q": q})}
        k, v, *rest = made = checks.unit_stride(**given)
        self.copied = tuple(n for n, a, b in zip(given, given.values(), made, strict=True) if a is not b)
        self._parts: tuple[Tensor | None, Tensor, Tensor] | None = (rest[0] if rest else None, k, v)
        self.packed_tensor: Tensor | None = None
        self._finish(k.shape, k, q_weight, k_weight, lengths, rope, queries)

    def _finish(
        self,
        shape: torch.Size,
        like: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        lengths: Tensor | None,
        rope: Rope | tuple[Tensor, Tensor] | None,
        queries: bool,
    ) -> None:
        op = "Stream"
        batch, dim = shape[0], shape[3]
        for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
            if weight is not None and not checks.fits_weight(weight, dim, like):
                checks.is_float(op, **{name: weight})
                checks.has_shape(op, (dim,), "to match the head dimension", **{name: weight})
                checks.same_device(op, "k", like, **{name: weight})
        if lengths is not None:
            checks.is_tensor(op, lengths=lengths)
            if lengths.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{op}: lengths has dtype {lengths.dtype}; expected int32 or int64")
            checks.has_shape(op, (batch,), "one per sample", lengths=lengths)
            checks.same_device(op, "k", like, lengths=lengths)
        rope = rope if rope is None else _rope(op, rope, shape, like)
        self.like = like
        self.q_weight, self.k_weight = q_weight, k_weight
        self.lengths, self.rope, self.queries = lengths, rope, queries

    @property
    def shape(self) -> torch.Size:
        """[B, S, H, D]."""
        given = self.packed_tensor
        return self.k.shape if given is None else given.shape[:2] + given.shape[3:]

    @property
    def requires_grad(self) -> bool:
        """Whether a part or a norm's weight asks for a gradient."""
        parts = (self.packed_tensor,) if self.packed_tensor is not None else self._views()
        return any(t is not None and t.requires_grad for t in (*parts, self.q_weight, self.k_weight))

    def _views(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """q, k, v. Of a packed stream they are made when asked for: the kernels never ask."""
        if self._parts is None:
            assert self.packed_tensor is not None
            *q, k, v = self.packed_tensor.unbind(2)
            self._parts = (q[0] if q else None, k, v)
        return self._parts

    @property
    def q(self) -> Tensor | None:
        return self._views()[0]

    @property
    def k(self) -> Tensor:
        return self._views()[1]

    @property
    def v(self) -> Tensor:
        return self._views()[2]

    @classmethod
    def packed(
        cls,
        qkv: Tensor,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        lengths: Tensor | None = None,
        rope: Rope | tuple[Tensor, Tensor] | None = None,
        queries: bool = True,
    ) -> Stream:
        """A stream whose q, k, v are views of one fused projection, read in place; its gradient is one tensor too.

        Args:
            qkv: [B, S, 3, H, D], unit-stride last dimension; or [B, S, 2, H, D], keys and values, if queries=False.
            The others as for a Stream.
        Raises: ValueError or TypeError that names the argument.
        """
        op = "Stream.packed"
        if lengths is rope is None and native.direct("is_packed", qkv, q_weight, k_weight, queries):
            stream = cls.__new__(cls)
            stream.copied, stream._parts, stream.packed_tensor, stream.like = (), None, qkv, qkv
            stream.q_weight, stream.k_weight = q_weight, k_weight
            stream.lengths, stream.rope, stream.queries = lengths, rope, queries
            return stream
        checks.is_float(op, qkv=qkv)
        if qkv.ndim != 5 or qkv.shape[2] not in ((3,) if queries else (2, 3)):
            wanted = "[B, S, 3, H, D]" + ("" if queries else " or [B, S, 2, H, D]")
            raise ValueError(f"{op}: qkv has shape {list(qkv.shape)}; expected {wanted}")
        (made,) = checks.unit_stride(qkv=qkv)
        stream = cls.__new__(cls)
        stream.copied = () if made is qkv else ("qkv",)
        (qkv,) = _autocast(made)
        stream._parts, stream.packed_tensor = None, qkv
        stream._finish(qkv.shape[:2] + qkv.shape[3:], qkv, q_weight, k_weight, lengths, rope, queries)
        return stream

    def valid(self) -> Tensor | None:
        """[B, S] bool, True where a token is not padding; None if none is."""
        if self.lengths is None:
            return None
        return torch.arange(self.shape[1], device=self.like.device) < self.lengths.unsqueeze(1)


def _rope(op: str, rope: Rope | tuple[Tensor, Tensor], shape: torch.Size, like: Tensor) -> Rope:
    """Rotary tables [S, D/2] or [B, S, D/2]."""
    if not isinstance(rope, tuple) or len(rope) not in (2, 3):
        raise TypeError(f"{op}: rope is {type(rope).__name__}; expected a Rope or its (cos, sin)")
    batch, length, heads, dim = shape
    made = []
    for name, table in (("rope.cos", rope[0]), ("rope.sin", rope[1])):
        checks.is_float(op, **{name: table})
        checks.same_device(op, "k", like, **{name: table})
        if table.ndim == 3 and table.shape[0] == 1 and batch != 1:
            table = table[0]
        fits = table.ndim in (2, 3) and table.shape[-1] == dim // 2 and table.shape[-2] == length
        if not fits or (table.ndim == 3 and table.shape[0] != batch):
            hint = ""
            if table.shape[-1:] == (dim,):
                hint = "; of a table that has each angle twice, pass [..., ::2] (interleaved) or [..., :D/2] (halves)"
            elif table.ndim > 1 and table.shape[-2] == heads != length:
                hint = f"; k has shape {list(shape)}, which looks like [B, H, S, D]: transpose(1, 2) first"
            raise ValueError(
                f"{op}: {name} has shape {list(table.shape)}; expected {[length, dim // 2]} "
                f"or {[batch, length, dim // 2]}{hint}"
            )
        made.append(table)
    cos, sin = made
    return Rope(cos, sin, *rope[2:])


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Under autocast q, k and v have one dtype, whatever came: a norm leaves fp32 where a projection leaves bf16."""
    first = next((t for t in tensors if isinstance(t, Tensor)), None)
    dtype = None if first is None else autocast_dtype(first.device.type)
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype == torch.float32 else t for t in tensors)
