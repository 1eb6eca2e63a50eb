"""The weights with the lowest validation loss so far: what the paper's study compares of each run."""

from __future__ import annotations

import json
from typing import Any

from mmdit.files import naming, read_object, write_atomically
from mmdit.model import MMDiT
from train.config import Config
from train.engine import weights
from train.engine.ema import EmaWeights
from train.engine.parallel import World

AVERAGED, RAW, ABOUT = "best.safetensors", "best-raw.safetensors", "best.json"


class Best:
    """Keeps RUN/best.safetensors, the average, and RUN/best-raw.safetensors; RUN/best.json says of which step."""

    def __init__(
        self, config: Config, world: World, extra: dict[str, Any], step: int, base: dict[str, str]
    ) -> None:
        self.config, self.world, self.extra, self.base = config, world, extra, base
        path = config.run / ABOUT
        found = read_object(path) if path.is_file() else {"step": 0, "loss": float("inf")}
        with naming(path):                            # a run that resumes from before its best step makes it again
            self.lowest = float(found["loss"]) if found["step"] <= step else float("inf")

    def offer(self, step: int, loss: float | None, model: MMDiT, ema: EmaWeights) -> None:
        """On all processes, after a validation of the average (None: there was none)."""
        if not self.config.keep_best or loss is None or not loss < self.lowest:
            return
        self.lowest = loss
        for name, tensors in ((RAW, {}), (AVERAGED, ema.weights)):
            weights.save(self.config.run / name, model, tensors, self.config, self.world, self.extra, self.base)
        if self.world.main:
            write_atomically(self.config.run / ABOUT, json.dumps({"step": step, "loss": loss}).encode())
