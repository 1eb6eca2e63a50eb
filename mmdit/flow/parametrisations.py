"""What the network predicts: a combination ``p x0 + q noise`` of data and noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmdit.flow.paths import SIGMA_DATA, Path


def like(t: Tensor, z: Tensor) -> Tensor:
    """A per-sample coefficient [B], so that it broadcasts over z [B, ...], in z's dtype."""
    return t.to(z.dtype).reshape(-1, *[1] * (z.ndim - 1))


class Parametrisation(Protocol):
    @property
    def highest_straight_time(self) -> float:
        """Where sampling may begin: beyond, the output says nothing of the data."""
        ...

    def coefficients(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        """(p, q) at times t [B]."""
        ...


@dataclass(frozen=True)
class Velocity:
    """dz/dt = a'(t) x0 + b'(t) noise; for rectified flow, noise - x0."""

    highest_straight_time = 1.0

    def coefficients(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        return path.da(t), path.db(t)


@dataclass(frozen=True)
class Data:
    """The data x0."""

    highest_straight_time = 1.0

    def coefficients(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(path.a(t))
        return one, torch.zeros_like(one)


@dataclass(frozen=True)
class Noise:
    """The noise (Ho et al. 2020). x0 = (z - b noise) / a multiplies what the network gets wrong by b / a, so sampling
    begins at b / a = 80, where EDM's does."""

    highest_straight_time = 80 / 81

    def coefficients(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(path.a(t))
        return torch.zeros_like(one), one


@dataclass(frozen=True)
class Angular:
    """v = a noise - b x0 of a variance-preserving path (Salimans & Ho 2022)."""

    highest_straight_time = 1.0

    def coefficients(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        return -path.b(t), path.a(t)


@dataclass(frozen=True)
class F:
    """EDM's: (x0 - c_skip z) / c_out, of unit variance for data of deviation sigma_data (Karras et al. 2022)."""

    highest_straight_time = 1.0

    def coefficients(self, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
        r = path.straight_time(t)
        length = torch.hypot(r, SIGMA_DATA * (1 - r))
        return r / (SIGMA_DATA * length), -SIGMA_DATA * (1 - r) / length


def straight_velocity(p: Tensor, q: Tensor, output: Tensor, point: Tensor, r: Tensor) -> Tensor:
    """noise - x0 from an output p x0 + q noise at the point (1 - r) x0 + r noise of the straight path."""
    return (output - like(p + q, output) * point) / like(q * (1 - r) - p * r, output)


