"""What tests of fused ops need: an error rule against fp64, outputs that betray what was not written, and a count of
the bytes that interpreted kernels move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


def assert_within_rule(name: str, got: Tensor, exact: Tensor, eager: Tensor, factor: float = 2.0) -> None:
    """The error against fp64 is at most `factor` times that of same-dtype eager PyTorch, plus one ulp.

    Args: got, eager: the same dtype and shape; exact: fp64. Errors are compared by their largest element, the ulp is
        that of the largest element of exact.
    """
    assert got.dtype == eager.dtype and got.shape == exact.shape, f"{name}: {got.dtype} {got.shape}"
    assert got.isfinite().all(), f"{name}: {(~got.isfinite()).sum()} of {got.numel()} elements are not finite"
    if not got.numel():
        return
    error, allowed = (got.double() - exact).abs().max(), (eager.double() - exact).abs().max()
    ulp = torch.finfo(got.dtype).eps * exact.abs().max()
    assert error <= factor * allowed + ulp, f"{name}: error {error:.3e}; eager's is {allowed:.3e}, an ulp {ulp:.3e}"


@contextmanager
def nan_filled() -> Iterator[None]:
    """torch.empty and torch.empty_like give NaN inside, so that an element no kernel wrote is seen. The sanitizer marks
    what nobody wrote in a way of its own, and is left alone."""
    if getattr(torch.empty, "marks_unwritten", False):
        yield
        return
    originals = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def filled(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.dtype.is_floating_point else tensor

        return allocate

    for name, original in originals.items():
        setattr(torch, name, filled(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


# --- Triton's interpreter ---------------------------------------------------------------------------------------------

ADDRESS = np.uint64((1 << 50) - 1)           # the bits of an address; the sanitizer uses those above


@dataclass
class Traffic:
    """Elements that interpreted kernels loaded and stored, by address."""

    loads: list[np.ndarray] = field(default_factory=list)
    stores: list[np.ndarray] = field(default_factory=list)

    @staticmethod
    def _within(accesses: list[np.ndarray], tensor: Tensor) -> int:
        start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        real = [a & ADDRESS for a in accesses]
        return sum(int(((a >= start) & (a < start + size)).sum()) for a in real)

    def loaded(self, tensor: Tensor) -> int:
        """How many elements of a contiguous tensor were read, repetitions counted."""
        return self._within(self.loads, tensor)

    def stored(self, tensor: Tensor) -> int:
        return self._within(self.stores, tensor)


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Counts what interpreted kernels move inside."""
    from triton.runtime.interpreter import InterpreterBuilder

    counted = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        counted.loads.append(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)])
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counted.stores.append(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)])
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load = counting_load
    InterpreterBuilder.create_masked_store = counting_store
    try:
        yield counted
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
