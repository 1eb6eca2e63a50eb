"""Streams as an operator sees them: a flat list of tensors and a short string that says what they are.

Per stream, joined by ",": what it is made of ("3" packed qkv, "2" packed kv, "1" q k v, "0" k v), then a letter for
each of what it has: "q", "k" norm weights, "l" lengths, "i" or "h" a rotary embedding (interleaved, half-split), "x" no
queries. "3qk,2kx": a packed stream with both norms, and keys and values only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rfkernels.joint_attention.stream import Stream


@dataclass
class Parts:
    """One stream's tensors, and where the gradients of each go."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    packed: Tensor | None
    q_weight: Tensor | None
    k_weight: Tensor | None
    lengths: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool
    asks: bool
    """Whether it has queries, and so an output."""

    def differentiable(self) -> list[Tensor | None]:
        """As in the list of tensors, None for those that have no gradient."""
        separate = [t for t in (self.q, self.k, self.v) if t is not None]
        weights = [w for w in (self.q_weight, self.k_weight) if w is not None]
        activations = separate if self.packed is None else [self.packed]
        return [*activations, *weights, *[None] * sum(t is not None for t in (self.lengths, self.cos, self.sin))]


def flatten(streams: Sequence[Stream]) -> tuple[list[Tensor], str]:
    tensors: list[Tensor] = []
    codes = []
    for s in streams:
        parts = [s.packed_tensor] if s.packed_tensor is not None else [s.q, s.k, s.v]
        tensors += [t for t in parts if t is not None]
        if s.packed_tensor is not None:
            code = "3" if s.packed_tensor.shape[2] == 3 else "2"
        else:
            code = "0" if s.q is None else "1"
        cos, sin, interleaved = s.rope or (None, None, False)
        has = (("q", s.q_weight), ("k", s.k_weight), ("l", s.lengths), ("i" if interleaved else "h", cos))
        for letter, tensor in has:
            if tensor is not None:
                tensors.append(tensor)
                code += letter
        if sin is not None:
            tensors.append(sin)
        codes.append(code + "x" * (not s.queries))
    return tensors, ",".join(codes)


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables as the kernels read them: of one shape, contiguous. They may be parts of complex numbers, and one
    may be per sample where the other is shared."""
    cos, sin = torch.broadcast_tensors(cos, sin)
    return cos.contiguous(), sin.contiguous()


def parse(tensors: Sequence[Tensor], layout: str) -> list[Parts]:
    rest: Iterator[Tensor] = iter(tensors)
    streams = []
    for code in layout.split(","):
        kind, has = code[0], code[1:]
        packed = next(rest) if kind in "23" else None
        if packed is not None:
            *asked, k, v = packed.unbind(2)
            q = asked[0] if asked else None
        else:
            q, k, v = next(rest) if kind == "1" else None, next(rest), next(rest)
        q_weight, k_weight = (next(rest).contiguous() if letter in has else None for letter in "qk")
        lengths = next(rest).contiguous() if "l" in has else None
        rope = "i" in has or "h" in has
        cos, sin = _tables(next(rest), next(rest)) if rope else (None, None)
        asks = q is not None and "x" not in has
        streams.append(Parts(q, k, v, packed, q_weight, k_weight, lengths, cos, sin, "i" in has, asks))
    return streams
