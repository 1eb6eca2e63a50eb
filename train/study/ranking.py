"""Ranking by non-dominated sorting, as in the paper's section 5.1: higher scores and lower distances are better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Point = tuple[float, float]
"""(score, distance)"""


def dominates(one: Point, other: Point) -> bool:
    """No worse in both, better in one."""
    return one[0] >= other[0] and one[1] <= other[1] and one != other


def ranks(points: Mapping[str, Point]) -> dict[str, int]:
    """1 for what nothing dominates, 2 for what only those dominate, and so on. A point that is not a number is last."""
    broken = [name for name, point in points.items() if any(value != value for value in point)]
    left = {name: point for name, point in points.items() if name not in broken}
    found: dict[str, int] = {}
    rank = 0
    while left:
        rank += 1
        front = [n for n, p in left.items() if not any(dominates(q, p) for q in left.values())]
        found |= dict.fromkeys(front, rank)
        for name in front:
            del left[name]
    return found | dict.fromkeys(broken, rank + 1)


def mean_ranks(settings: Sequence[Mapping[str, Point]]) -> dict[str, float]:
    """The mean over control settings, of the variants that all of them have."""
    common = set.intersection(*(set(points) for points in settings)) if settings else set()
    by_setting = [ranks({name: points[name] for name in points if name in common}) for points in settings]
    return {name: sum(found[name] for found in by_setting) / len(by_setting) for name in sorted(common)}
