"""What tests of fused ops need: an error rule against fp64, outputs that betray what was not written, and a Triton
interpreter that rounds bf16 as a GPU does and counts the bytes a kernel moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rfkernels.triton_support import INTERPRETED


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


def mend_interpreter() -> None:
    """Makes Triton's interpreter round fp32 to bf16 to nearest even, as the hardware does (it truncates), multiply
    matrices of bf16 (it multiplies their bit patterns), lets Triton 3.6 loop over `range(runtime value)` with NumPy >=
    2.4, and halves its time. Does nothing unless kernels are interpreted; idempotent."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter, "_rfkernels_mended", False):
        return
    interpreter._rfkernels_mended = True
    convert, patch = interpreter._convert_float, interpreter._patch_lang_tensor

    def rounding(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        tensor = torch.from_numpy(np.array(data, dtype=np.float32))
        return tensor.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(np.shape(data))

    def indexable(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        index = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])  # noqa: E731
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = np.ascontiguousarray(handle.data).astype(np.uint32) << np.uint32(16)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def widened_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    interpreter._convert_float, interpreter._patch_lang_tensor = rounding, indexable
    interpreter.InterpreterBuilder.create_dot = widened_dot
    _patch_language_once_a_launch(interpreter)


def _patch_language_once_a_launch(interpreter: Any) -> None:
    """The interpreter patches triton.language again at every call of a function inside a kernel, tl.sum included."""
    import triton.language as tl

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    launching: list[set[frozenset[int]]] = []
    modules_of: dict[Any, frozenset[int]] = {}

    class Nothing:
        def restore(self) -> None:
            pass

    def patch_once(fn: Any) -> Any:
        if fn not in modules_of:
            modules_of[fn] = frozenset(id(v) for v in fn.__globals__.values() if v is tl or v is tl.core)
        if launching and modules_of[fn] in launching[-1]:
            return Nothing()
        if launching:
            launching[-1].add(modules_of[fn])
        return patch(fn)

    def launch_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        launching.append(set())
        try:
            return launch(self, *args, **kwargs)
        finally:
            launching.pop()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_once


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
