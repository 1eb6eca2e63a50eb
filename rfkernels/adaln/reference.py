"""adaLN modulation in plain PyTorch: the definition of the three ops, differentiable, any device and dtype."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of an expression of the tensors in eager PyTorch."""
    return reduce(torch.promote_types, [t.dtype for t in tensors if t is not None])


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """fp32 for every input dtype but fp64, which stays (for gradcheck and as a reference)."""
    return torch.promote_types(dtype, torch.float32)


def per_token(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """A modulation vector [B, C], [B, S, C] or [C] so that it broadcasts over x [B, S, C]."""
    vector = vector.to(dtype)
    return vector.unsqueeze(1) if vector.ndim == 2 else vector


def factor(scale: Tensor, plus_one: bool, dtype: torch.dtype) -> Tensor:
    """What the normalised x is multiplied by."""
    return 1 + per_token(scale, dtype) if plus_one else per_token(scale, dtype)


def normalize(x: Tensor, norm: str, eps: float) -> Tensor:
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def adaln(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, plus_one: bool, norm: str, eps: float, dtype: torch.dtype
) -> Tensor:
    wide = accumulation(x.dtype)
    y = normalize(x.to(wide), norm, eps)
    if scale is not None:
        y = y * factor(scale, plus_one, wide)
    if shift is not None:
        y = y + per_token(shift, wide)
    return y.to(dtype)


def gated_residual(residual: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    dtype = promoted(residual, branch, gate)
    wide = accumulation(dtype)
    gated = branch.to(wide) if gate is None else per_token(gate, wide) * branch.to(wide)
    return (residual.to(wide) + gated).to(dtype)


def gated_adaln(
    residual: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, plus_one: bool,
    norm: str, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    h = gated_residual(residual, branch, gate)
    return h, adaln(h, shift, scale, plus_one, norm, eps, dtype)
