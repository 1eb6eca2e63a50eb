"""How much of a run is left: steps or minutes, and the bar that shows it."""

from __future__ import annotations

import math
import time

from tqdm import tqdm

from train.config import Config


class Budget:
    """Steps or minutes, whichever the configuration names."""

    def __init__(self, config: Config, seconds: float) -> None:
        self._steps, self._minutes = config.steps, config.minutes
        self._before, self._start = seconds, time.monotonic()

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._start

    def fraction(self, step: int) -> float:
        if self._steps is not None:
            return min(1.0, step / self._steps)
        assert self._minutes is not None
        return min(1.0, self.seconds() / (60 * self._minutes))

    def spent(self, step: int) -> bool:
        return self.fraction(step) >= 1.0


class ProgressBar:
    """A bar over steps or over minutes."""

    def __init__(self, config: Config, step: int, shown: bool) -> None:
        self._bar = tqdm(
            disable=not shown,
            total=config.steps or 100,
            initial=step if config.steps else 0,
            desc=config.run.name,
            mininterval=0.5,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {postfix}",
        )
        self._config, self._step, self._average = config, step, math.nan

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, loss: float, fraction: float) -> None:
        self._step += 1
        self._average = loss if math.isnan(self._average) else 0.98 * self._average + 0.02 * loss
        self._bar.set_postfix_str(f"step {self._step}, loss {self._average:.4f}", refresh=False)
        self._bar.update(1 if self._config.steps else round(100 * fraction) - self._bar.n)
