"""Argument checks shared by all ops: every message names the argument, what came and what is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def is_tensor(op: str, **tensors: object) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} is {type(value).__name__}; expected a torch.Tensor")


def is_float(op: str, **tensors: Tensor) -> None:
    is_tensor(op, **tensors)
    for name, value in tensors.items():
        if value.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} has dtype {value.dtype}; expected float32, bfloat16, float16 or float64")


def has_rank(op: str, rank: int, layout: str, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        if value.ndim != rank:
            raise ValueError(f"{op}: {name} has shape {list(value.shape)}; expected {layout}")


_copies: list[str] | None = None


@contextmanager
def told_copies() -> Iterator[list[str]]:
    """Inside, collects a line for every tensor that an op has to copy before it runs."""
    global _copies
    before, _copies = _copies, []
    try:
        yield _copies
    finally:
        _copies = before


def tell(copied: Iterable[str]) -> None:
    """Of tensors that were copied when something was made of them."""
    if _copies is not None:
        _copies.extend(f"{name} was copied: its last dimension had a stride other than 1" for name in copied)


def unit_stride(**tensors: Tensor) -> list[Tensor]:
    """The tensors, copied if the elements of their last dimension do not follow one another, which no kernel reads."""
    if _copies is not None:
        for name, value in tensors.items():
            if value.shape[-1] > 1 and value.stride(-1) != 1:
                _copies.append(f"{name} is copied first: it has stride {value.stride(-1)} in its last dimension, not 1")
    return [t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous() for t in tensors.values()]


def same_shape(op: str, like: str, reference: Tensor, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        if value.shape != reference.shape:
            raise ValueError(
                f"{op}: {name} has shape {list(value.shape)}; expected {list(reference.shape)}, the shape of {like}"
            )


def has_shape(op: str, shape: tuple[int, ...], why: str, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        if tuple(value.shape) != shape:
            raise ValueError(f"{op}: {name} has shape {list(value.shape)}; expected {list(shape)} {why}")


def same_device(op: str, like: str, reference: Tensor, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        if value.device != reference.device:
            raise ValueError(f"{op}: {name} is on {value.device}; expected {reference.device}, the device of {like}")


def same_dtype(op: str, like: str, reference: Tensor, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        if value.dtype != reference.dtype:
            raise TypeError(f"{op}: {name} has dtype {value.dtype}; expected {reference.dtype}, the dtype of {like}")


def fits(x: object, *vectors: object) -> bool:
    """Whether x [B, S, C] and its modulation vectors are what `tokens` and `modulation` return as it is. Asked first
    because it costs a third of them; they are asked when it says no, and name what is wrong."""
    if type(x) is not Tensor or x.ndim != 3 or x.dtype not in FLOATS or x.stride(2) != 1 or not x.shape[2]:
        return False
    shape, device = x.shape, x.device
    per_sample = (shape[0], shape[2])
    for v in vectors:
        if type(v) is not Tensor or v.shape != per_sample or v.dtype not in FLOATS:
            return False
        if v.stride(1) != 1 or v.device != device:
            return False
    return True


def fits_weight(weight: object, dim: int, like: Tensor) -> bool:
    """Whether a norm's weight is [dim] and floating point on like's device. Asked first because it costs less than
    asking one by one."""
    if type(weight) is not Tensor and type(weight) is not torch.nn.Parameter:
        return False
    return weight.shape == (dim,) and weight.dtype in FLOATS and weight.device == like.device


def tokens(op: str, **xs: Tensor) -> list[Tensor]:
    """x [B, S, C], floating point, at least one channel; with channels next to each other."""
    is_float(op, **xs)
    has_rank(op, 3, "[B, S, C]", **xs)
    for name, x in xs.items():
        if x.shape[-1] == 0:
            raise ValueError(f"{op}: {name} has shape {list(x.shape)}; expected at least one channel")
    return unit_stride(**xs)


def canonical(vector: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A modulation vector for x of this shape [B, S, C] as a view: [B, C] per sample, [B, S, C] per token, [C] shared.
    None if it is none. Its rank decides which it is, never its element count."""
    batch, length, channels = shape
    rank, given = vector.ndim, vector.shape                  # one at a time: torch.export keeps each comparison it sees
    if not 1 <= rank <= 3 or given[-1] != channels:
        return None
    if rank == 1:
        return vector
    if rank == 2:
        return vector if given[0] == batch else vector[0] if given[0] == 1 else None
    if given[0] == batch:
        return vector if given[1] == length else vector.squeeze(1) if given[1] == 1 else None
    if given[0] != 1:
        return None
    return vector[0, 0] if given[1] == 1 else vector.expand(batch, -1, -1) if given[1] == length else None


def modulation(op: str, like: str, x: Tensor, **vectors: Tensor | None) -> list[Tensor | None]:
    """Modulation vectors for x [B, S, C] in their canonical shapes, None where none is given."""
    present = {name: v for name, v in vectors.items() if v is not None}
    is_float(op, **present)
    batch, length, channels = x.shape
    found = {}
    for name, vector in present.items():
        made = canonical(vector, x.shape)
        if made is None:
            raise ValueError(
                f"{op}: {name} has shape {list(vector.shape)}; expected {[batch, channels]} or {[batch, 1, channels]} "
                f"(per sample), {[batch, length, channels]} (per token) or {[channels]} to match {like} {list(x.shape)}"
            )
        found[name] = made
    same_device(op, like, x, **found)
    found = dict(zip(found, unit_stride(**found), strict=True))
    return [found.get(name) for name in vectors]


def choice(op: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")


def positive(op: str, **numbers: float) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{op}: {name} is {type(value).__name__}; expected a number")
        if not value > 0:
            raise ValueError(f"{op}: {name} is {value}; expected a number above 0")


def positive_int(op: str, **numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{op}: {name} is {type(value).__name__}; expected an int")
        if value < 1:
            raise ValueError(f"{op}: {name} is {value}; expected at least 1")
