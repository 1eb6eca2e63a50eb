"""Randomness as a function of its key: (seed, purpose, up to three integers) always gives the same numbers.

Counter-based (Philox), so there is no state to save, and neither the batch, the number of processes nor the point of
resume changes what a sample sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """A NumPy generator for this key. `purpose` keeps uses apart: "noise", "time", ..."""
    if len(key) > 3:
        raise ValueError(f"keyed.generator: {len(key)} integers in key; expected at most 3")
    digest = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    mask = (1 << 64) - 1
    counter = [0, *(k & mask for k in key), *[0] * (3 - len(key))]      # the lowest word counts the blocks drawn
    return np.random.Generator(np.random.Philox(key=[seed & mask, digest], counter=counter))


def normals(shape: Sequence[int], seed: int, purpose: str, keys: Iterable[tuple[int, ...]]) -> Tensor:
    """[len(keys), *shape] standard normal fp32, row i drawn for keys[i]."""
    drawn = [generator(seed, purpose, *key).standard_normal(tuple(shape), dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(drawn))


def uniforms(count: int, seed: int, purpose: str, keys: Iterable[tuple[int, ...]]) -> Tensor:
    """[len(keys), count] fp64 in (0, 1), row i drawn for keys[i]."""
    drawn = np.stack([generator(seed, purpose, *key).random(count) for key in keys])
    return torch.from_numpy(np.maximum(drawn, 2.0**-54))                # random() may return 0, never 1
