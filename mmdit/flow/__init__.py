"""Rectified flow as small composable pieces: path, parametrisation, time density, weighting, solver."""

from mmdit.flow.densities import CosMap, Density, LogitNormal, Mode, Shifted, Uniform, shift_time
from mmdit.flow.formulation import Formulation, by_name
from mmdit.flow.parametrisations import Velocity
from mmdit.flow.paths import RectifiedFlow
from mmdit.flow.solvers import euler, guided, times
from mmdit.flow.weightings import Constant

__all__ = [
    "Constant",
    "CosMap",
    "Density",
    "Formulation",
    "LogitNormal",
    "Mode",
    "RectifiedFlow",
    "Shifted",
    "Uniform",
    "Velocity",
    "by_name",
    "euler",
    "guided",
    "shift_time",
    "times",
]
