"""Gradients of biases that the next op has at hand.

A linear layer's bias has as its gradient the sum of the output's gradient over all tokens: in eager PyTorch a pass over
a tensor that the op before, in the backward, has only just written. That op holds the rows and can sum them. It is told
so by a mark on the layer's output, and hands the sums over as an attribute of the gradient. The layer takes them if the
gradient is still the tensor that left: autograd may have added another to it, which its version tells.

Plain eager mode only. A compiler fuses such sums by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rfkernels import dispatch, native
from rfkernels.autocast import to_autocast
from rfkernels.transforms import transforming
from rfkernels.triton_support import refuses_triton


def wanted(output: Tensor | None) -> bool:
    """Whether a tensor is the output of a layer that would take the sums of its gradient."""
    return getattr(output, "_bias_wants_sums", False) is True


def give(gradient: Tensor, sums: Tensor) -> None:
    """Hands over sums of a gradient over all but its channels, in any shape, with it."""
    if native.entry is not None:
        native.entry.give(gradient, sums)
    else:
        gradient._sums_for_bias = (gradient._version, sums)                                         # type: ignore[attr-defined]


def gradient_of(output_gradient: Tensor, rows: Tensor) -> Tensor:
    """Of a bias: what came with the gradient of the output, or the sum of its rows [tokens, channels]."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return rows.sum(0)
    if native.entry is not None:
        sums = native.entry.take(output_gradient)
    else:
        version, sums = getattr(output_gradient, "_sums_for_bias", (None, None))
        sums = sums if version == output_gradient._version else None
    return rows.sum(0) if sums is None else sums.view(-1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.shape = x.shape
        out = F.linear(x, weight, bias)
        return out.view(*out.shape[:-1], *shape) if shape else out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, weight.shape[0])
        dx, dweight, dbias, _ = ctx.needs_input_grad
        return (
            (rows @ weight).view(ctx.shape) if dx else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if dweight else None,
            gradient_of(dy, rows) if dbias else None,
            None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...] = (), *, before: str) -> Tensor:
    """``F.linear(x, weight, bias)``, the last dimension unflattened to `shape`. It stands before an op, whose kernels,
    where they run, give the gradient of bias with that of the output.

    Args: x: [..., C]. weight: [N, C]. bias: [N] or None. shape: of N in the output, () to leave it. The output may not
        be changed in place then.
    """
    if (made := native.direct("linear", x, weight, bias, shape, before)) is not None:
        return made
    if bias is None or not (torch.is_grad_enabled() and bias.requires_grad) or not _sums(before, x, weight):
        out = F.linear(x, weight, bias)
        return out.unflatten(-1, shape) if shape else out
    out = _Linear.apply(*to_autocast(x, weight, bias), shape)
    return marked(out)


def marked(output: Tensor) -> Tensor:
    """The output of a layer that takes the sums of its gradient."""
    output._bias_wants_sums = True                                                                  # type: ignore[attr-defined]
    return output


def _sums(op: str, x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels of an op will run, so that somebody gives sums."""
    if torch.compiler.is_compiling() or transforming():
        return False
    if dispatch.pretended(op):
        return True
    if hasattr(weight, "__tensor_flatten__"):                            # a DTensor's sums would be of its part
        return False
    forced = dispatch.forced_backend(op)
    if forced in (None, "native") and any(i.backend == "native" for i in dispatch.implementations(op)):
        return x.is_cuda or native.refuses(x) is None
    return x.is_cuda if forced is None else forced == "triton" and refuses_triton(x) is None
