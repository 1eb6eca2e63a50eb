"""How much of a run is left: steps or minutes, and the bar that shows it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

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
    """How far a run is: a bar in a terminal; in a log a line every now and then, on stderr too.

    Args: step: finished before. shown: False for a process that only computes along. before: share of the budget that
        was spent before.
    """

    LINE_SECONDS = 30.0

    def __init__(
        self, config: Config, step: int, shown: bool, before: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config, self._step, self._average, self._clock = config, step, math.nan, clock
        self._shown, terminal = shown, sys.stderr.isatty()
        self._bar = tqdm(
            disable=not (shown and terminal), total=1.0, desc=config.run.name, mininterval=0.5,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}",
        )  # fmt: skip
        self._lines = shown and not terminal
        self._first = (clock(), step, before)
        self._told = clock()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, loss: float, fraction: float) -> None:
        """After a step. Args: fraction: of the budget that is spent."""
        self._step += 1
        self._average = loss if math.isnan(self._average) else 0.98 * self._average + 0.02 * loss
        if not self._shown:
            return
        state = self.state(fraction)
        self._bar.set_postfix_str(state, refresh=False)
        self._bar.update(fraction - self._bar.n)
        if self._lines and (self._clock() - self._told >= self.LINE_SECONDS or fraction >= 1):
            self._told = self._clock()
            print(f"{self._config.run.name} {fraction:4.0%}  {state}", file=sys.stderr, flush=True)

    def state(self, fraction: float) -> str:
        begun, step, before = self._first
        seconds, made = self._clock() - begun, self._step - step
        speed = self._config.batch * made / max(seconds, 1e-9)
        left = seconds * (1 - fraction) / max(fraction - before, 1e-9)
        return f"step {self._step:,}, loss {self._average:.4f}, {speed:,.0f} pictures/s, {_duration(left)} left"


def _duration(seconds: float) -> str:
    """Like 0:42, 12:05 or 3:07:00."""
    minutes, rest = divmod(round(min(seconds, 1e9)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
