"""Each case over runs: how many times as fast as eager PyTorch, at which commit, and where the gate would fail."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import gate, tables

SLOWER = 0.10
"""What `pytest bench --against` lets pass, as a fraction of the time in eager PyTorch's."""

TICKS = (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class History:
    """Of one device, oldest run first."""

    runs: list[str]
    """The date and the commits of each; + after one: with changes that were not committed."""
    cases: dict[str, list[float | None]]
    """Times as fast as eager PyTorch, by case and run; None where a run has no such case."""

    def limit(self, case: str) -> float | None:
        """What the next run must reach: the newest run's speed, less what the gate lets pass; None if it lacks the
        case, which the gate passes over then."""
        newest = self.cases[case][-1]
        return None if newest is None else newest / (1 + SLOWER)


def commits(files: list[Path]) -> str:
    """Of a run's parts, each commit once."""
    found = (gate.read([file]).get("commit_info", {}) for file in files)
    named = (info.get("id", "")[:7] + ("+" if info.get("dirty") else "") for info in found)
    return ", ".join(dict.fromkeys(filter(None, named)))


def histories(folder: Path) -> dict[str, History]:
    """By device: every run in a folder of results that has cases."""
    found: dict[str, History] = {}
    for run, files in reversed(gate.runs(folder).items()):
        speeds = {case: 1 / ratio for case, ratio in gate.ratios(gate.read(files)).items()}
        if not speeds:
            continue
        history = found.setdefault(gate.device_of(run), History([], {}))
        for case in speeds:
            history.cases.setdefault(case, [None] * len(history.runs))
        for case, known in history.cases.items():
            known.append(speeds.get(case))
        history.runs.append(f"{run.removeprefix(gate.device_of(run))[1:]} {commits(files)}".strip())
    return found


def table(history: History) -> str:
    """In Markdown."""
    shown = lambda speed: "" if speed is None else f"{speed:.2f}"  # noqa: E731
    body = [[case, *map(shown, speeds), shown(history.limit(case))] for case, speeds in history.cases.items()]
    return tables.markdown(["times as fast as eager", *history.runs, "gate"], body)


def draw(history: History, axes: Any, device: str = "") -> None:
    """A row for each case, a point for each run, a bar where the gate would fail."""
    for i, run in enumerate(history.runs):
        at = [(speeds[i], j) for j, speeds in enumerate(history.cases.values()) if speeds[i] is not None]
        newest = i == len(history.runs) - 1
        axes.plot(*zip(*at, strict=True), "o", markersize=6 if newest else 4, color="C0" if newest else "C7", label=run,
                  alpha=1 if newest else 0.4 + 0.5 * i / len(history.runs))  # fmt: skip
    limits = [(limit, j) for j, case in enumerate(history.cases) if (limit := history.limit(case)) is not None]
    axes.plot(*zip(*limits, strict=True), "|", color="C3", markersize=9, label=f"gate: {SLOWER:.0%} slower")
    axes.set_yticks(range(len(history.cases)), list(history.cases), fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("times as fast as eager PyTorch in the same run")
    speeds = [known[-1] for known in history.cases.values() if known[-1] is not None]
    slower = sum(speed < 1 / 1.01 for speed in speeds)
    axes.set_title(f"{device}: in the newest run {slower} of {len(speeds)} cases are slower than eager", fontsize=10)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
