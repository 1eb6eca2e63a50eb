"""Integration of dz/dt = v(z, t) from noise (t = 1) to data (t = 0)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mmdit.flow.densities import shift_time

VelocityField = Callable[[Tensor, Tensor], Tensor]
"""(z [B, ...], t [B]) -> dz/dt [B, ...]"""


def times(steps: int, shift: float = 1.0) -> Tensor:
    """steps + 1 times from 1 down to 0, equidistant before the shift of equation 23; fp64."""
    if steps < 1:
        raise ValueError(f"times: steps is {steps}; expected at least 1")
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def euler(
    velocity: VelocityField,
    z: Tensor,
    ts: Tensor,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Tensor:
    """Euler steps along ts (as from `times`), z [B, ...] in fp32. `progress` wraps the step numbers (tqdm)."""
    z = z.float()
    for i in progress(range(len(ts) - 1)):
        t = torch.full((z.shape[0],), float(ts[i]), device=z.device)
        z = z + float(ts[i + 1] - ts[i]) * velocity(z, t).float()
    return z


def guided(conditional_and_not: Callable[[Tensor, Tensor], Tensor], scale: float) -> VelocityField:
    """Classifier-free guidance on all channels: ``v_0 + scale (v_c - v_0)``.

    Args: conditional_and_not: a velocity field on a doubled batch, the conditional half first.
    """

    def field(z: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = conditional_and_not(torch.cat([z, z]), torch.cat([t, t])).float().chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return field
