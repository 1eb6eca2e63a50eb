"""adaLN on PyTorch's own layer-norm kernels, with an explicit backward.

Eager autograd through the reference keeps about six activations of x's size; this keeps x and two statistics per
token. fp32 arithmetic whatever the input dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rfkernels.adaln.reference import accumulation, per_token

SAMPLE_PAYS = 1 << 16
"""Elements of a sample from which a kernel for each is faster on a CPU: 0.16 against 0.23 ms at [2, 256, 384], 6
against 21 at [4, 1024, 1152]; smaller ones lose (0.34 against 0.16 at [16, 64, 128]; one core of an EPYC, fp32)."""


def adaln(x: Tensor, shift: Tensor, scale: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    dtype = accumulation(x)
    wide = x.to(dtype)
    if norm == "layer":
        x_hat, mean, rstd = torch.native_layer_norm(wide, [x.shape[-1]], None, None, eps)
        mean, rstd = mean.squeeze(-1), rstd.squeeze(-1)
    else:
        rstd = torch.rsqrt(wide.square().mean(-1) + eps)
        mean = torch.zeros_like(rstd)
        x_hat = wide * rstd.unsqueeze(-1)
    y = torch.addcmul(per_token(shift, dtype), x_hat, 1 + per_token(scale, dtype))
    return y.to(x.dtype).contiguous(), torch.stack((mean, rstd))


def adaln_backward(
    dy: Tensor, x: Tensor, shift: Tensor, scale: Tensor, statistics: Tensor, norm: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation(x)
    dy, wide = dy.to(dtype), x.to(dtype)
    mean, rstd = statistics.unsqueeze(-1)
    per_sample = shift.ndim == 2 and scale.ndim == 2 and len(x) > 0
    if norm == "layer" and x.device.type == "cpu" and per_sample and x[0].numel() >= SAMPLE_PAYS:
        dx, dshift, dscale = _backward_by_sample(dy, wide, shift, scale, mean, rstd)
        return dx.to(x.dtype), dshift.to(shift.dtype), dscale.to(scale.dtype)
    x_hat = torch.addcmul(-mean * rstd, wide, rstd)
    g = dy * (1 + per_token(scale, dtype))                                # gradient of x_hat
    if norm == "layer":
        dx = torch.ops.aten.native_layer_norm_backward(
            g, wide, [x.shape[-1]], mean, rstd, None, None, [True, False, False]
        )[0]
    else:
        dx = (g - x_hat * (g * x_hat).mean(-1, keepdim=True)) * rstd
    return dx.to(x.dtype).contiguous(), reduced(dy, shift), reduced(dy * x_hat, scale)


def _backward_by_sample(
    dy: Tensor, x: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """In one sample a modulated norm is an affine norm, whose backward PyTorch has as one kernel."""
    parts = [
        torch.ops.aten.native_layer_norm_backward(
            dy[b], x[b], [x.shape[-1]], mean[b], rstd[b], 1 + scale[b].to(x.dtype), shift[b].to(x.dtype), [True] * 3
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
