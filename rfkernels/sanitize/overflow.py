"""Integers of at most 32 bits whose result does not fit: computed again in 64 bits, marked lane by lane, and followed
through what is computed from them to an address, a mask, a loop bound or a branch."""

from __future__ import annotations

from typing import Any

import numpy as np

from rfkernels.sanitize.findings import watch

ARITHMETIC = {"create_add": np.add, "create_sub": np.subtract, "create_mul": np.multiply, "create_shl": np.left_shift}
MOVES = {f"create_{op}" for op in ("reshape", "trans", "expand_dims", "broadcast", "splat", "unsplat", "cat", "join",
                                   "split")}  # fmt: skip
"""Operations that change a tensor's shape alone: the marks move with it."""


def taint_of(handle: Any) -> Any:
    """Which lanes are marked, or None."""
    return getattr(handle, "taint", None)


def mark(handle: Any, taint: np.ndarray, origin: str) -> None:
    """Marks lanes of a value. origin: what overflowed, and where."""
    handle.taint, handle.origin = taint, origin
    watch.launch.tainted = True


def watched(name: str, function: Any) -> Any:
    """A method of the interpreter's builder that also follows the marks."""
    arithmetic = name in ARITHMETIC or name == "create_int_cast"

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = function(self, *args, **kwargs)
        if watch.launch is None or not watch.settings.overflow:
            return out
        if arithmetic:
            _check(name, args, out)
        if watch.launch.tainted:
            _propagate(name, function, self, args, kwargs, out)
        return out

    method.__name__ = name
    return method


def control(name: str, original: Any) -> Any:
    """`__index__` or `__bool__` of an interpreted tensor: a loop bound or a branch."""

    def asked(self: Any) -> Any:
        taint = taint_of(self.handle)
        if taint is not None and watch.launch is not None and np.asarray(taint).any():
            what = "branch" if name == "__bool__" else "loop bound"
            told = f"has a {what} of an integer that overflowed: {self.handle.origin}"
            watch.launch.report("overflow-control", None, told)
        return original(self)

    return asked


def _integer(dtype: Any) -> bool:
    scalar = dtype.scalar
    return not scalar.is_ptr() and scalar.is_int() and scalar.primitive_bitwidth > 1


def _check(name: str, args: tuple[Any, ...], out: Any) -> None:
    from triton.runtime.interpreter import TensorHandle

    if not args or not isinstance(args[0], TensorHandle) or not isinstance(out, TensorHandle):
        return
    launch, left = watch.launch, args[0]
    if name == "create_int_cast":
        narrows = left.data.dtype.itemsize > out.data.dtype.itemsize
        if not (_integer(left.dtype) and _integer(out.dtype) and narrows):
            return
        wrong = out.data.astype(np.int64) != left.data.astype(np.int64)
        if wrong.any():
            told = f"cast to {out.dtype} of {int(left.data[wrong].flat[0])} at {launch._where()}"
            mark(out, np.asarray(wrong), told)
        return
    if not _integer(left.dtype) or left.dtype.scalar.primitive_bitwidth > 32:
        return
    watch.statistics.integers[launch.name] += int(out.data.size)
    exact = ARITHMETIC[name](left.data.astype(np.int64), args[1].data.astype(np.int64))
    wrong = exact != out.data
    if wrong.any():
        operation = name.removeprefix("create_")
        told = f"{operation} gives {int(exact[wrong].flat[0])} in {left.dtype} at {launch._where()}"
        mark(out, np.asarray(wrong), told)


def _propagate(name: str, function: Any, builder: Any, args: Any, kwargs: Any, out: Any) -> None:
    from triton.runtime.interpreter import TensorHandle

    tainted = [a for a in args if isinstance(a, TensorHandle) and taint_of(a) is not None]
    if not tainted:
        return
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, TensorHandle)]
    if name in MOVES:
        moved = function(builder, *map(_as_bits, args), **kwargs)
        found = [np.asarray(m.data, bool) for m in (moved if isinstance(moved, tuple) else (moved,))]
    elif name == "create_select" and taint_of(args[0]) is None:
        sides = [np.False_ if taint_of(a) is None else taint_of(a) for a in args[1:3]]
        shape, picked = outs[0].data.shape, np.asarray(args[0].data, bool)
        found = [np.where(picked, *(np.broadcast_to(side, shape) for side in sides))]
    else:
        found = [_together(tainted, o.data.shape) for o in outs]
    for o, bits in zip(outs, found, strict=True):
        before = taint_of(o)
        bits = bits if before is None else bits | before
        if bits.any():
            mark(o, bits, tainted[0].origin)


def _together(tainted: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Lanes with a marked operand; all of them where shapes differ: a product, or another change of shape."""
    bits = np.zeros(shape, bool)
    try:
        for a in tainted:
            bits = bits | np.broadcast_to(a.taint, shape)
    except ValueError:
        return np.ones(shape, bool)
    return bits


def _as_bits(value: Any) -> Any:
    """A value's marks in its place."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if not isinstance(value, TensorHandle):
        return value
    bits = taint_of(value)
    shape = np.shape(value.data)
    return TensorHandle(np.array(np.zeros(shape, bool) if bits is None else np.broadcast_to(bits, shape)), tl.int1)
