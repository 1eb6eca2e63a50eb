"""What the network predicts, and how the flow's velocity follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mmdit.flow.paths import Path


def like(t: Tensor, z: Tensor) -> Tensor:
    """A per-sample coefficient [B] so that it broadcasts over z [B, ...]."""
    return t.reshape(-1, *[1] * (z.ndim - 1))


class Parametrisation(Protocol):
    def target(self, path: Path, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should have said. x0, noise: [B, ...]; t: [B]."""
        ...

    def velocity(self, path: Path, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """dz/dt from the network's output."""
        ...


@dataclass(frozen=True)
class Velocity:
    """The network predicts dz/dt = a'(t) x0 + b'(t) noise; for rectified flow, noise - x0."""

    def target(self, path: Path, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return like(path.da(t), x0) * x0 + like(path.db(t), x0) * noise

    def velocity(self, path: Path, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return output
