"""Launches of the kernels of rectified flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rfkernels.triton_support import kernels_of, on

BLOCK = 2048                 # elements of a program: 16 a thread with four warps
SETTINGS: dict[str, Any] = {"BLOCK": BLOCK, "num_warps": 4, "enable_fp_fusion": True}


_kernels = kernels_of(f"{__package__}.kernels")


def _samples(x: Tensor) -> Tensor:
    """x if the elements of each of its samples follow one another, a copy if not."""
    return x if x.shape[0] == 0 or x[0].is_contiguous() else x.contiguous()


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """(elements of a sample, programs a sample, programs)"""
    elements = x[0].numel()
    blocks = -(-elements // BLOCK)
    return elements, blocks, x.shape[0] * blocks


def rectified_flow(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    x0, noise, t, z, target = _samples(x0), _samples(noise), t.contiguous(), _empty(x0), _empty(x0)
    elements, _, programs = _sizes(x0)
    with on(x0.device):
        _kernels().rectified_flow_fwd[(programs,)](
            x0, noise, t, z, target, elements, x0.stride(0), noise.stride(0), **SETTINGS
        )
    return z, target


def rectified_flow_backward(
    dz: Tensor, dtarget: Tensor, t: Tensor, x0: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x0, noise and t, the last [0] without x0 and noise."""
    dz, dtarget, t, dx0, dnoise = _samples(dz), _samples(dtarget), t.contiguous(), _empty(dz), _empty(dz)
    elements, blocks, programs = _sizes(dz)
    time = x0 is not None and noise is not None
    a, b = (x if x is None else _samples(x) for x in (x0, noise))
    partials = torch.empty(programs if time else 0, dtype=torch.float32, device=dz.device)
    dt = t.new_empty(t.shape if time else 0)
    with on(dz.device):
        _kernels().rectified_flow_bwd[(programs,)](
            dz, dtarget, t, a, b, dx0, dnoise, partials, elements,
            *(0 if x is None else x.stride(0) for x in (dz, dtarget, a, b)), TIME=time, **SETTINGS,
        )  # fmt: skip
        if time:
            _kernels().sum_per_sample[dt.shape](partials, dt, blocks, COLUMNS=256, num_warps=4, enable_fp_fusion=True)
    return dx0, dnoise, dt


def weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the sum of (prediction - target)^2 of each sample, [B] fp32."""
    prediction, target, weight = _samples(prediction), _samples(target), weight.contiguous()
    elements, blocks, programs = _sizes(prediction)
    batch, device = prediction.shape[0], prediction.device
    partials, errors = (torch.empty(n, dtype=torch.float32, device=device) for n in (programs, batch))
    loss = torch.empty((), dtype=torch.float32, device=device)
    with on(device):
        _kernels().weighted_mse_fwd[(programs,)](
            prediction, target, partials, elements, prediction.stride(0), target.stride(0), **SETTINGS
        )
        _kernels().weighted_mse_total[(1,)](
            partials, weight, errors, loss, batch, blocks, 1.0 / prediction.numel(), ROWS=32, COLUMNS=64, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return loss, errors


def weighted_mse_backward(
    dloss: Tensor, prediction: Tensor, target: Tensor, weight: Tensor, wants_target: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of prediction and target, the second [0] if it is not wanted."""
    prediction, target, weight = _samples(prediction), _samples(target), weight.contiguous()
    dprediction = _empty(prediction)
    dtarget = _empty(target) if wants_target else target.new_empty(0)
    elements, _, programs = _sizes(prediction)
    with on(prediction.device):
        _kernels().weighted_mse_bwd[(programs,)](
            prediction, target, weight, dloss, dprediction, dtarget, elements, prediction.stride(0), target.stride(0),
            1.0 / prediction.numel(), TARGET=wants_target, **SETTINGS,
        )  # fmt: skip
    return dprediction, dtarget
