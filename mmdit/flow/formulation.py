"""A formulation is a choice of path, parametrisation, time density and weighting. Trainer and sampler know no more."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

import rfkernels
from mmdit.flow.densities import CosMap, Density, LogitNormal, Mode, Shifted, Uniform
from mmdit.flow.parametrisations import Parametrisation, Velocity, like
from mmdit.flow.paths import Path, RectifiedFlow
from mmdit.flow.weightings import Constant, Weighting


@dataclass(frozen=True)
class Formulation:
    path: Path
    parametrisation: Parametrisation
    density: Density
    weighting: Weighting

    def training_pair(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(z_t, target) for data and noise [B, ...] and times [B]."""
        if isinstance(self.path, RectifiedFlow) and isinstance(self.parametrisation, Velocity):
            return rfkernels.rectified_flow(x0, noise, t)             # the same in one pass
        z = like(self.path.a(t), x0) * x0 + like(self.path.b(t), x0) * noise
        return z, self.parametrisation.target(self.path, x0, noise, t)

    def loss(self, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Weighted mean squared error, scalar fp32."""
        return rfkernels.weighted_mse(output, target, self.weighting.weight(self.path, t))

    def velocity(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """dz/dt from the network's output at times t [B]."""
        return self.parametrisation.velocity(self.path, output, z, t)


_DENSITIES: dict[str, tuple[int, Callable[..., Density]]] = {      # name -> (number of arguments, constructor)
    "": (0, Uniform),
    "lognorm": (2, LogitNormal),
    "mode": (1, Mode),
    "cosmap": (0, CosMap),
}
_NAME = re.compile(r"rf(?:/(?P<density>[a-z]+)(?:\((?P<arguments>[^()]*)\))?)?")


def by_name(name: str, shift: float = 1.0) -> Formulation:
    """A formulation by the paper's name: rf, rf/lognorm(m,s), rf/mode(s), rf/cosmap.

    Args: shift: alpha of the timestep shift applied to the training times (3.0 at 1024 x 1024); 1: none.
    Raises: ValueError for an unknown name, wrong number of arguments or values outside their range.
    """
    match = _NAME.fullmatch(name.replace(" ", ""))
    kind = (match["density"] or "") if match else None
    if match is None or kind not in _DENSITIES:
        raise ValueError(
            f"formulation {name!r} is unknown; expected rf, rf/lognorm(m,s), rf/mode(s) or rf/cosmap, "
            "such as rf/lognorm(0.00,1.00)"
        )
    count, density = _DENSITIES[kind]
    try:
        values = [float(v) for v in match["arguments"].split(",")] if match["arguments"] else []
    except ValueError as error:
        raise ValueError(f"formulation {name!r}: arguments must be numbers, came ({match['arguments']})") from error
    if len(values) != count:
        raise ValueError(f"formulation {name!r} has {len(values)} arguments; {kind or 'rf'} takes {count}")
    chosen = density(*values)
    return Formulation(RectifiedFlow(), Velocity(), chosen if shift == 1.0 else Shifted(chosen, shift), Constant())
