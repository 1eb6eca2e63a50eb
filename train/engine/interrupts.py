"""Signals that ask for an end: remembered, so that what is being done can be finished and kept."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupts:
    """Remembers SIGINT, SIGTERM and SIGUSR1 while inside, so that what is being done can be finished. A second
    SIGINT ends the process at once.

    Args: promise: what is said when one comes.
    """

    def __init__(self, promise: str) -> None:
        self.promise = promise
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        print(f"\n{self.received.name}: {self.promise}", flush=True)

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)   # type: ignore[arg-type]
