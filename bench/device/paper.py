"""The paper's training step: python -m bench.device.paper

The 2B model (d = 24), 256 x 256 pixels, 32 pictures, bf16 over fp32 weights, AdamW, EMA: a real run of `train` on
random latents and text. Latents are pixels themselves, of 192 channels, since no autoencoder is here: 0.2 % more FLOPs
than with 16. The run is killed when its speed was read twice, before it writes a checkpoint.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

from bench.device.runner import VERDICT
from bench.environment import pretending
from bench.reading import random_cache
from mmdit import presets
from train.config import Config, Ema, Samples, Validation
from train.engine.loop import train

WORK = Path(os.environ.get("WORK", "."))
READINGS = 2                 # of the speed, each over 20 steps
FACTOR = 8                   # pixels of a latent pixel
CHANNELS = 3 * FACTOR**2


def config() -> Config:
    model = presets.by_depth(2 if pretending() else 24, in_channels=CHANNELS)
    return Config(
        run=WORK / "runs" / "paper", cache=WORK / "paper" / "cache", model=model, steps=10_000, log_every=20,
        batch=2 if pretending() else 32, ema=Ema(every=100), checkpoint_every=10_000,
        validation=Validation(every=0), samples=Samples(every=0), precision="bf16",
    )  # fmt: skip


def speeds(run: Path) -> list[dict[str, float]]:
    path = run / "speed.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def main() -> int:
    made = config()
    latent = CHANNELS, 256 // FACTOR, 256 // FACTOR
    random_cache(made.cache, 8 if pretending() else 256, 64, latent, FACTOR)
    process = multiprocessing.get_context("spawn").Process(target=train, args=(made,))
    process.start()
    while process.is_alive() and len(speeds(made.run)) < READINGS:
        time.sleep(0.1)
    process.kill()
    process.join()
    for read in (found := speeds(made.run)):
        seconds = made.batch / read["speed/images_per_second"]
        print(f"{VERDICT}a step of {made.batch} pictures: {1e3 * seconds:.1f} ms, " + json.dumps(read), flush=True)
    return int(len(found) < READINGS)


if __name__ == "__main__":
    raise SystemExit(main())
