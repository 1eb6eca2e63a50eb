"""Noising, target and loss of rectified flow in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rectified_flow(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x0.dtype, torch.float32)
    a, b = x0.to(wide), noise.to(wide)
    t = t.to(wide).reshape(-1, *[1] * (x0.ndim - 1))
    return ((1 - t) * a + t * b).to(x0.dtype), (b - a).to(x0.dtype)


def weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    wide = torch.promote_types(prediction.dtype, torch.float32)
    error = (prediction.to(wide) - target.to(wide)).square()
    return (error.reshape(error.shape[0], -1).sum(1) * weight.to(wide)).sum() / prediction.numel()
