"""Tables and plots of a study's rows, beside the paper's numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from train.study.ranking import Point, mean_ranks

Row = dict[str, Any]


def points(found: Iterable[Row], only: Callable[[Row], bool] = lambda setting: True) -> list[dict[str, Point]]:
    """Of each control setting (data set, weights, steps, guidance) each variant's (score, distance), over seeds."""
    collected: dict[tuple, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for row in found:
        for s in filter(only, row["settings"]):
            key = (row["dataset"], s["weights"], s["steps"], s["guidance"])
            collected[key][row["variant"]].append((s["score"], s["distance"]))
    return [
        {name: tuple(sum(values) / len(values) for values in zip(*seeds, strict=True)) for name, seeds in by.items()}
        for by in collected.values()
    ]


def ranking(found: Iterable[Row], only: Callable[[Row], bool] = lambda setting: True) -> dict[str, float]:
    """Mean rank of each variant over the control settings."""
    return mean_ranks(points(found, only))
