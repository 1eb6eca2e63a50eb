"""A kernel's tensor arguments: which memory is theirs, and who touched it in a launch."""

from __future__ import annotations

import mmap
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

TAG = np.uint64(50)          # an address's bits from here on say which argument it was made from, plus one
HALF = np.uint64(1 << 49)    # so that an address a little below an argument's start rounds to the argument's tag
BITMAP_ELEMENTS = 1 << 27    # of a storage: beyond, strided views that overlap themselves are not told apart
SPARSE_BYTES = 1 << 28       # arrays from here on are made of untouched pages


def untouched(nbytes: int) -> mmap.mmap:
    """Memory that costs nothing until it is touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return mmap.mmap(-1, max(1, nbytes), flags=flags)


def zeros(count: int) -> np.ndarray:
    """int32."""
    if 4 * count < SPARSE_BYTES:
        return np.zeros(count, np.int32)
    return np.frombuffer(untouched(4 * count), np.int32, count)


class View:
    """Which elements of a storage belong to a strided view."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, count: int) -> None:
        self._offset, self._empty = offset, 0 in shape
        pairs = ((s, n) for n, s in zip(shape, strides, strict=True) if n > 1 and s != 0)
        self._dims = sorted(pairs, reverse=True)
        self._last = offset + sum(s * (n - 1) for s, n in self._dims)
        inner, nested, distinct = 0, True, 1
        for s, n in reversed(self._dims):
            nested &= s > inner
            inner += s * (n - 1)
            distinct *= n
        self._nested, self._dense = nested, nested and distinct == inner + 1
        self._bitmap = None
        if not self._dense and not self._empty and count <= BITMAP_ELEMENTS:
            self._bitmap = _bitmap(shape, strides, offset, count)

    def has(self, element: np.ndarray) -> np.ndarray:
        """Of elements inside the storage."""
        if self._empty:
            return np.zeros(element.shape, bool)
        if self._bitmap is not None:
            return self._bitmap[element]
        inside = (element >= self._offset) & (element <= self._last)
        if self._dense or not self._nested:
            return inside
        rest = element - self._offset
        for s, n in self._dims:
            rest = rest - np.minimum(rest // s, n - 1) * s
        return inside & (rest == 0)


@lru_cache(maxsize=256)
def _bitmap(shape: tuple[int, ...], strides: tuple[int, ...], offset: int, count: int) -> np.ndarray:
    bits = torch.zeros(count, dtype=torch.bool)
    bits.as_strided(shape, strides, offset).fill_(True)
    return bits.numpy()


class Shadow:
    """Who touched the elements of one storage in one launch: programs counted from 1, -1 for several, 0 for none."""

    def __init__(self, granule: int, nbytes: int) -> None:
        self.granule, self._count = granule, -(-nbytes // granule)
        self.written = zeros(self._count)
        self._more: dict[str, np.ndarray] = {}

    def has(self, name: str) -> bool:
        return name in self._more

    def of(self, name: str) -> np.ndarray:
        """"read", "atomic" or "scratch": made when asked for."""
        if name not in self._more:
            self._more[name] = zeros(self._count)
        return self._more[name]


class Argument:
    """A tensor argument of one launch."""

    def __init__(self, name: str, tensor: Tensor, index: int) -> None:
        self.name, self.index = name, index
        storage = tensor.untyped_storage()
        self.pointer, self.start, self.nbytes = tensor.data_ptr(), storage.data_ptr(), storage.nbytes()
        self.itemsize, self.offset = tensor.element_size(), int(tensor.storage_offset())
        self._tensor = tensor

    @property
    def tagged(self) -> int:
        return ((self.index + 1) << int(TAG)) + self.pointer

    @cached_property
    def view(self) -> View:
        shape, strides = tuple(self._tensor.shape), tuple(self._tensor.stride())
        return View(shape, strides, self.offset, self.nbytes // self.itemsize)

    def __str__(self) -> str:
        t = self._tensor
        return f"{self.name} {list(t.shape)}, strides {list(t.stride())}, {str(t.dtype).removeprefix('torch.')}"
