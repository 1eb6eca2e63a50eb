"""Densities of the training time t (section 3.1): each maps u ~ U(0, 1) to t and states its density.

Sampling takes u from outside, so that a run's times are a function of its seed alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmdit import numbers


class Density(Protocol):
    def sample(self, u: Tensor) -> Tensor:
        """t in [0, 1] for u in (0, 1); monotone. Any shape; fp64 keeps the ends exact."""
        ...

    def pdf(self, t: Tensor) -> Tensor:
        """pi(t)."""
        ...


@dataclass(frozen=True)
class Uniform:
    def sample(self, u: Tensor) -> Tensor:
        return u

    def pdf(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class LogitNormal:
    """logit(t) ~ N(mean, std^2), equation 19. A negative mean favours data, a positive one noise."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        numbers.between("LogitNormal: mean", self.mean)
        numbers.above("LogitNormal: std", self.std, 0)

    def sample(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def pdf(self, t: Tensor) -> Tensor:
        exponent = -((torch.logit(t) - self.mean) ** 2) / (2 * self.std**2)
        return torch.exp(exponent) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))


@dataclass(frozen=True)
class Mode:
    """t = 1 - u - s (cos^2(pi u / 2) - 1 + u), equation 20; s > 0 favours the middle, s < 0 the ends."""

    scale: float = 0.0

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"Mode: scale is {self.scale}; the map is monotone only in [-1, {2 / (math.pi - 2):.4f}]")

    def sample(self, u: Tensor) -> Tensor:
        return 1 - u - self.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)

    def pdf(self, t: Tensor) -> Tensor:
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(60):                                     # u = f^-1(t) by bisection; f decreases
            middle = (low + high) / 2
            above = self.sample(middle) > t
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        u = (low + high) / 2
        slope = -1 - self.scale * (1 - math.pi / 2 * torch.sin(math.pi * u))
        return 1 / slope.abs()


@dataclass(frozen=True)
class CosMap:
    """The time at which rectified flow has the log-SNR of the cosine schedule at u, equations 21 and 22."""

    def sample(self, u: Tensor) -> Tensor:
        return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)

    def pdf(self, t: Tensor) -> Tensor:
        return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)


def shift_time(t: Tensor, alpha: float) -> Tensor:
    """t at alpha^2 times as many pixels with the same uncertainty: alpha t / (1 + (alpha - 1) t), equation 23."""
    return alpha * t / (1 + (alpha - 1) * t)


@dataclass(frozen=True)
class Shifted:
    """Another density's times, shifted for a higher resolution."""

    density: Density
    alpha: float

    def __post_init__(self) -> None:
        numbers.above("Shifted: alpha", self.alpha, 0)

    def sample(self, u: Tensor) -> Tensor:
        return shift_time(self.density.sample(u), self.alpha)

    def pdf(self, t: Tensor) -> Tensor:
        back = self.alpha - (self.alpha - 1) * t
        return self.density.pdf(t / back) * self.alpha / back**2
