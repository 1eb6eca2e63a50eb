"""Which samples a step sees: a pure function of (seed, step), so there is no sampler state to save.

Each bucket is an endless sequence of shuffles of its rows; a step takes the next batch of one bucket, so batches run
over the end of an epoch, nothing is dropped and nothing padded. Buckets take turns at random, by size.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from mmdit import keyed


class Plan:
    """
    Args: sizes: samples per bucket, by name. batch: samples per step. seed: the run's.
    """

    def __init__(self, sizes: dict[str, int], batch: int, seed: int) -> None:
        if not sizes or min(sizes.values()) < 1:
            raise ValueError(f"Plan: sizes is {sizes}; expected at least one sample in every bucket")
        self.names, self.batch, self.seed = list(sizes), batch, seed
        self.sizes = np.array(list(sizes.values()))
        self._shuffle = lru_cache(maxsize=4)(self._shuffled)
        self._turns = np.empty(0, dtype=np.int64)

    def _shuffled(self, bucket: int, epoch: int) -> np.ndarray:
        return keyed.generator(self.seed, "shuffle", bucket, epoch).permutation(self.sizes[bucket])

    def _turn(self, step: int) -> tuple[int, int]:
        """The step's bucket, and how many earlier steps took it."""
        while len(self._turns) <= step:                       # blocks of a fixed length, each keyed by its number
            u = keyed.generator(self.seed, "bucket", len(self._turns) // 4096).random(4096)
            drawn = np.searchsorted(np.cumsum(self.sizes) / self.sizes.sum(), u, side="right")
            self._turns = np.concatenate([self._turns, np.minimum(drawn, len(self.sizes) - 1)])
        bucket = int(self._turns[step])
        return bucket, int((self._turns[:step] == bucket).sum())

    def at(self, step: int) -> tuple[str, np.ndarray]:
        """(bucket, rows [batch]) of a step."""
        bucket, before = self._turn(step)
        places = before * self.batch + np.arange(self.batch)
        epochs, rows = np.divmod(places, self.sizes[bucket])
        chosen = [self._shuffle(bucket, int(epoch))[rows[epochs == epoch]] for epoch in np.unique(epochs)]
        return self.names[bucket], np.concatenate(chosen)
