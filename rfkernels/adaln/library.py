"""adaLN on PyTorch's own layer-norm kernels, with an explicit backward.

Eager autograd through the reference keeps about six activations of x's size; this keeps x and two statistics per
token. fp32 arithmetic whatever the input dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rfkernels.adaln.reference import accumulation, factor, per_token

SAMPLE_PAYS = 1 << 16
"""Elements of a sample from which a kernel for each is faster on a CPU: 0.16 against 0.23 ms at [2, 256, 384], 6
against 21 at [4, 1024, 1152]; smaller ones lose (0.34 against 0.16 at [16, 64, 128]; one core of an EPYC, fp32)."""


def adaln(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, plus_one: bool, norm: str, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    wide = accumulation(x.dtype)
    x = x.to(wide)
    if norm == "layer":
        y, mean, rstd = torch.native_layer_norm(x, [x.shape[-1]], None, None, eps)
        mean, rstd = mean.squeeze(-1), rstd.squeeze(-1)
    else:
        rstd = torch.rsqrt(x.square().mean(-1) + eps)
        mean = torch.zeros_like(rstd)
        y = x * rstd.unsqueeze(-1)
    if scale is not None and shift is not None:
        y = torch.addcmul(per_token(shift, wide), y, factor(scale, plus_one, wide))
    elif scale is not None:
        y = y * factor(scale, plus_one, wide)
    elif shift is not None:
        y = y + per_token(shift, wide)
    return y.to(dtype).contiguous(), torch.stack((mean, rstd))


def adaln_backward(
    dy: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor | None, statistics: Tensor, plus_one: bool, norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = accumulation(x.dtype)
    dy, wide = dy.to(dtype), x.to(dtype)
    mean, rstd = statistics.unsqueeze(-1)
    by_sample = norm == "layer" and x.device.type == "cpu" and len(x) > 0 and x[0].numel() >= SAMPLE_PAYS
    if by_sample and shift is not None and scale is not None and shift.ndim == scale.ndim == 2:
        weight = 1 + scale.to(dtype) if plus_one else scale.to(dtype)
        dx, dshift, dscale = _backward_by_sample(dy, wide, shift.to(dtype), weight, mean, rstd)
        return dx.to(x.dtype), dshift.to(shift.dtype), dscale.to(scale.dtype)
    x_hat = torch.addcmul(-mean * rstd, wide, rstd)
    g = dy if scale is None else dy * factor(scale, plus_one, dtype)      # gradient of x_hat
    if norm == "layer":
        dx = torch.ops.aten.native_layer_norm_backward(
            g, wide, [x.shape[-1]], mean, rstd, None, None, [True, False, False]
        )[0]
    else:
        dx = (g - x_hat * (g * x_hat).mean(-1, keepdim=True)) * rstd
    return (
        dx.to(x.dtype).contiguous(),
        x.new_empty(0) if shift is None else reduced(dy, shift),
        x.new_empty(0) if scale is None else reduced(dy * x_hat, scale),
    )


def _backward_by_sample(
    dy: Tensor, x: Tensor, shift: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """In one sample a modulated norm is an affine norm, whose backward PyTorch has as one kernel."""
    parts = [
        torch.ops.aten.native_layer_norm_backward(
            dy[b], x[b], [x.shape[-1]], mean[b], rstd[b], weight[b], shift[b], [True] * 3
        )
        for b in range(len(x))
    ]
    dx, dscale, dshift = (torch.stack(part) for part in zip(*parts, strict=True))
    return dx, dshift, dscale


def reduced(grad: Tensor, vector: Tensor) -> Tensor:
    """A per-token gradient [B, S, C] summed to the shape of its modulation vector."""
    if vector.ndim == 2:
        grad = grad.sum(1)
    elif vector.ndim == 1:
        grad = grad.sum((0, 1))
    return grad.to(vector.dtype, copy=True).contiguous()           # an operator's output may not alias its input
