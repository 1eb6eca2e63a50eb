"""What is inspected: every kernel, at the widths of the models, as its launcher launches it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rfkernels.adaln import launch

WIDTHS = (960, 1152, 1536, 1920, 2432, 3072)
BATCH, LENGTH = 32, 256


@dataclass(frozen=True)
class Case:
    """A call of a launcher on "meta" tensors."""

    name: str
    call: Callable[[], object]
    bytes: int
    """The least it must move: each activation once, in bf16."""


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> Iterator[Case]:
    for width in WIDTHS:
        x, v = _tensor(BATCH, LENGTH, width), _tensor(BATCH, width)
        s = _tensor(2, BATCH, LENGTH, dtype=torch.float32)
        calls: dict[str, tuple[int, Callable[[], object]]] = {            # bytes per element, call
            "adaln_fwd": (4, partial(launch.adaln, x, v, v, "layer", 1e-6)),
            "adaln_bwd": (6, partial(launch.adaln_backward, x, x, v, v, s, "layer")),
            "gated_adaln_fwd": (8, partial(launch.gated_adaln, x, x, v, v, v, "layer", 1e-6)),
            "gated_adaln_bwd": (12, partial(launch.gated_adaln_backward, x, x, x, x, v, v, v, s, "layer")),
            "gated_residual_fwd": (6, partial(launch.gated_residual, x, x, v)),
            "gated_residual_bwd": (6, partial(launch.gated_residual_backward, x, x, v)),
        }
        for name, (least, call) in calls.items():
            yield Case(f"{name}/{width}", call, least * x.numel())
