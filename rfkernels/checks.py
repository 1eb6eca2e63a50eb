"""Argument checks shared by all ops: every message names the argument, what came and what is wanted."""

from __future__ import annotations

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


def unit_stride(op: str, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        if value.shape[-1] > 1 and value.stride(-1) != 1:
            raise ValueError(
                f"{op}: {name} has stride {value.stride(-1)} in its last dimension; expected 1 (call .contiguous())"
            )


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
    """Whether x [B, S, C] and its modulation vectors pass `tokens` and `modulation`. Asked first because it costs a
    third of them; they are asked when it says no, and name what is wrong."""
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


def tokens(op: str, **xs: Tensor) -> None:
    """x [B, S, C], floating point, at least one channel, channels contiguous."""
    is_float(op, **xs)
    has_rank(op, 3, "[B, S, C]", **xs)
    for name, x in xs.items():
        if x.shape[-1] == 0:
            raise ValueError(f"{op}: {name} has shape {list(x.shape)}; expected at least one channel")
    unit_stride(op, **xs)


def modulation(op: str, like: str, x: Tensor, **vectors: Tensor) -> None:
    """A modulation vector is [B, C], [B, S, C] or [C]; its rank decides which, never its element count."""
    is_float(op, **vectors)
    batch, length, channels = x.shape
    wanted = {1: (channels,), 2: (batch, channels), 3: (batch, length, channels)}
    for name, vector in vectors.items():
        if tuple(vector.shape) != wanted.get(vector.ndim):
            raise ValueError(
                f"{op}: {name} has shape {list(vector.shape)}; expected {list(wanted[2])} (per sample), "
                f"{list(wanted[3])} (per token) or {list(wanted[1])} to match {like} {list(x.shape)}"
            )
    unit_stride(op, **vectors)
    same_device(op, like, x, **vectors)


def choice(op: str, name: str, value: object, allowed: tuple[str, ...]) -> None:
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
