"""Steps whose loss or gradient is not finite."""

from __future__ import annotations

import json
import math

import numpy as np

from mmdit.files import write_atomically
from train.config import Config
from train.engine.checkpoint import Progress
from train.engine.parallel import World


class Nonfinite:
    """Counts steps whose loss or gradient is not finite, which changed nothing; after too many in a row the run
    stops, and what they were made of is on disk."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.last: list[dict] = []

    def check(
        self, progress: Progress, step: int, loss: float, norm: float, batch: tuple[str, np.ndarray]
    ) -> None:
        """Of each step in order. Raises: ValueError when the limit is passed."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.last.clear()
            return
        progress.skipped += 1
        found = {"step": step, "loss": str(loss), "gradient_norm": str(norm)}
        self.last.append({**found, "bucket": batch[0], "rows": batch[1].tolist()})
        if len(self.last) > self.config.skip_nonfinite:
            path = self.config.run / "nonfinite.json"
            if self.world.main:
                write_atomically(path, json.dumps(self.last, indent=1).encode())
            raise ValueError(
                f"step {step}: loss {loss}, gradient norm {norm}, the last of {len(self.last)} in a row; "
                f"their samples are in {path}, the last good state in {self.config.run / 'checkpoints'}"
            )
