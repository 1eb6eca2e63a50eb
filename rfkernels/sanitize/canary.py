"""Memory that nobody wrote: torch.empty and its relatives are filled with a NaN that no computation gives."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rfkernels.sanitize.arguments import untouched
from rfkernels.sanitize.findings import watch

WORD = 0x7FFB                # a NaN as bf16, as fp16 and, repeated, as fp32 and fp64
UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
CANARY: dict[int, Any] = {
    2: np.uint16(WORD), 4: np.uint32(WORD * 0x0001_0001), 8: np.uint64(WORD * 0x0001_0001_0001_0001)
}  # fmt: skip
SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}
ALLOCATORS = ((torch, ("empty", "empty_like", "empty_strided")), (Tensor, ("new_empty", "new_empty_strided")))
SPARSE_FROM = 1 << 20        # bytes of a torch.empty in sparse mode
SITES = 100_000              # allocations whose place is remembered

_original_empty = torch.empty


def install() -> None:
    from torch.utils._device import _device_constructors

    _device_constructors()                       # remembers torch's own functions, by identity, for `with torch.device`
    for owner, names in ALLOCATORS:
        for name in names:
            setattr(owner, name, _allocator(name, getattr(owner, name)))


def poison(tensor: Tensor) -> Tensor:
    """Marks the elements of a view as memory that nobody may read, padding for one. Returns the view."""
    size = tensor.element_size()
    bits = int(CANARY[size].astype(UNSIGNED[size]).view(f"i{size}"))
    with torch.no_grad():
        tensor.detach().view(SIGNED[size]).fill_(bits)
    return tensor


def is_canary(values: np.ndarray) -> np.ndarray | None:
    """Where an array of any dtype holds it; None for bytes, which are too short to tell."""
    size = values.dtype.itemsize
    return np.ascontiguousarray(values).view(UNSIGNED[size]) == CANARY[size] if size in CANARY else None


def unwritten(tensor: Tensor) -> Tensor | None:
    """Which elements nobody wrote; None if there are none."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != "cpu" or not tensor.numel():
        return None
    if tensor.layout is not torch.strided or tensor.element_size() not in CANARY or tensor.is_complex():
        return None
    dense, size = tensor.detach().contiguous(), tensor.element_size()
    found = _bytes(dense.data_ptr(), dense.numel() * size).view(UNSIGNED[size]) == CANARY[size]
    return torch.from_numpy(found).view(tensor.shape) if found.any() else None


def check_results(name: str, results: Any) -> None:
    """Reports elements of what an op returned, tensors in lists and tuples, that nobody wrote."""
    if isinstance(results, (list, tuple)):
        for i, result in enumerate(results):
            check_results(f"{name}[{i}]", result)
    elif isinstance(results, Tensor) and (where := unwritten(results)) is not None:
        start, count = results.untyped_storage().data_ptr(), int(where.sum())
        site = watch.sites.get(start, "an unknown place")
        shape, dtype = list(results.shape), str(results.dtype).removeprefix("torch.")
        detail = f"{count} of {results.numel()} elements were never written; {shape} {dtype}, allocated at {site}"
        writer, kernel, argument = watch.writers.get(start), name, ""
        if writer is not None:
            places = torch.arange(results.untyped_storage().nbytes() // results.element_size())
            element = int(places.as_strided(results.shape, results.stride(), results.storage_offset())[where].min())
            kernel, argument = writer.kernel, writer.argument
            detail = f"{name}: {detail}; {writer.before(element * results.element_size())}"
        watch.report("unwritten-output", kernel, "", argument, detail)


def sparse(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros of any size: pages come into being when they are touched."""
    count = int(np.prod([int(n) for n in shape], dtype=object))
    if not count:
        return _original_empty(shape, dtype=dtype)
    return torch.frombuffer(untouched(count * dtype.itemsize), dtype=dtype, count=count).view(shape)


def _bytes(address: int, count: int) -> np.ndarray:
    """Memory as an array."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address))


def _fill(tensor: Tensor) -> None:
    """Over the whole storage, without an operator that a dispatch mode could see."""
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if size:
        view = _bytes(storage.data_ptr(), size)
        even = size // 2 * 2
        view[:even].view(np.uint16)[:] = WORD
        view[even:] = WORD & 0xFF


def _site() -> str:
    frame: Any = sys._getframe(2)
    while frame.f_code.co_filename == __file__:
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno}"


def _allocator(name: str, original: Any) -> Any:
    def allocate(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        made = _sparse_like(name, args, kwargs) if watch.settings.sparse else None
        if made is None:
            made = original(*args, **kwargs)
            plain = type(made) is Tensor and made.device.type == "cpu" and made.layout is torch.strided
            mine = made.dtype is not torch.bool and kwargs.get("out") is None
            traced = torch._C._functorch.peek_interpreter_stack() is not None
            if not (watch.settings.unwritten and plain and mine) or traced:
                return made
            _fill(made)
        if len(watch.sites) > SITES:
            watch.sites.clear()
        watch.sites[made.untyped_storage().data_ptr()] = _site()
        return made

    allocate.marks_unwritten = True                                                                 # type: ignore[attr-defined]
    return allocate


def _sparse_like(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What sparse mode makes of an allocation; None if it is small, or strided."""
    if name in ("empty", "new_empty"):
        given = args if name == "empty" else args[1:]
        shape = kwargs.get("size", given[0] if len(given) == 1 and not isinstance(given[0], int) else given)
        dtype = kwargs.get("dtype") or (torch.get_default_dtype() if name == "empty" else args[0].dtype)
    elif name == "empty_like":
        shape, dtype = args[0].shape, kwargs.get("dtype") or args[0].dtype
    else:
        return None
    count = int(np.prod([int(n) for n in shape], dtype=object))
    return None if count * dtype.itemsize < SPARSE_FROM else sparse(tuple(shape), dtype)
