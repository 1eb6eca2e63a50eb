"""A study's rows as pictures, like the paper's figures 3, 4 and 8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
FAMILIES = {"rf": "C0", "edm": "C1", "eps": "C2", "v": "C3"}
"""Colours, as the paper groups formulations."""
SHOWN = 3          # of each family, the best by mean distance


def draw(found: list[Row], folder: Path) -> list[Path]:
    """Draws what the variants allow, of the first data set, into a folder. Returns: the files; none without
    matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    found = [row for row in found if row["dataset"] == found[0]["dataset"]]             # losses of others are others
    names, drawn = {row["variant"] for row in found}, []
    if any(name.startswith("depth=") for name in names) and len({row["flops"] for row in found}) > 1:
        drawn.append(scaling(found, folder / "scaling.png"))
    elif len({row["parameters"] for row in found}) > 1:
        drawn.append(training(found, folder / "backbones.png"))
    else:
        drawn.append(steps(found, folder / f"{'shifts' if any('shift' in n for n in names) else 'formulations'}.png"))
    return drawn


def family(variant: str) -> str:
    return variant.split("/")[0].split("(")[0].split(",")[0]


def by_variant(found: list[Row]) -> dict[str, list[Row]]:
    names = dict.fromkeys(row["variant"] for row in found)
    return {name: [row for row in found if row["variant"] == name] for name in names}


def where(found: list[Row]) -> str:
    return f"{found[0]['steps']} steps of {found[0]['batch']}, {found[0]['machine']}, {max(r['date'] for r in found)}"


def steps(found: list[Row], path: Path) -> Path:
    """Figure 3: distance, and score, against the sampler's steps, averaged weights, guidance 5."""
    from matplotlib import pyplot as plt

    curves: dict[str, dict[int, tuple[float, float]]] = {}
    for name, rows in by_variant(found).items():
        at: dict[int, list[tuple[float, float]]] = {}
        for s in (s for row in rows for s in row["settings"] if (s["weights"], s["guidance"]) == ("EMA", 5.0)):
            at.setdefault(s["steps"], []).append((s["score"], s["distance"]))
        curves[name] = {n: tuple(np.mean(values, 0)) for n, values in sorted(at.items())}
    order = sorted(curves, key=lambda name: np.mean([distance for _, distance in curves[name].values()]))
    kinds = [kind for kind in FAMILIES if any(family(name) == kind for name in order)]
    shown = [name for kind in kinds for name in [n for n in order if family(n) == kind][:SHOWN]]
    if len(order) <= 12:
        shown = order
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for name in order:
        xs, colour = list(curves[name]), FAMILIES.get(family(name), "C7")
        for axis, i in zip(axes, (1, 0), strict=True):
            values = [curves[name][x][i] for x in xs]
            if name not in shown:
                axis.plot(xs, values, color=colour, linewidth=0.5, alpha=0.25)
                continue
            rank = [n for n in shown if family(n) == family(name)].index(name)
            style = ("-", "--", ":", "-.")[rank % 4]
            axis.plot(xs, values, style, marker="o", markersize=3, color=colour, label=name)
    axes[0].set(xlabel="Euler steps", ylabel="Frechet distance (judge's features)", xscale="log", yscale="log")
    axes[1].set(xlabel="Euler steps", ylabel="score of the captions", xscale="log")
    for axis in axes:
        axis.set_xticks([5, 10, 25, 50], ["5", "10", "25", "50"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(f"fewer steps: {order[0]} stays nearest to the data\n{where(found)}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def mean_curve(rows: list[Row]) -> tuple[list[int], np.ndarray]:
    """Validation loss of the averaged weights during training, over seeds."""
    xs = [step for step, _ in rows[0]["validation_curve"]]
    return xs, np.mean([[loss for _, loss in row["validation_curve"]] for row in rows], 0)


def training(found: list[Row], path: Path) -> Path:
    """Figure 4: validation loss during training, at equal parameters and at equal FLOPs."""
    from matplotlib import pyplot as plt

    variants = by_variant(found)
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", sharey=True)
    best = []
    for axis, measure in zip(axes, ("parameters", "FLOPs"), strict=True):
        chosen = {n: rows for n, rows in variants.items() if ", equal " not in n or n.endswith(measure)}
        last = {}
        for name in sorted(chosen):
            xs, ys = mean_curve(chosen[name])
            label = name.split(", equal ")[0]
            last[label] = ys[-1]
            axis.plot(xs, ys, "o-", markersize=3, label=f"{label} ({ys[-1]:.4f})")
        best.append(min(last, key=last.__getitem__))
        axis.set(xlabel="step", yscale="log", title=f"equal {measure}: {best[-1]} ends lowest")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("validation loss (EMA, stratified in t)")
    figure.suptitle(where(found), fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def power_law(found: list[Row]) -> tuple[float, float]:
    """(exponent, correlation of the logarithms) of the last validation losses against training FLOPs."""
    x = np.log([row["flops"] for row in found])
    y = np.log([row["validation_curve"][-1][1] for row in found])
    return float(np.polyfit(x, y, 1)[0]), float(np.corrcoef(x, y)[0, 1])


def score(row: Row) -> float:
    """Of the averaged weights at guidance 5, over numbers of steps."""
    return float(np.mean([s["score"] for s in row["settings"] if (s["weights"], s["guidance"]) == ("EMA", 5.0)]))


def scaling(found: list[Row], path: Path) -> Path:
    """Figure 8: validation loss against training FLOPs with the fitted power law, and as a predictor of the score."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    for name, rows in sorted(by_variant(found).items(), key=lambda item: item[1][0]["flops"]):
        xs, ys = mean_curve(rows)
        total = rows[0]["flops"] / rows[0]["steps"]
        left.plot(np.array(xs) * total, ys, "o-", markersize=3, label=f"{name}, {rows[0]['parameters'] / 1e6:.2f} M")
        right.plot([row["validation_loss"] for row in rows], [score(row) for row in rows], "o", label=name)
    exponent, correlation = power_law(found)
    flops = np.array(sorted({row["flops"] for row in found}))
    last = np.log([row["validation_curve"][-1][1] for row in found])
    intercept = last.mean() - exponent * np.log([row["flops"] for row in found]).mean()
    left.plot(flops, np.exp(intercept) * flops**exponent, "k--", linewidth=1, label=f"FLOPs^{exponent:.3f}")
    left.set(xlabel="training FLOPs", ylabel="validation loss (EMA, stratified in t)", xscale="log", yscale="log")
    left.set_title(f"loss falls as FLOPs^{exponent:.3f} (correlation {correlation:.3f})", fontsize=10)
    right.set(xlabel="validation loss", ylabel="score of the captions, guidance 5")
    right.set_title("validation loss as a predictor of the score", fontsize=10)
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.suptitle(where(found), fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
