"""How fast a run goes, and whether it still goes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mmdit.config import MMDiTConfig
from mmdit.cost.flops import training_flops
from mmdit.cost.hardware import gpu
from train.engine.parallel import World

EVERY = 20
"""Steps between two readings."""


class Throughput:
    """Images and tokens per second over all processes, share of the time spent waiting for data, model FLOPs over the
    GPUs' peak where their kind is known, and the most memory held."""

    def __init__(self, config: MMDiTConfig, world: World, share: float = 1.0) -> None:
        self.config, self.world, self.share = config, world, share
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        self.known = gpu(name) if name else None
        self._begin()

    def _begin(self) -> None:
        self._start, self._waited = time.perf_counter(), 0.0
        self._steps = self._images = self._tokens = 0
        self._flops = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what reads data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def step(self, images: int, image_tokens: int, text_tokens: int) -> dict[str, float]:
        """After a step of so many images, over all processes, of so many tokens each; readings, every now and then."""
        self._steps += 1
        self._images += images
        self._tokens += images * (image_tokens + text_tokens)
        self._flops += images * self.share * training_flops(self.config, image_tokens, text_tokens).total
        if self._steps < EVERY:
            return {}
        seconds = time.perf_counter() - self._start
        found = {
            "speed/images_per_second": self._images / seconds,
            "speed/tokens_per_second": self._tokens / seconds,
            "speed/data_share": self._waited / seconds,
        }
        if self.known is not None:
            found["speed/MFU"] = self._flops / seconds / (self.known.flops * self.world.size)
        if self.world.device.type == "cuda":
            found["memory/peak_bytes"] = torch.cuda.max_memory_allocated(self.world.device)
        self._begin()
        return found


class Watchdog:
    """Says which process a run waits for. Each process leaves the step that it has finished in a file; one that sees no
    progress for `seconds` tells its own step and those of the others, once for each standstill.

    Args: folder: of the files, shared by all processes.
    """

    def __init__(self, folder: Path, world: World, seconds: float) -> None:
        self.folder, self.world, self.seconds = folder, world, seconds
        self._beaten, self._written, self._told = time.monotonic(), 0.0, False
        self._step = -1
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watchdog:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def beat(self, step: int) -> None:
        """A step is finished."""
        self._step, self._beaten, self._told = step, time.monotonic(), False
        if self._beaten - self._written > min(5.0, self.seconds / 4):
            self._written = self._beaten
            self._file(self.world.rank).write_text(str(step))

    def _file(self, rank: int) -> Path:
        return self.folder / f"process-{rank:05d}"

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.seconds / 4)):
            if not self._told and time.monotonic() - self._beaten > self.seconds:
                self._told = True
                print(self.told(), file=sys.stderr, flush=True)

    def told(self) -> str:
        """What is known of all processes."""
        self._file(self.world.rank).write_text(str(self._step))
        steps = {}
        for rank in range(self.world.size):
            path = self._file(rank)
            steps[rank] = int(path.read_text() or -1) if path.is_file() else -1       # empty: just being written
        behind = [str(rank) for rank, step in steps.items() if step == min(steps.values())]
        listed = ", ".join(f"{rank}: {step}" for rank, step in steps.items())
        return (
            f"process {self.world.rank} has seen no progress for {self.seconds:.0f} s. Last finished step by process: "
            f"{listed}. Furthest behind: {', '.join(behind)}"
        )
