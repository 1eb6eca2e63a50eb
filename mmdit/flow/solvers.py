"""Integration of dz/dt = v(z, t) from noise (t = 1) to data (t = 0), and the times at which it stops.

A solver takes the times as a tensor, from the first down to the last, and calls the velocity with one time as a number,
the same for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mmdit.flow.densities import shift_time

VelocityField = Callable[[Tensor, float], Tensor]
"""(z [B, ...], t) -> dz/dt [B, ...]"""
Progress = Callable[[Iterable[int]], Iterable[int]]
"""Wraps the step numbers: tqdm."""
Constraint = Callable[[Tensor, float], Tensor]
"""(z, t) -> z after each step: what inpainting holds fixed."""
Schedule = Literal["paper", "sd3_release"]
SCHEDULES = ("paper", "sd3_release")


def times(steps: int, shift: float = 1.0, schedule: Schedule = "paper") -> Tensor:
    """steps + 1 times from 1 down to 0.

    Args:
        schedule: "paper": equidistant before the shift of equation 23, fp64. "sd3_release": as the released models are
            sampled, to the bit of diffusers' FlowMatchEulerDiscreteScheduler, fp32: equidistant between the shifted
            ends of a grid of 1000, and shifted again, so the last time above zero is 0.0089 where the paper's is 0.1
            (28 steps, shift 3).
    Raises: ValueError for fewer than one step or an unknown schedule.
    """
    if steps < 1:
        raise ValueError(f"times: steps is {steps}; expected at least 1")
    if schedule == "paper":
        return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
    if schedule != "sd3_release":
        raise ValueError(f"times: schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)}")
    grid = torch.from_numpy(np.linspace(1, 1000, 1000, dtype=np.float32)[::-1].copy()) / 1000
    ends = shift * grid / (1 + (shift - 1) * grid)
    sigmas = np.linspace(float(ends[0]) * 1000, float(ends[-1]) * 1000, steps) / 1000
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return torch.cat([torch.from_numpy(sigmas).float(), torch.zeros(1)])


def starting_at(ts: Tensor, start: float) -> Tensor:
    """Of these times the part below `start`, and `start` before it: for what begins at an image instead of noise.

    Raises: ValueError unless 0 < start <= 1."""
    if not 0 < start <= 1:
        raise ValueError(f"start is {start}; expected a time in (0, 1]")
    return torch.cat([ts.new_tensor([start]), ts[ts < start]])


def _unconstrained(z: Tensor, t: float) -> Tensor:
    return z


def euler(
    velocity: VelocityField, z: Tensor, ts: Tensor, progress: Progress = iter, constrain: Constraint = _unconstrained
) -> Tensor:
    """Euler steps along ts (as from `times`), z [B, ...] in fp32."""
    z = z.float()
    for i in progress(range(len(ts) - 1)):
        z = constrain(z + float(ts[i + 1] - ts[i]) * velocity(z, float(ts[i])).float(), float(ts[i + 1]))
    return z


def heun(
    velocity: VelocityField, z: Tensor, ts: Tensor, progress: Progress = iter, constrain: Constraint = _unconstrained
) -> Tensor:
    """Heun's method, second order: two velocities a step, the last step Euler's. Arguments as for `euler`."""
    z = z.float()
    for i in progress(range(len(ts) - 1)):
        t, after = float(ts[i]), float(ts[i + 1])
        v = velocity(z, t).float()
        if after > 0:
            v = (v + velocity(z + (after - t) * v, after).float()) / 2
        z = constrain(z + (after - t) * v, after)
    return z


def dpmpp_2m(
    velocity: VelocityField, z: Tensor, ts: Tensor, progress: Progress = iter, constrain: Constraint = _unconstrained
) -> Tensor:
    """DPM-Solver++(2M) of the released models: one velocity a step, second order where steps are small in log t, as
    with sd3_release. The data x0 = z - t v is extrapolated from two steps, linearly in log t. Arguments as for `euler`.
    Source: Lu et al. 2022b, algorithm 2, with sigma = t."""
    z = z.float()
    before, step = None, 0.0
    for i in progress(range(len(ts) - 1)):
        t, after = float(ts[i]), float(ts[i + 1])
        data = z - t * velocity(z, t).float()
        now = data
        if after > 0:
            h = float(np.log(t / after))
            if before is not None:
                now = data + (data - before) * (h / (2 * step))
            before, step = data, h
        ratio = after / t
        z = constrain(ratio * z + (1 - ratio) * now, after)
    return z


class PathLength:
    """The way that samples go: sum over the steps of |z_after - z_before|, for Euler |v dt|, per sample. Give it to a
    solver as its constraint. Args: z: where it begins."""

    def __init__(self, z: Tensor) -> None:
        self._z = z.float()
        self.lengths = torch.zeros(len(z), device=z.device)

    def __call__(self, z: Tensor, t: float) -> Tensor:
        step = (z - self._z.to(z.device)).flatten(1).norm(dim=1)
        self.lengths = self.lengths.to(z.device) + step                  # noise begins on the CPU, a solver moves it
        self._z = z
        return z


SOLVERS: dict[str, Callable[..., Tensor]] = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


def guided(conditional_and_not: VelocityField, scale: float) -> VelocityField:
    """Classifier-free guidance on all channels: ``v_0 + scale (v_c - v_0)``.

    Args: conditional_and_not: a velocity field on a doubled batch, the conditional half first.
    """

    def field(z: Tensor, t: float) -> Tensor:
        conditional, unconditional = conditional_and_not(torch.cat([z, z]), t).float().chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return field


def guided_twice(three: VelocityField, scale: float, picture_scale: float) -> VelocityField:
    """Guidance by an instruction and a picture to edit (Brooks et al. 2023, equation 3):
    ``v_0 + picture_scale (v_p - v_0) + scale (v_c - v_p)``.

    Args: three: a velocity field on a tripled batch: with both, with the picture alone, with neither.
    """

    def field(z: Tensor, t: float) -> Tensor:
        both, picture, neither = three(torch.cat([z, z, z]), t).float().chunk(3)
        return neither + picture_scale * (picture - neither) + scale * (both - picture)

    return field
