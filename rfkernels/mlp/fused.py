"""gelu_mlp that keeps its pre-activation only: the products are PyTorch's, what stands between them is one kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rfkernels import native
from rfkernels.autocast import to_autocast
from rfkernels.bias import gradient_of as bias_gradient
from rfkernels.bias import marked
from rfkernels.mlp import launch, reference
from rfkernels.registration import differentiable_backward, operator
from rfkernels.transforms import pullback, transforming


def _gelu_operator(name: str, code: Callable[..., Any] | None) -> Callable[..., Any]:
    return operator(
        name,
        "(Tensor h, Tensor da, bool value, bool bias) -> (Tensor, Tensor, Tensor)",
        code,
        lambda h, da, value, bias: (
            h.new_empty(h.shape if value else 0),
            h.new_empty(h.shape),
            h.new_empty(h.shape[1] if bias else 0),
        ),
    )


_native = _gelu_operator("gelu_backward_native", None)
_triton = _gelu_operator("gelu_backward", launch.gelu_backward)


def gelu_backward(on_cpu: bool) -> Callable[..., Any]:
    """(h, da, value, bias) -> (gelu(h), dh, the sum of dh over rows), of rows [N, hidden]; empty if not asked for."""
    return _native if on_cpu else _triton


def _differentiable(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, dy: Tensor) -> Any:
    """Gradients that have a graph: the pre-activation that was kept has none of its own."""
    return pullback(reference.gelu_mlp, (x, w1, b1, w2, b2), (dy,))


differentiable_backward("gelu_mlp", _differentiable)


class _GeluMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, on_cpu: bool, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None
    ) -> Tensor:
        ctx.native = on_cpu
        h = F.linear(x, w1, b1)
        ctx.save_for_backward(x, w1, h, w2, b1)
        return F.linear(F.gelu(h, approximate="tanh"), w2, b2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, h, w2, b1 = ctx.saved_tensors
        if torch.is_grad_enabled():                                       # create_graph=True
            b2 = None if not ctx.needs_input_grad[5] else dy.new_zeros(dy.shape[-1])
            return None, *_differentiable(x, w1, b1, w2, b2, dy)
        _, dx, dw1, db1, dw2, db2 = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        gradients: list[Tensor | None] = [None] * 5
        if dx or dw1 or db1 or dw2:
            a, dh, bias = gelu_backward(ctx.native)(h.view(-1, h.shape[-1]), rows @ w2, dw2, db1)
            gradients[0] = (dh @ w1).view(x.shape) if dx else None
            gradients[1] = dh.t() @ x.reshape(-1, x.shape[-1]) if dw1 else None
            gradients[2] = bias if db1 else None
            gradients[3] = rows.t() @ a if dw2 else None
        gradients[4] = bias_gradient(dy, rows) if db2 else None
        return None, *gradients


def native_gelu_mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    made: Tensor | None = native.direct("gelu_mlp", x, w1, b1, w2, b2)
    return gelu_mlp(x, w1, b1, w2, b2, on_cpu=True) if made is None else made


def gelu_mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, on_cpu: bool = False
) -> Tensor:
    given = (x, w1, b1, w2, b2)
    if transforming():                                                    # products and GELU are PyTorch's in any case
        return reference.gelu_mlp(*given)
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in given):
        return without_gradient(*given)
    out: Tensor = _GeluMlp.apply(on_cpu, *to_autocast(*given))
    wants = b2 is not None and b2.requires_grad and not torch.compiler.is_compiling()
    return marked(out) if wants and not on_cpu else out


def without_gradient(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """On CUDA bias and GELU are an epilogue of the first product (cuBLASLt), which then never writes its result."""
    if x.is_cuda and b1 is not None and x.numel() and x.dtype == w1.dtype == b1.dtype != torch.float32:
        a = torch._addmm_activation(b1, x.reshape(-1, x.shape[-1]), w1.t(), use_gelu=True)
        return F.linear(a.view(*x.shape[:-1], -1), w2, b2)
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)
