"""Triton's interpreter, mended: it gets bf16 wrong. Kernels that are interpreted do this by themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rfkernels.triton_support import INTERPRETED


def mend() -> None:
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
