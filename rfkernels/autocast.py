"""What autocast asks of an op that PyTorch does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype of the first one's autocast, where it is on: what nn.Linear would compute in."""
    kind = next(t for t in tensors if t is not None).device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
