"""The MLP of a block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rfkernels
from rfkernels import checks
from rfkernels.layers import Device


class Mlp(nn.Module):
    """``fc2(gelu(fc1(x)))`` with the tanh form; keeps its pre-activation only, see `rfkernels.gelu_mlp`.

    Args:
        dim, hidden, out: channels; hidden is 4 dim and out is dim unless given.

    >>> Mlp(64)(torch.randn(2, 16, 64)).shape
    torch.Size([2, 16, 64])
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        out: int | None = None,
        *,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden, out = hidden or 4 * dim, out or dim
        checks.positive_int(type(self).__name__, dim=dim, hidden=hidden, out=out)
        self.fc1 = nn.Linear(dim, hidden, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return rfkernels.gelu_mlp(x, self.fc1, self.fc2)
