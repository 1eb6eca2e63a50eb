"""A study's rows as tables, the paper's numbers beside, and as figures: python -m train.study.report ROWS.jsonl"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mmdit.files import read_lines
from train.study import figures, paper
from train.study.plan import FEWER
from train.study.ranking import Point, mean_ranks

Row = dict[str, Any]
Setting = dict[str, Any]


def points(found: Iterable[Row], only: Callable[[Setting], bool] = lambda setting: True) -> list[dict[str, Point]]:
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


def ranking(found: Iterable[Row], only: Callable[[Setting], bool] = lambda setting: True) -> dict[str, float]:
    """Mean rank of each variant over the control settings."""
    return mean_ranks(points(found, only))


def best_first(found: Iterable[Row]) -> list[str]:
    ranked = ranking(found)
    return sorted(ranked, key=ranked.__getitem__)


def table(head: str, lines: Iterable[Iterable[object]]) -> str:
    """Markdown."""
    rule = "|" + "---|" * (head.count("|") - 1)
    return "\n".join([head, rule, *("| " + " | ".join(map(str, cells)) + " |" for cells in lines)]) + "\n"


def ranks_table(found: list[Row]) -> str:
    """As tables 1 and 2: mean rank over all control settings, over those of 5 and of 50 steps; score and distance of
    the averaged weights at 25 steps; the paper's, where it gives them."""
    settings = (lambda s: True, lambda s: s["steps"] == 5, lambda s: s["steps"] == 50)
    ours = [ranking(found, only) for only in settings]
    (at_25,) = merged(points(found, lambda s: (s["weights"], s["steps"]) == ("EMA", 25)))
    lines = []
    for name in best_first(found):
        theirs = [f"{value:.2f}" for value in paper.RANKS.get(name, ())] or ["", "", ""]
        score, distance = at_25[name]
        clip = [f"{paper.METRICS[name][0]:.3f}", paper.METRICS[name][1]] if name in paper.METRICS else ["", ""]
        seeds = len({row["seed"] for row in found if row["variant"] == name})
        mine = [f"{ranks[name]:.2f}" for ranks in ours]
        lines.append([name, *mine, *theirs, f"{score:.3f}", f"{distance:.2f}", *clip, seeds])
    if not any(name in paper.RANKS for name in ours[0]):
        head = "| variant | all | 5 steps | 50 steps | score | distance | seeds |"
        return table(head, ([*line[:4], *line[7:9], line[11]] for line in lines))
    head = (
        "| variant | all | 5 steps | 50 steps | paper: all | 5 steps | 50 steps | score | distance | paper: CLIP | FID "
        "| seeds |"
    )
    return table(head, lines)


def merged(settings: list[dict[str, Point]]) -> list[dict[str, Point]]:
    """The mean over settings, as a list of one: data sets count alike."""
    common = set.intersection(*map(set, settings))
    return [{name: tuple(np.mean([points[name] for points in settings], 0)) for name in common}]


def sizes_table(found: list[Row]) -> str:
    """As figures 4 and 8 and table 6, for models of several sizes or kinds: what each costs and comes to. Losses of
    several seeds are a mean and the largest distance from it."""
    lines: list[list[object]] = []
    variants = figures.by_variant(found)
    loss_of = lambda name: float(np.mean([row["validation_loss"] for row in variants[name]]))  # noqa: E731
    for name in sorted(variants, key=loss_of):
        rows, mean = variants[name], loss_of(name)
        losses = [row["validation_loss"] for row in rows]
        decrease = [f"{100 * np.mean([row['decrease'][str(steps)] for row in rows]):.2f}" for steps in FEWER]
        lines.append([
            name, f"{rows[0]['parameters'] / 1e6:.2f} M", f"{rows[0]['flops'] / 1e12:.2f} T",
            f"{mean:.4f} ± {max(abs(loss - mean) for loss in losses):.4f}", *decrease,
            f"{np.mean([row['path_length'] for row in rows]):.2f}",
        ])  # fmt: skip
    if any(name.startswith("depth=") for name in variants):
        lines += [[f"paper, {name}", "", "", "", *values] for name, values in paper.EFFICIENCY.items()]
    head = (
        "| variant | parameters | training FLOPs | validation loss | decrease at 5 of 50 steps, % | 10 | 20 "
        "| path length |"
    )
    return table(head, lines)


def report(found: list[Row]) -> str:
    """Markdown: what was run where, and the tables that its variants allow."""
    if not found:
        return "no finished run\n"
    budget, images = sorted({f"{r['steps']} steps of {r['batch']}" for r in found}), found[0]["images"]
    text = (
        f"{', '.join(budget)}, {images} pictures a setting, {len(points(found))} settings; {found[0]['machine']}, "
        f"{max(r['date'] for r in found)}\n\n{ranks_table(found)}"
    )
    if len(both := [name for name in best_first(found) if name in paper.RANKS]) > 2:
        theirs = np.argsort(np.argsort([paper.RANKS[name][0] for name in both]))
        rho = np.corrcoef(np.arange(len(both)), theirs)[0, 1]
        text += f"\nSpearman's correlation with the paper's order, of the {len(both)} that it ranks: {rho:.2f}.\n"
    if len({row["parameters"] for row in found}) > 1:
        for dataset in dict.fromkeys(row["dataset"] for row in found):
            text += f"\n{dataset}:\n\n{sizes_table([row for row in found if row['dataset'] == dataset])}"
    if any(row["variant"].startswith("depth=") for row in found) and len({row["flops"] for row in found}) > 1:
        exponent, correlation = figures.power_law(found)
        text += f"\nLast losses fall as training FLOPs to the power {exponent:.3f} (correlation {correlation:.3f}).\n"
    return text


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in read_lines(path)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m train.study.report", description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--figures", type=Path, help="folder to draw into")
    chosen = parser.parse_args()
    print(report(read(chosen.rows)), end="")
    if chosen.figures:
        figures.draw(read(chosen.rows), chosen.figures)
