"""Results as pictures: speed-ups, the roofline, where a step's time goes, and memory against batch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import models, tables
from bench.models import Size
from mmdit.cost.hardware import Ceilings

TITLES = {
    "overview": "Forward and backward of ops, a block and a step: times as fast as eager PyTorch",
    "speedups": "Times as fast as eager PyTorch, by case",
    "roofline": "FLOP/s against FLOPs per byte, with the ceilings measured in the same run",
    "breakdown": "Where the time of a step goes",
    "memory": "Bytes kept for backward against batch",
    "host": "Host time of a call, by launcher",
}


def variant(name: str, device: str) -> str:
    """What a case's bar stands for: on a CPU its dtype, on a GPU, where all is bf16, the side of its pictures."""
    if device.startswith("cpu"):
        return "bf16" if name.endswith("-bf16") else "fp32"
    if pixels := re.search(r"-(\d+)px", name):
        return f"{pixels[1]} pixels"
    tokens = re.search(r"(\d+)$", name)
    return f"{16 * math.isqrt(int(tokens[1]))} pixels" if tokens else ""


def overview(results: dict[str, Any], axes: Any) -> None:
    """Of each op, a bar for each variant; small enough for a front page."""
    device = results["machine_info"]["rfkernels"].get("device", "cpu")
    found: dict[str, dict[str, float]] = {}
    for case, c in tables.rows(results).items():
        name, _, kind = case.rpartition(" ")
        if kind not in ("both", "step") or "ours" not in c or not tables.baseline(c) or name.endswith("sampling"):
            continue
        label = "training step" if kind == "step" else name.split("-")[0]
        found.setdefault(label, {})[variant(name, device)] = (tables.baseline(c) or 0) / c["ours"]["us"]
    variants = list(dict.fromkeys(v for speeds in found.values() for v in speeds))
    height = 0.8 / max(1, len(variants))
    for j, one in enumerate(variants):
        at = [i + height * (j + 0.5) for i, speeds in enumerate(found.values()) if one in speeds]
        axes.barh(at, [speeds[one] for speeds in found.values() if one in speeds], height, label=one)
    axes.set_yticks([i + 0.4 for i in range(len(found))], list(found))
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast as eager PyTorch")
    axes.set_title("Forward and backward: faster than eager PyTorch to the right of the line")
    axes.legend(loc="best")


def speedups(results: dict[str, Any], axes: Any) -> None:
    found = {case: c for case, c in tables.rows(results).items() if tables.baseline(c)}
    names = [n for n in dict.fromkeys(n for c in found.values() for n in c) if n != "eager"]
    height = 0.8 / max(1, len(names))
    for j, name in enumerate(names):
        at = [i + j * height for i, c in enumerate(found.values()) if name in c]
        speed = [(tables.baseline(c) or 0) / c[name]["us"] for c in found.values() if name in c]
        axes.barh(at, speed, height, label=name)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(found))], list(found), fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast as eager PyTorch")
    slower, cases = tables.behind(found)
    axes.set_title(f"Ours is behind eager by 1 % or more in {slower} of {cases} cases")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def roofline(results: dict[str, Any], axes: Any) -> None:
    ceiling = Ceilings(**results["machine_info"]["rfkernels"]["ceilings"])
    low, high = 1.0, 1.0
    for marker, name in (("o", "ours"), ("x", "eager")):
        points = []
        for c in tables.rows(results).values():
            record = c.get(name, {})
            if record.get("flops") and record.get("moved_bytes"):
                points.append((record["flops"] / record["moved_bytes"], record["flops"] / record["us"] * 1e6))
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=name, markersize=5)
            low, high = min(low, *(x for x, _ in points)), max(high, *(x for x, _ in points))
    xs = [low / 2 * (4 * high / low) ** (i / 100) for i in range(101)]
    axes.plot(xs, [min(ceiling.matmul, x * ceiling.copy) for x in xs], "k-", linewidth=0.9, label="copy, then products")
    axes.axhline(ceiling.attention, color="gray", linestyle="--", linewidth=0.9, label="PyTorch's attention")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte that the kernels move", ylabel="FLOP/s")
    axes.set_title("Attention, blocks and steps under the measured ceilings")
    axes.legend(fontsize=8)


def breakdown(results: dict[str, Any], axes: Any) -> None:
    bars = {
        f"{case}\n{name}": record["breakdown"]
        for case, c in tables.rows(results).items()
        for name, record in c.items()
        if "breakdown" in record
    }
    for j, kind in enumerate(dict.fromkeys(k for b in bars.values() for k in sorted(b))):
        before = [sum(s for k, s in b.items() if k < kind) for b in bars.values()]
        axes.barh(range(len(bars)), [b.get(kind, 0) * 1e3 for b in bars.values()], 0.7,
                  [1e3 * x for x in before], label=kind, color=f"C{j}")  # fmt: skip
    axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_title("Time of a step by kind of kernel (torch.profiler's shares of the median)")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def memory(results: dict[str, Any], axes: Any) -> None:
    """Counted by shapes, which holds on any machine; peaks where a GPU measured them."""
    records = (c.get("ours", {}) for c in tables.rows(results).values())
    sizes = dict.fromkeys((r["depth"], r["pixels"], r["dtype"]) for r in records if r.get("step") == "training")
    for j, (depth, pixels, dtype) in enumerate(sizes):
        batches = (1, 2, 4, 8)
        for way, style in (("ours", "-"), ("eager", "--")):
            one = models.counted(Size(depth, pixels, 2), "training", way, getattr(torch, dtype)).kept / 2
            axes.plot(batches, [b * one / 1e9 for b in batches], style, color=f"C{j}",
                      label=f"d = {depth}, {pixels} px, {way}: {tables.size(one)} a sample")  # fmt: skip
    for c in tables.rows(results).values():
        for name, marker in (("ours", "o"), ("eager", "x")):
            record = c.get(name, {})
            if record.get("step") == "training" and record.get("peak_bytes"):
                axes.plot([record["batch"]], [record["peak_bytes"] / 1e9], marker, color="black")
    axes.set(xlabel="batch", ylabel="GB")
    axes.set_title("Kept for backward, counted by shapes as on a GPU (points: peaks of the step, gradients included)")
    axes.legend(fontsize=8)


def host(results: dict[str, Any], axes: Any) -> None:
    """Of a call, with a driver that runs nothing; eager PyTorch computes on the CPU, on small tensors."""
    found = tables.host_times(results.get("notes", []))
    ways = list(next(iter(found.values())))
    for j, way in enumerate(ways):
        at = [i + 0.8 * (j + 0.5) / len(ways) for i in range(len(found))]
        axes.barh(at, [by_way[way][1] for by_way in found.values()], 0.8 / len(ways), label=way)
    axes.set_yticks([i + 0.4 for i in range(len(found))], list(found))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("microseconds of the host, forward and backward; the driver runs nothing")
    axes.set_title("Host time of a call, by launcher (eager: PyTorch on the CPU, with its arithmetic)")
    axes.legend(fontsize=8)


def saved(paint: Callable[[Any], None], path: Path, height: float) -> None:
    """A figure of one pair of axes as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    paint(axes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def shown(results: dict[str, Any]) -> list[str]:
    """Of TITLES those that there is something to draw for."""
    return [name for name in TITLES if name != "host" or tables.host_times(results.get("notes", []))]


def draw(results: dict[str, Any], stem: Path) -> None:
    """STEM-speedups.png and so on: those of TITLES."""
    found = tables.rows(results)
    lines = sum(len(c) for c in found.values())
    steps = sum("breakdown" in r for c in found.values() for r in c.values())
    heights = {"overview": 4.2, "speedups": 1.2 + 0.22 * lines, "roofline": 5.0, "breakdown": 1.4 + 0.42 * steps,
               "memory": 4.5, "host": 4.2}  # fmt: skip
    painters: dict[str, Callable[[dict[str, Any], Any], None]] = {
        "overview": overview, "speedups": speedups, "roofline": roofline, "breakdown": breakdown, "memory": memory,
        "host": host,
    }  # fmt: skip
    for name in shown(results):
        saved(partial(_with_where, painters[name], results), Path(f"{stem}-{name}.png"), heights[name])


def _with_where(paint: Callable[[dict[str, Any], Any], None], results: dict[str, Any], axes: Any) -> None:
    paint(results, axes)
    axes.set_title(f"{axes.get_title()}\n{tables.where(results)}", fontsize=9)
