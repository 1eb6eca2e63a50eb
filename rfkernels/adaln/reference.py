"""adaLN modulation in plain PyTorch: the definition of the three ops, differentiable, any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation(x: Tensor) -> torch.dtype:
    """fp32 for every input dtype but fp64, which stays (for gradcheck and as a reference)."""
    return torch.promote_types(x.dtype, torch.float32)


def per_token(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """A modulation vector [B, C], [B, S, C] or [C] so that it broadcasts over x [B, S, C]."""
    vector = vector.to(dtype)
    return vector.unsqueeze(1) if vector.ndim == 2 else vector


def normalize(x: Tensor, norm: str, eps: float) -> Tensor:
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def adaln(x: Tensor, shift: Tensor, scale: Tensor, norm: str, eps: float) -> Tensor:
    dtype = accumulation(x)
    x_hat = normalize(x.to(dtype), norm, eps)
    return (x_hat * (1 + per_token(scale, dtype)) + per_token(shift, dtype)).to(x.dtype)


def gated_residual(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    dtype = accumulation(residual)
    return (residual.to(dtype) + per_token(gate, dtype) * branch.to(dtype)).to(residual.dtype)


def gated_adaln(
    residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    h = gated_residual(residual, branch, gate)
    return h, adaln(h, shift, scale, norm, eps)
