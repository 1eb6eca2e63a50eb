"""What a run leaves to look at: metrics as JSON lines and in tensorboard, sample grids and a loss plot as PNG."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np

from mmdit.files import write_atomically
from mmdit.sample import grid


class Log:
    """Metrics of a run; lines after `step` (a resume) are dropped, so that no step is logged twice.

    Args: writes: False for a process that only computes along.
    """

    def __init__(self, run: Path, step: int, writes: bool = True) -> None:
        self.run, self.path, self.writes = run, run / "metrics.jsonl", writes
        self._board: Any = None
        if not writes:
            return
        run.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
        write_atomically(self.path, "".join(line + "\n" for line in kept).encode())
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        except ImportError:
            pass

    def _lines(self) -> list[str]:
        if not self.path.is_file():
            return []
        lines = self.path.read_text().splitlines()
        return [line for line in lines if line.startswith("{") and line.endswith("}")]     # a kill may cut the last one

    def write(self, step: int, **values: float) -> None:
        """Names as "train/loss" become tags in tensorboard."""
        if not self.writes:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def speed(self, step: int, **values: float) -> None:
        """How fast it went, apart from what was computed: speed.jsonl, which no two runs share."""
        if not self.writes or not values:
            return
        with (self.run / "speed.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def _picture(self, step: int) -> Path:
        return self.run / "samples" / f"step-{step:08d}.png"

    def drawn(self, step: int) -> bool:
        return self._picture(step).is_file()

    def validated(self, step: int) -> bool:
        return any((e := json.loads(line))["step"] == step and "validation/loss" in e for line in self._lines())

    def picture(self, step: int, images: np.ndarray) -> None:
        if not self.writes:
            return
        path = self._picture(step)
        path.parent.mkdir(exist_ok=True)
        grid(images, scale=max(1, 96 // images.shape[1])).save(path)
        if self._board is not None:
            self._board.add_images("samples", images, step, dataformats="NHWC")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def plot(self) -> Path | None:
        """Draws loss.png from metrics.jsonl; None without matplotlib or without anything to draw."""
        if not self.writes:
            return None
        try:
            import matplotlib
        except ImportError:
            return None
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        entries = [json.loads(line) for line in self._lines()]
        training = [(e["step"], e["train/loss"]) for e in entries if "train/loss" in e]
        validation = [(e["step"], e["validation/loss"]) for e in entries if "validation/loss" in e]
        if not training:
            return None
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        axes.plot(*zip(*training, strict=True), linewidth=0.8, alpha=0.6, label="training")
        title = f"training loss {training[-1][1]:.3f} after {training[-1][0]:,} steps"
        if validation:
            axes.plot(*zip(*validation, strict=True), "o-", label="validation, EMA, stratified in t")
            title = f"validation loss {validation[-1][1]:.3f} after {validation[-1][0]:,} steps"
        axes.set(xlabel="step", ylabel="mean squared error of the velocity", yscale="log")
        axes.set_title(f"{title}\n{self.run.name} on {platform.processor() or platform.machine()}", fontsize=10)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        path = self.run / "loss.png"
        figure.savefig(path, dpi=120)
        plt.close(figure)
        return path
