"""Times of several ways to compute the same thing, interleaved, so that a clock that drifts drifts for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[int], object]
"""Runs once; the number says which copy of its inputs to use."""

BATCH_SECONDS = {"cuda": 2e-3, "cpu": 5e-2}      # long enough for a timer, short enough to interleave
WARMUPS = 3


@dataclass
class Samples:
    seconds: list[float]
    """Of one call, one per round."""
    graph: bool
    """Whether a CUDA graph was replayed, which leaves the host out."""
    peak_bytes: int
    """Most device memory in use during a call, above what was in use before; 0 on a CPU."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: Samples) -> float:
        """Time over other's: the median of the rounds' ratios, so that a drift between rounds does not count."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median


def copies_beyond_cache(device: torch.device, input_bytes: int) -> int:
    """How many copies of the inputs to rotate, so that none is still in the L2 cache when its turn comes again."""
    if device.type != "cuda" or not input_bytes:
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(16, 1 + -(-2 * cache // input_bytes))


class _Timed:
    """One contender: warmed up, captured in a CUDA graph where that is possible, run in batches of `number` calls."""

    def __init__(self, call: Call, device: torch.device, number: int | None = None) -> None:
        self.call, self.device, self.graph = call, device, None
        self.results: list[object] = []
        for i in range(WARMUPS):
            call(i)
        self.peak = self._peak()
        once = self._wall(1)
        self.number = number or max(1, min(200, round(BATCH_SECONDS[device.type] / max(once, 1e-7))))
        if device.type == "cuda" and once * self.number < 0.05:
            self._capture()

    def _peak(self) -> int:
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.call(0)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _capture(self) -> None:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for i in range(WARMUPS):
                    self.call(i)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                self.results = [self.call(i) for i in range(self.number)]
            self.graph = graph
        except RuntimeError:                              # something synchronised: timed as it is, and said so
            torch.cuda.set_stream(before)
            torch.cuda.synchronize()

    def _run(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            for i in range(self.number):
                self.call(i)

    def _wall(self, number: int) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(number):
            self.call(i)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / number

    def sample(self) -> float:
        """Seconds of one call."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            self._run()
            return (time.perf_counter() - start) / self.number
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.number


def interleaved(calls: dict[str, Call], device: torch.device, rounds: int = 15) -> dict[str, Samples]:
    """Samples of every contender: each round times all of them, in an order that rotates.

    Args:
        calls: by name. device: where they run. rounds: samples of each.
    """
    timed = {name: _Timed(call, device) for name, call in calls.items()}
    if any(t.graph is None for t in timed.values()):
        for t in timed.values():                          # with the host for one, with the host for all
            t.graph, t.results = None, []                 # the outputs' memory with it
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            seconds[name].append(timed[name].sample())
    return {name: Samples(seconds[name], t.graph is not None, t.peak) for name, t in timed.items()}
