"""Forward processes ``z_t = a(t) x0 + b(t) noise``; t = 0 is data, t = 1 is noise.

A path is a schedule of the log-SNR lambda_t = log(a^2 / b^2) and a frame, which says how long z is. All paths are one
another seen through a change of time and length: with r = b / (a + b) the point (1 - r) x0 + r noise lies on the
straight path, and it is there that samplers walk. Coefficients are computed in fp64; what training and sampling use of
them is finite at both ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmdit import numbers

SIGMA_DATA = 0.5
"""Standard deviation of the data that EDM reckons with."""


class Path(Protocol):
    """Coefficients of a forward process; all take and return t's shape."""

    def a(self, t: Tensor) -> Tensor: ...
    def b(self, t: Tensor) -> Tensor: ...
    def da(self, t: Tensor) -> Tensor: ...
    def db(self, t: Tensor) -> Tensor: ...
    def log_snr(self, t: Tensor) -> Tensor:
        """lambda_t; it falls from +inf to -inf, or to where the path ends."""
        ...

    def slope(self, t: Tensor) -> Tensor:
        """lambda'_t."""
        ...

    def straight_time(self, t: Tensor) -> Tensor:
        """r = b / (a + b): the time at which the straight path has this log-SNR."""
        ...

    def time(self, straight: Tensor) -> Tensor:
        """The inverse of straight_time."""
        ...

    def scale(self, t: Tensor) -> Tensor:
        """What the network reads over (1 - r) x0 + r noise."""
        ...


def straight_log_snr(t: Tensor) -> Tensor:
    """2 log((1 - t) / t)."""
    return 2 * (torch.log1p(-t) - torch.log(t))


@dataclass(frozen=True)
class RectifiedFlow:
    """The straight path, a = 1 - t and b = t (equation 13)."""

    def a(self, t: Tensor) -> Tensor:
        return 1 - t

    def b(self, t: Tensor) -> Tensor:
        return t

    def da(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def db(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def log_snr(self, t: Tensor) -> Tensor:
        return straight_log_snr(t)

    def slope(self, t: Tensor) -> Tensor:
        return -2 / (t * (1 - t))

    def straight_time(self, t: Tensor) -> Tensor:
        return t

    def time(self, straight: Tensor) -> Tensor:
        return straight

    def scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


# --- schedules: the log-SNR in the course of time ---------------------------------------------------------------------


class Schedule(Protocol):
    """fp64 in, fp64 out."""

    def log_snr(self, t: Tensor) -> Tensor: ...
    def slope(self, t: Tensor) -> Tensor: ...
    def time(self, log_snr: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Straight:
    """That of rectified flow: lambda is logistic for uniform t."""

    def log_snr(self, t: Tensor) -> Tensor:
        return straight_log_snr(t)

    def slope(self, t: Tensor) -> Tensor:
        return -2 / (t * (1 - t))

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2)


@dataclass(frozen=True)
class Cosine:
    """a / b = cot(pi t / 2) (equation 17; Nichol & Dhariwal 2021)."""

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log(torch.sin(math.pi / 2 * (1 - t))) - torch.log(torch.sin(math.pi / 2 * t)))

    def slope(self, t: Tensor) -> Tensor:
        return -2 * math.pi / torch.sin(math.pi * t)

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-log_snr / 2)) * (2 / math.pi)


@dataclass(frozen=True)
class Normal:
    """log b is normal for uniform t, where a = 1: lambda ~ N(-2 mean, (2 std)^2) (equations 14 and 15)."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        numbers.between("Normal: mean", self.mean)
        numbers.above("Normal: std", self.std, 0)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * (self.mean + self.std * torch.special.ndtri(t))

    def slope(self, t: Tensor) -> Tensor:
        density = torch.exp(-(torch.special.ndtri(t) ** 2) / 2) / math.sqrt(2 * math.pi)
        return -2 * self.std / density

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.special.ndtr((-log_snr / 2 - self.mean) / self.std)


@dataclass(frozen=True)
class LdmLinear:
    """Latent diffusion's: sqrt(beta) linear in a thousand steps, log a^2 their sum of log(1 - beta), here the integral
    (log(1 - beta) to second order, 1e-6 off). It ends at a = 0.068 and not at pure noise (Rombach et al. 2022)."""

    first: float = 0.00085
    last: float = 0.012
    steps: int = 1000

    def _log_a2(self, t: Tensor) -> Tensor:
        p, q = math.sqrt(self.first), math.sqrt(self.last) - math.sqrt(self.first)
        root = p + q * t
        return -self.steps * ((root**3 - p**3) / (3 * q) + (root**5 - p**5) / (10 * q))

    def log_snr(self, t: Tensor) -> Tensor:
        log_a2 = self._log_a2(t)
        return log_a2 - torch.log(-torch.expm1(log_a2))

    def slope(self, t: Tensor) -> Tensor:
        beta = (math.sqrt(self.first) + (math.sqrt(self.last) - math.sqrt(self.first)) * t) ** 2
        return self.steps * (beta + beta**2 / 2) / torch.expm1(self._log_a2(t))

    def time(self, log_snr: Tensor) -> Tensor:
        wanted = torch.nn.functional.logsigmoid(log_snr)
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(60):                                                          # log a^2 falls with t: bisection
            middle = (low + high) / 2
            above = self._log_a2(middle) > wanted
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (low + high) / 2


# --- frames: how long z is --------------------------------------------------------------------------------------------


class Frame(Protocol):
    def a(self, log_snr: Tensor) -> Tensor: ...
    def b(self, log_snr: Tensor) -> Tensor: ...
    def da(self, log_snr: Tensor) -> Tensor:
        """By lambda."""
        ...

    def db(self, log_snr: Tensor) -> Tensor: ...
    def scale(self, log_snr: Tensor) -> Tensor:
        """What the network reads over the point on the straight path."""
        ...


@dataclass(frozen=True)
class Preserving:
    """a^2 + b^2 = 1; the network reads z."""

    def a(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(log_snr).sqrt()

    def b(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr).sqrt()

    def da(self, log_snr: Tensor) -> Tensor:
        return self.a(log_snr) * torch.sigmoid(-log_snr) / 2

    def db(self, log_snr: Tensor) -> Tensor:
        return -self.b(log_snr) * torch.sigmoid(log_snr) / 2

    def scale(self, log_snr: Tensor) -> Tensor:
        return self.a(log_snr) + self.b(log_snr)


@dataclass(frozen=True)
class Exploding:
    """a = 1; the network reads z / sqrt(b^2 + sigma_data^2)."""

    def a(self, log_snr: Tensor) -> Tensor:
        return torch.ones_like(log_snr)

    def b(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-log_snr / 2)

    def da(self, log_snr: Tensor) -> Tensor:
        return torch.zeros_like(log_snr)

    def db(self, log_snr: Tensor) -> Tensor:
        return -self.b(log_snr) / 2

    def scale(self, log_snr: Tensor) -> Tensor:
        return 1 / torch.hypot(torch.sigmoid(-log_snr / 2), SIGMA_DATA * torch.sigmoid(log_snr / 2))


@dataclass(frozen=True)
class Diffusion:
    """A schedule in a frame."""

    schedule: Schedule
    frame: Frame

    def log_snr(self, t: Tensor) -> Tensor:
        return self.schedule.log_snr(t.double())

    def slope(self, t: Tensor) -> Tensor:
        return self.schedule.slope(t.double())

    def a(self, t: Tensor) -> Tensor:
        return self.frame.a(self.log_snr(t))

    def b(self, t: Tensor) -> Tensor:
        return self.frame.b(self.log_snr(t))

    def da(self, t: Tensor) -> Tensor:
        return self.frame.da(self.log_snr(t)) * self.slope(t)

    def db(self, t: Tensor) -> Tensor:
        return self.frame.db(self.log_snr(t)) * self.slope(t)

    def straight_time(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-self.log_snr(t) / 2)

    def time(self, straight: Tensor) -> Tensor:
        return self.schedule.time(straight_log_snr(straight.double()))

    def scale(self, t: Tensor) -> Tensor:
        return self.frame.scale(self.log_snr(t))
