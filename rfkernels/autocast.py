"""What autocast asks of an op that PyTorch does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype of autocast on a device type where it is on, else None. Of other devices PyTorch would have to be asked
    whether they know autocast, by a function that Dynamo of torch 2.11 cannot trace."""
    return torch.get_autocast_dtype(kind) if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) else None


def to_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype of the first one's autocast, where it is on: what nn.Linear would compute in."""
    dtype = autocast_dtype(next(t for t in tensors if t is not None).device.type)
    if dtype is None:
        return tensors
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
