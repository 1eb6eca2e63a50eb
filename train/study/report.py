"""The ranking of a study's rows as a table: python -m train.study.report ROWS.jsonl"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
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


def table(found: list[Row]) -> str:
    """Mean rank over all control settings, over those of 5 and of 50 steps, and how many seeds; Markdown."""
    if not found:
        return "no finished run\n"
    everything = ranking(found)
    few, many = (ranking(found, lambda s, n=n: s["steps"] == n) for n in (5, 50))                   # type: ignore[misc]
    budget, images = sorted({f"{r['steps']} steps of {r['batch']}" for r in found}), found[0]["images"]
    lines = [
        f"{', '.join(budget)}, {images} pictures a setting, {len(points(found))} settings; {found[0]['machine']}, "
        f"{max(r['date'] for r in found)}",
        "",
        "| variant | all | 5 steps | 50 steps | seeds |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(everything, key=everything.__getitem__):
        seeds = sum(row["variant"] == name for row in found)
        lines.append(f"| {name} | {everything[name]:.2f} | {few[name]:.2f} | {many[name]:.2f} | {seeds} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]), end="")
