"""Diffusion and rectified flow as small composable pieces: path, parametrisation, time density, weighting, solver."""

from mmdit.flow.densities import CosMap, Density, LogitNormal, Mode, Shifted, Uniform, shift_time
from mmdit.flow.formulation import FORMULATIONS, Formulation, by_name
from mmdit.flow.parametrisations import Velocity
from mmdit.flow.paths import RectifiedFlow
from mmdit.flow.solvers import (
    SCHEDULES,
    SOLVERS,
    PathLength,
    dpmpp_2m,
    euler,
    guided,
    guided_twice,
    heun,
    starting_at,
    times,
)
from mmdit.flow.weightings import Constant

__all__ = [
    "FORMULATIONS",
    "SCHEDULES",
    "SOLVERS",
    "Constant",
    "CosMap",
    "Density",
    "Formulation",
    "LogitNormal",
    "Mode",
    "PathLength",
    "RectifiedFlow",
    "Shifted",
    "Uniform",
    "Velocity",
    "by_name",
    "dpmpp_2m",
    "euler",
    "guided",
    "guided_twice",
    "heun",
    "shift_time",
    "starting_at",
    "times",
]
