"""Batches of a run, read before they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from train.data.plan import Plan
from train.data.shards import Bucket
from train.engine.parallel import World
from train.objectives import Batch, Objective


class Reader:
    """Reads this process's part of each step, in threads. What a step sees follows from the plan alone, so nothing is
    lost by reading what is not needed in the end.

    Args: parts: into which a step is divided. ahead: parts that are read beyond the step that is asked for.
    """

    def __init__(
        self, plan: Plan, objective: Objective, buckets: dict[str, Bucket], world: World, parts: int, ahead: int
    ) -> None:
        self.plan, self.objective, self.buckets, self.world = plan, objective, buckets, world
        self.count, self.ahead = parts, ahead
        self._queue: deque[Future[Batch]] = deque()
        self._next: int | None = None
        self._pool = ThreadPoolExecutor(max(1, ahead), thread_name_prefix="reader")

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def parts(self, step: int) -> Iterator[Batch]:
        """The batches of a step, on the device. Raises: DataError for a damaged shard."""
        if self._next is None:
            self._next = step
        while len(self._queue) < self.count + self.ahead:
            self._submit(self._next)
            self._next += 1
        for _ in range(self.count):
            yield self._queue.popleft().result().to(self.world.device)

    def _submit(self, step: int) -> None:
        name, rows = self.plan.at(step)
        for part in np.array_split(self.world.mine(rows), self.count):
            self._queue.append(self._pool.submit(self._read, name, part, step))

    def _read(self, name: str, rows: np.ndarray, step: int) -> Batch:
        batch: Batch = self.objective.draw(self.buckets[name], rows, step)
        return batch.pinned() if self.world.device.type == "cuda" else batch
