"""A formulation is a choice of path, parametrisation, time density and weighting. Trainer and sampler know no more."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

import rfkernels
from mmdit.flow import solvers
from mmdit.flow.densities import CosMap, Density, LogitNormal, Mode, Shifted, Uniform, shift_time
from mmdit.flow.parametrisations import Angular, Data, F, Noise, Parametrisation, Velocity, like, straight_velocity
from mmdit.flow.paths import Cosine, Diffusion, Exploding, LdmLinear, Normal, Path, Preserving, RectifiedFlow, Straight
from mmdit.flow.weightings import Constant, VelocityOfData, Weighting


@dataclass(frozen=True)
class Formulation:
    path: Path
    parametrisation: Parametrisation
    density: Density
    weighting: Weighting

    @property
    def _plain(self) -> bool:
        """Whether the network reads the point on the straight path and says its velocity."""
        return isinstance(self.path, RectifiedFlow) and isinstance(self.parametrisation, Velocity)

    def training_pair(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(what the network reads, what it should say) for data and noise [B, ...] and times [B]."""
        if self._plain:
            return rfkernels.rectified_flow(x0, noise, t)             # the same in one pass
        r, scale = self.path.straight_time(t), self.path.scale(t)
        p, q = self.parametrisation.coefficients(self.path, t)
        read = like(scale * (1 - r), x0) * x0 + like(scale * r, x0) * noise
        return read, like(p, x0) * x0 + like(q, x0) * noise

    def loss(self, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Weighted mean squared error, scalar fp32."""
        return rfkernels.weighted_mse(output, target, self.weighting.weight(self.path, t))

    def common_weight(self, t: Tensor) -> Tensor:
        """w_t of the common form (section 2): the loss is -1/2 E_{t ~ U}[w_t lambda'_t |noise_theta - noise|^2]."""
        t = t.double()
        p, q = self.parametrisation.coefficients(self.path, t)
        per_noise = q - p * torch.exp(-self.path.log_snr(t) / 2)      # an error of the output over one of the noise
        counted = self.density.pdf(t) * self.weighting.weight(self.path, t)
        return -2 * counted * per_noise**2 / self.path.slope(t)

    # --- sampling: on the straight path, at the formulation's own times -----------------------------------------------

    def times(self, steps: int, shift: float = 1.0, schedule: solvers.Schedule = "paper") -> Tensor:
        """steps + 1 times of the straight path, falling to 0: those of equidistant times of the formulation's path."""
        ts = solvers.times(steps, 1.0 if schedule == "paper" else shift, schedule)
        straight = self.path.straight_time(ts)
        if schedule == "paper":
            straight = shift_time(straight, shift)
        return straight.clamp(max=self.parametrisation.highest_straight_time)

    def read(self, point: Tensor, t: Tensor) -> Tensor:
        """What the network reads of a point on the straight path."""
        return point if self._plain else like(self.path.scale(t), point) * point

    def velocity(self, output: Tensor, point: Tensor, t: Tensor) -> Tensor:
        """noise - x0, the velocity on the straight path, from the network's output at the path's times t [B]."""
        if self._plain:
            return output
        p, q = self.parametrisation.coefficients(self.path, t)
        return straight_velocity(p, q, output, point, self.path.straight_time(t))


# --- the paper's names ------------------------------------------------------------------------------------------------

VARIANCE_PRESERVING = {"linear": Diffusion(LdmLinear(), Preserving()), "cos": Diffusion(Cosine(), Preserving())}
PREDICTIONS: dict[str, Parametrisation] = {"eps": Noise(), "v": Angular()}


def _flow(density: Density) -> Formulation:
    return Formulation(RectifiedFlow(), Velocity(), density, Constant())


def _data(density: Density) -> Formulation:
    """Rectified flow whose network says x0, under the velocity's loss."""
    return Formulation(RectifiedFlow(), Data(), density, VelocityOfData())


def _edm(schedule: Straight | Cosine | Normal) -> Formulation:
    """F-prediction with unit weight: for a normal schedule w_t is the paper's, equation 16, times 8."""
    return Formulation(Diffusion(schedule, Exploding()), F(), Uniform(), Constant())


def _preserving(prediction: str, path: str) -> Formulation:
    return Formulation(VARIANCE_PRESERVING[path], PREDICTIONS[prediction], Uniform(), Constant())


Maker = Callable[..., Formulation]
MAKERS: dict[str, tuple[int, Maker]] = {                               # name -> (number of arguments, constructor)
    "rf": (0, lambda: _flow(Uniform())),
    "rf/lognorm": (2, lambda mean, std: _flow(LogitNormal(mean, std))),
    "rf/mode": (1, lambda scale: _flow(Mode(scale))),
    "rf/cosmap": (0, lambda: _flow(CosMap())),
    "x": (0, lambda: _data(Uniform())),
    "x/lognorm": (2, lambda mean, std: _data(LogitNormal(mean, std))),
    "x/mode": (1, lambda scale: _data(Mode(scale))),
    "x/cosmap": (0, lambda: _data(CosMap())),
    "edm": (2, lambda mean, std: _edm(Normal(mean, std))),
    # w_t of rf and of v/cos is e^(-lambda/2) for both: what is matched is the distribution of lambda
    "edm/rf": (0, lambda: _edm(Straight())),
    "edm/cos": (0, lambda: _edm(Cosine())),
    **{
        f"{prediction}/{path}": (0, lambda prediction=prediction, path=path: _preserving(prediction, path))
        for prediction, path in product(PREDICTIONS, VARIANCE_PRESERVING)
    },
}
_NAME = re.compile(r"(?P<kind>[a-z]+(?:/[a-z]+)?)(?:\((?P<arguments>[^()]*)\))?")


def by_name(name: str, shift: float = 1.0) -> Formulation:
    """A formulation by the paper's name: rf, rf/lognorm(m,s), rf/mode(s), rf/cosmap, edm(m,s), edm/rf, edm/cos,
    eps/linear, eps/cos, v/linear, v/cos. With x in place of rf the network says x0, under the velocity's loss.

    Args: shift: alpha of the timestep shift applied to the training times of rf and x (3.0 at 1024 x 1024); 1: none.
    Raises: ValueError for an unknown name, wrong number of arguments or values outside their range.

    >>> formulation = by_name("rf/lognorm(0.00,1.00)", shift=3.0)
    >>> read, target = formulation.training_pair(torch.zeros(2, 4), torch.ones(2, 4), torch.tensor([0.25, 0.5]))
    >>> read[:, 0].tolist(), target[:, 0].tolist()                             # (1 - t) x0 + t noise, noise - x0
    ([0.25, 0.5], [1.0, 1.0])
    """
    match = _NAME.fullmatch(name.replace(" ", ""))
    if match is None or match["kind"] not in MAKERS:
        raise ValueError(
            f"formulation {name!r} is unknown; expected one of {', '.join(MAKERS)}, such as rf/lognorm(0.00,1.00)"
        )
    count, make = MAKERS[match["kind"]]
    try:
        values = [float(v) for v in match["arguments"].split(",")] if match["arguments"] else []
    except ValueError as error:
        raise ValueError(f"formulation {name!r}: arguments must be numbers, came ({match['arguments']})") from error
    if len(values) != count:
        raise ValueError(f"formulation {name!r} has {len(values)} arguments; {match['kind']} takes {count}")
    made = make(*values)
    if shift == 1.0:
        return made
    if not isinstance(made.path, RectifiedFlow):
        raise ValueError(f"formulation {name!r} with a shift of {shift}: training times are shifted for rf and x only")
    return Formulation(made.path, made.parametrisation, Shifted(made.density, shift), made.weighting)


def _grid(first: float, last: float, count: int) -> list[float]:
    return [first + (last - first) * i / (count - 1) for i in range(count)]


def study_names() -> list[str]:
    """The 61 formulations of section 5.1, parameters to two digits as the paper prints them; rf is rf/mode(0)."""
    modes = [*_grid(-1, 1.75, 7), 1.0]
    return [
        *(f"{prediction}/{path}" for prediction, path in product(PREDICTIONS, VARIANCE_PRESERVING)),
        "rf",
        *(f"rf/mode({scale:.2f})" for scale in modes),
        *(f"rf/lognorm({m:.2f},{s:.2f})" for m, s in product(_grid(-1, 1, 5), _grid(0.2, 2.2, 6))),
        "rf/cosmap",
        *(f"edm({m:.2f},{s:.2f})" for m, s in product(_grid(-1.2, 1.2, 5), _grid(0.6, 1.8, 3))),
        "edm/rf",
        "edm/cos",
    ]


FORMULATIONS: dict[str, Formulation] = {name: by_name(name) for name in study_names()}
