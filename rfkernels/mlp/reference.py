"""The two-layer perceptron of a transformer block in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gelu_mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)
