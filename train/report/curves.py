"""A run's curves as SVG."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

POINTS = 1500                # of a curve, at most: neighbours are averaged, so that a page stays small
Points = list[tuple[int, float]]


def points_of(entries: Iterable[dict[str, Any]], name: str) -> Points:
    """(step, value) of each line that has it."""
    return [(entry["step"], entry[name]) for entry in entries if isinstance(entry.get(name), (int, float))]


def thinned(points: Points, most: int = POINTS) -> Points:
    """At most so many: each the mean of neighbours, at the last one's step."""
    size = -(-len(points) // most)
    parts = (points[i : i + size] for i in range(0, len(points), size or 1))
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def drawn(curves: dict[str, Points], label: str, *, log: bool = False, starts: Iterable[int] = ()) -> str:
    """One plot over steps. Args: starts: steps at which the run was resumed. Returns: SVG, "" if there is nothing."""
    there = {name: points for name, points in curves.items() if points}
    if not there:
        return ""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    # A run waits for this: margins are not laid out, and text is the browser's, not shapes.
    figure = Figure(figsize=(7.5, 3.4))
    axes = figure.add_axes((0.13, 0.15, 0.85, 0.82))
    for name, points in there.items():
        few = len(points) < 60
        axes.plot(*zip(*thinned(points), strict=True), "o-" if few else "-", markersize=3, linewidth=1.0, label=name)
    for step in starts:
        axes.axvline(step, color="0.6", linewidth=0.8, linestyle=":")
    values = [value for points in there.values() for _, value in points]
    axes.set(xlabel="step", ylabel=label)
    if log and min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize=8)
    made, unsaid = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(made, format="svg", transparent=True, metadata=unsaid)
    return "".join(made.getvalue().partition("<svg")[1:])
