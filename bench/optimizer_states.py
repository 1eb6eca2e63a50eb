"""Does AdamW with states of few bits train as well? Loss curves of a d = 6 model against the spread of seeds with fp32
states: python -m bench.optimizer_states

The model of the paper's series at depth 6 (width 384) on captioned shapes in pixel space, batches of 2, AdamW; runs of
one seed have the same data order, noise and times. Writes a table and a picture to bench/results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import environment
from mmdit import presets
from mmdit.files import write_atomically
from train.config import Config, Ema, Optimizer, Samples, Validation
from train.data.precompute import precompute
from train.data.settings import Precompute
from train.engine.loop import train
from train.recipes import shapes

SEEDS = (0, 1, 2)
FEW = ("bf16", "int8")


def configured(steps: int, states: str, seed: int, cache: Path, run: Path) -> Config:
    model = presets.by_depth(6, in_channels=12, context_dim=64, pooled_dim=64, token_pixels=4, resolution=32)
    return replace(
        shapes(), run=run, cache=cache, model=replace(model, position_base=96), minutes=None, steps=steps, seed=seed,
        batch=2,
        optimizer=Optimizer(states=states, lr=5e-4, betas=(0.9, 0.99), eps=1e-8, warmup=steps // 10, decay="linear"),  # type: ignore[arg-type]
        ema=Ema(decay=0.9, every=5), validation=Validation(every=0, samples=16),
        samples=Samples(every=0, count=1, steps=1), checkpoint_every=steps,
    )  # fmt: skip


def curve(steps: int, states: str, seed: int, cache: Path, folder: Path) -> list[float]:
    """The training loss, mean of each tenth of the steps, and the validation loss at the end."""
    config = configured(steps, states, seed, cache, folder / f"{states}-{seed}")
    train(config)
    lines = [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    shutil.rmtree(config.run)
    tenths = [float(np.mean(part)) for part in np.array_split(losses, 10)]
    return [*tenths, *(line["validation/loss"] for line in lines if "validation/loss" in line)]


def within(found: dict[str, Any]) -> dict[str, float]:
    """Of each kind of states, the largest distance of its losses from those of fp32 with the same seed, over the spread
    of the seeds with fp32 (the largest less the smallest). Up to 1 is within it."""
    fp32 = np.array([found[f"fp32 {seed}"] for seed in SEEDS])
    spread = np.ptp(fp32, axis=0)
    return {states: float(np.max(np.abs(np.array(found[f"{states} 0"]) - fp32[0]) / spread)) for states in FEW}


def draw(found: dict[str, Any], about: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for name, losses in found.items():
        states, seed = name.split()
        *values, _ = losses
        at = np.linspace(about["steps"] / len(values), about["steps"], len(values))
        style = {"fp32": {"color": "0.6"}, "bf16": {"color": "C0"}, "int8": {"color": "C1"}}[states]
        axes.plot(at, values, label=f"{states} states" + (f", seed {seed}" if states == "fp32" else ""), **style)
    axes.set(xlabel="step", ylabel="training loss, mean of a tenth", yscale="log")
    axes.set_title("AdamW's states in fewer bits: the loss stays within the spread of seeds"
                   if max(within(found).values()) <= 1 else "AdamW's states in fewer bits against seeds")  # fmt: skip
    axes.legend(title=f"d = 6 on shapes; {about['machine']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(steps: int, out: Path) -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="optimizer-states-") as name:
        folder = Path(name)
        precompute(Precompute(cache=folder / "cache"))
        for states, seeds in (("fp32", SEEDS), *((states, SEEDS[:1]) for states in FEW)):
            for seed in seeds:
                found[f"{states} {seed}"] = curve(steps, states, seed, folder / "cache", folder)
    about = {"steps": steps, "machine": environment.environment()["processor"], **environment.environment()}
    stem = f"{environment.device_name().lower().replace(' ', '_')}-{time.strftime('%Y-%m-%d', time.gmtime())}"
    body = {"about": about, "of the spread": within(found), "losses": found}
    write_atomically(out / f"{stem}-optimizer_states.json", json.dumps(body, indent=1).encode())
    draw(found, about, out / f"{stem}-optimizer_states.png")
    for states, share in within(found).items():
        print(f"{states}: at most {share:.2f} of the spread of seeds away from fp32")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.optimizer_states", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--steps", type=int, default=100, help="of each of the five runs (default: 100)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: bench/results)")
    main(**vars(parser.parse_args()))
