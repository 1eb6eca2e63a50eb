"""What a run leaves to look at: metrics as JSON lines, in tensorboard and, where asked for, in Weights & Biases; sample
grids and a loss plot as PNG."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmdit.files import naming, write_atomically
from mmdit.sampling.sample import grid
from train import report
from train.config import Config
from train.engine.parallel import World

SPEED = "speed.jsonl"          # how fast it went, beside metrics.jsonl


def _wandb(config: Config) -> Any:
    """One run in wandb for a run folder, which resumes where it was. Raises: ImportError without the package."""
    try:
        import wandb
    except ImportError as error:
        raise ImportError(f"wandb is {config.wandb!r}, but the package is not there: pip install wandb") from error
    key = hashlib.blake2b(str(config.run.resolve()).encode(), digest_size=8).hexdigest()
    return wandb.init(
        project=config.wandb, name=config.run.name, id=key, resume="allow", dir=str(config.run),
        config=json.loads(config.to_json()),
    )  # fmt: skip


class Log:
    """Metrics of a run; lines after `step` (a resume) are dropped, so that no step is logged twice.

    Args: writes: False for a process that only computes along.
    """

    def __init__(self, config: Config, step: int, writes: bool = True) -> None:
        run = config.run
        self.run, self.path, self.writes = run, run / "metrics.jsonl", writes
        self._board: Any = None
        self._wandb: Any = None
        self._next_page, self._page_is_due = 0.0, False
        if not writes:
            return
        run.mkdir(parents=True, exist_ok=True)
        for path, last in ((self.path, step), (run / SPEED, step), (run / report.STARTS, math.inf)):
            if path.is_file() or path == self.path:
                kept = (json.dumps(entry) + "\n" for entry in report.entries(path) if entry["step"] <= last)
                write_atomically(path, "".join(kept).encode())
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        except ImportError:
            pass
        except OSError as error:
            self._no_tensorboard(error)
        if config.wandb:
            self._wandb = _wandb(config)

    def write(self, step: int, **values: float) -> None:
        """Names as "train/loss" become tags in tensorboard."""
        if not self.writes:
            return
        self._append(self.path, step, values)

    def speed(self, step: int, **values: float) -> None:
        """How fast it went, apart from what was computed: speed.jsonl, which no two runs share."""
        if not self.writes or not values:
            return
        self._append(self.run / SPEED, step, values)

    def _append(self, path: Path, step: int, values: dict[str, float]) -> None:
        with naming(path), path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._tensorboard("add_scalar", name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def _tensorboard(self, method: str, *values: Any, **more: Any) -> None:
        """It writes in a thread of its own and says at a later call that it could not: no reason to stop a run."""
        try:
            if self._board is not None:
                getattr(self._board, method)(*values, **more)
        except OSError as error:
            self._no_tensorboard(error)

    def _no_tensorboard(self, error: OSError) -> None:
        self._board = None
        print(f"warning: {self.run / 'tensorboard'} is not written from here on ({error})", flush=True)

    def _picture(self, step: int) -> Path:
        return self.run / "samples" / f"step-{step:08d}.png"

    def drawn(self, step: int) -> bool:
        return self._picture(step).is_file()

    def validated(self, step: int) -> bool:
        return any(e["step"] == step and "validation/loss" in e for e in report.entries(self.path))

    def started(self, step: int, config: Config, world: World) -> None:
        """That the run was begun or resumed, and with which settings: starts.jsonl."""
        if not self.writes:
            return
        gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        device = gpu or platform.processor() or platform.machine()
        about = {"step": step, "time": time.time(), "device": device, "processes": world.size}
        path = self.run / report.STARTS
        with naming(path), path.open("a") as file:
            file.write(json.dumps({**about, "config": json.loads(config.to_json())}) + "\n")

    def page(self, last: bool = False) -> None:
        """RUN/report.html, anew, unless that would take more than a twentieth of the time: then `close` writes it. A
        page that cannot be made is no reason to stop a run."""
        if not self.writes:
            return
        began = time.monotonic()
        self._page_is_due = not last and began < self._next_page
        if self._page_is_due:
            return
        try:
            report.write(self.run)
        except Exception as error:
            print(f"warning: {self.run / report.NAME} was not written ({type(error).__name__}: {error})", flush=True)
        self._next_page = began + 20 * (time.monotonic() - began)

    def picture(self, step: int, images: np.ndarray, captions: Sequence[str] = ()) -> None:
        if not self.writes:
            return
        path = self._picture(step)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path.parent / report.CAPTIONS, json.dumps(list(captions)).encode())
        with naming(path):
            grid(images, scale=max(1, 96 // images.shape[1])).save(path)
        self._tensorboard("add_images", "samples", images, step, dataformats="NHWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({"samples": wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        if self._page_is_due:
            self.page(last=True)
        self._tensorboard("close")
        if self._wandb is not None:
            self._wandb.finish()

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

        entries = report.entries(self.path)
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
