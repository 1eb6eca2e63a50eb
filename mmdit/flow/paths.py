"""Forward processes ``z_t = a(t) x0 + b(t) noise``; t = 0 is data, t = 1 is noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Path(Protocol):
    """Coefficients of a forward process and their time derivatives; all take and return t's shape."""

    def a(self, t: Tensor) -> Tensor: ...
    def b(self, t: Tensor) -> Tensor: ...
    def da(self, t: Tensor) -> Tensor: ...
    def db(self, t: Tensor) -> Tensor: ...
    def log_snr(self, t: Tensor) -> Tensor:
        """lambda_t = log(a^2 / b^2)."""
        ...


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
        return 2 * (torch.log1p(-t) - torch.log(t))
