"""The chunks of a modulation [B, n * C] or [B, 1, n * C], with their gradients written in place.

`chunk` of PyTorch joins the n gradients by a concatenation in its backward. Here the ops that read the chunks write
their gradients straight into one tensor, so there is nothing left to join.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rfkernels import checks, native
from rfkernels.registration import watched


class _Gradient:
    """The gradient of one modulation, while a backward is filling it. Each backward gets a tensor of its own."""

    def __init__(self, modulation: Tensor, count: int) -> None:
        self.like, self.count = modulation.detach(), count
        self._task = -1
        self._taken: set[int] = set()
        self._buffer: Tensor | None = None

    def whole(self) -> Tensor:
        task = torch._C._current_graph_task_id()
        if self._buffer is None or task != self._task:
            self._buffer = torch.empty_like(self.like, memory_format=torch.contiguous_format)
            self._task, self._taken = task, set()
        return self._buffer

    def take(self, i: int, width: int) -> Tensor | None:
        """Part i, the first time it is asked for: a chunk that two ops read gets a gradient from each."""
        whole = self.whole()
        if i in self._taken:
            return None
        self._taken.add(i)
        return whole.view(len(whole), -1)[:, i * width : (i + 1) * width]

    def finish(self) -> tuple[Tensor | None, set[int]]:
        """All of it, and which parts ops were given to write in this backward; (None, nothing) if none was."""
        here = self._buffer is not None and self._task == torch._C._current_graph_task_id()
        whole, self._buffer = (self._buffer if here else None), None
        return whole, self._taken if here else set()


class _Part:
    """Chunk i of a modulation."""

    __slots__ = ("__weakref__", "gradient", "i")

    def __init__(self, gradient: _Gradient, i: int) -> None:
        self.gradient, self.i = gradient, i


_alive: WeakValueDictionary[int, _Part] = WeakValueDictionary()          # by the chunk's address


def _is(grad: Tensor | None, part: Tensor) -> bool:
    """Whether a gradient lies where it was to be written."""
    return grad is not None and grad.data_ptr() == part.data_ptr() and grad.stride(0) == part.stride(0)


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, modulation: Tensor, count: int) -> tuple[Tensor, ...]:
        chunks, ctx.gradient = modulation.chunk(count, dim=-1), _Gradient(modulation, count)
        ctx.parts = [_Part(ctx.gradient, i) for i in range(count)]
        first, step = modulation.data_ptr(), chunks[0].shape[-1] * modulation.element_size()
        _alive.update({first + i * step: part for i, part in enumerate(ctx.parts)})
        ctx.set_materialize_grads(False)
        return chunks

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        gradient: _Gradient = ctx.gradient
        like = gradient.like
        whole, taken = gradient.finish()                                  # nothing, if the gradients have a graph
        parts = () if whole is None else whole.chunk(len(grads), dim=-1)
        if whole is None or not all(_is(grads[i], parts[i]) for i in taken):
            # None is in place, as of a compiled region; or a part is a sum of several uses, or was written for a chunk
            # of the same memory that another call made, which still needs it: nothing of it may be touched
            nothing = like.new_zeros(()).expand(*like.shape[:-1], like.shape[-1] // len(grads))
            return torch.cat([nothing if grad is None else grad for grad in grads], -1), None
        for i, (part, grad) in enumerate(zip(parts, grads, strict=True)):
            if grad is None:
                part.zero_()
            elif i not in taken:
                part.copy_(grad)                                          # from another op
        return whole, None


def chunk_modulation(modulation: Tensor, count: int) -> tuple[Tensor, ...]:
    """``modulation.chunk(count, dim=-1)`` for the ops of this family, which then write the chunks' gradients in place.

    Args:
        modulation: [B, count * C] or [B, 1, count * C]; of other shapes the chunks are PyTorch's own.
        count: number of chunks: 6 for a block of an MM-DiT.
    Returns: count views of modulation, C channels each.
    Raises: ValueError or TypeError that names the argument.

    >>> shift, scale, gate = chunk_modulation(torch.randn(2, 3 * 64), 3)
    >>> gate.shape
    torch.Size([2, 64])
    """
    op = "chunk_modulation"
    if (made := native.direct(op, modulation, count)) is not None:
        return tuple(made)
    checks.is_float(op, modulation=modulation)
    checks.positive_int(op, count=count)
    if modulation.ndim == 0 or modulation.shape[-1] % count:
        raise ValueError(
            f"{op}: modulation has shape {list(modulation.shape)}; expected [B, count * C] with count = {count}"
        )
    in_place = modulation.ndim == 2 or (modulation.ndim == 3 and modulation.shape[1] == 1)
    if not in_place or watched((modulation,)) or not modulation.requires_grad or not modulation.is_contiguous():
        return modulation.chunk(count, dim=-1)
    return _Chunks.apply(modulation, count)


def gradient_of(vector: Tensor) -> Tensor:
    """An uninitialised gradient for a modulation vector: a part of its modulation's, if it is a chunk of one. Only for
    plain eager mode: an operator's outputs must not share memory."""
    found = _alive.get(vector.data_ptr()) if vector.ndim == 2 and _alive else None
    if found is not None:
        (batch, width), like = vector.shape, found.gradient.like
        pitch = like.shape[-1] if batch == 1 else vector.stride(0)
        if (like.shape[0], like.shape[-1]) == (batch, pitch) and found.gradient.count * width == pitch:
            part = found.gradient.take(found.i, width)
            if part is not None:
                return part
    return torch.empty_like(vector, memory_format=torch.contiguous_format)
