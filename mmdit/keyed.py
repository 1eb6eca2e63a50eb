"""Randomness as a function of its key: (seed, purpose, up to three integers) always gives the same numbers.

Counter-based (Philox), so there is no state to save, and neither the batch, the number of processes nor the point of
resume changes what a sample sees.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MASK = (1 << 64) - 1


def generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """A NumPy generator for this key. `purpose` keeps uses apart: "noise", "time", ...

    Args: seed: an integer of 64 bits, with or without sign: -1 and 2^64 - 1 are the same.
    Raises: TypeError for a seed that is no integer, ValueError for one of more bits.
    """
    if len(key) > 3:
        raise ValueError(f"keyed.generator: {len(key)} integers in key; expected at most 3")
    number, purpose_digest = checked(seed), digest(purpose)
    small = 0 <= number < 1 << 53
    return philox(rounded(number, purpose_digest) if small else (number & MASK, purpose_digest), *key)


def checked(seed: object) -> int:
    """A seed as an int. Raises: TypeError, ValueError."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed is {seed!r}; expected an integer")
    number = operator.index(seed)                                       # NumPy's and PyTorch's integers too
    if not -(1 << 63) <= number <= MASK:
        raise ValueError(f"seed is {number}; expected an integer of 64 bits, -2^63 to 2^64 - 1")
    return number


@lru_cache(maxsize=4096)
def digest(purpose: str) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def rounded(one: int, other: int) -> tuple[int, int]:
    """Two integers of 64 bits as NumPy reads a list of them: as floats, of 53 bits, where one is below 2^63 and one is
    not. The first version gave it lists: what it drew from seeds below 2^53, and for words, is drawn still."""
    if (one < 1 << 63) == (other < 1 << 63):
        return one, other
    return min(int(float(one)), MASK), min(int(float(other)), MASK)


def philox(pair: tuple[int, int], *key: int) -> np.random.Generator:
    """A generator of 128 bits of key, at the counter that up to three more integers give."""
    counter = [0, *(k & MASK for k in key), *[0] * (3 - len(key))]      # the lowest word counts the blocks drawn
    key_words, counter_words = (np.array(words, dtype=np.uint64) for words in (pair, counter))
    return np.random.Generator(np.random.Philox(key=key_words, counter=counter_words))


def normals(shape: Sequence[int], seed: int, purpose: str, keys: Iterable[tuple[int, ...]]) -> Tensor:
    """[len(keys), *shape] standard normal fp32, row i drawn for keys[i]."""
    drawn = [generator(seed, purpose, *key).standard_normal(tuple(shape), dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(drawn))


def uniforms(count: int, seed: int, purpose: str, keys: Iterable[tuple[int, ...]]) -> Tensor:
    """[len(keys), count] fp64 in (0, 1), row i drawn for keys[i]."""
    drawn = np.stack([generator(seed, purpose, *key).random(count) for key in keys])
    return torch.from_numpy(np.maximum(drawn, 2.0**-54))                # random() may return 0, never 1
