"""Weights of the squared error in the space of the network's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmdit.flow.paths import Path


class Weighting(Protocol):
    def weight(self, path: Path, t: Tensor) -> Tensor:
        """[B] fp32 for t [B]."""
        ...


@dataclass(frozen=True)
class Constant:
    """Every time counts the same. For a velocity on the straight path this is conditional flow matching: w_t = t/(1-t)
    in the noise-prediction form of equation 12."""

    def weight(self, path: Path, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class VelocityOfData:
    """The velocity's squared error in that of the data, from which it is (z - x0) / t on the straight path: 1 / t^2, no
    more than at `least`."""

    least: float = 0.1

    def weight(self, path: Path, t: Tensor) -> Tensor:
        return t.clamp(min=self.least) ** -2
