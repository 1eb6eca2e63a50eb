"""Warnings of an objective about its metrics."""

from __future__ import annotations

import sys

from train.engine.parallel import World
from train.objectives import Objective

STEPS = 50
"""Over which metrics are averaged before anything is said."""


class Warnings:
    """Prints the objective's warning once, the first time that it has one."""

    def __init__(self, objective: Objective, world: World) -> None:
        self._objective, self._world = objective, world
        self._recent: list[dict[str, float]] = []
        self._said = False

    def observe(self, metrics: dict[str, float]) -> None:
        """After a step."""
        if not metrics or self._said or not self._world.main:
            return
        self._recent = [*self._recent[1 - STEPS :], metrics]
        if len(self._recent) < STEPS:
            return
        means = {name: sum(m[name] for m in self._recent) / STEPS for name in metrics}
        if line := self._objective.warning(means):
            self._said = True
            print(f"warning: {line}", file=sys.stderr, flush=True)
