"""Exponential moving average of the weights, in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from train.engine.parallel import trained


class EmaWeights:
    """Starts as a copy of the parameters that are trained; `update` moves it towards them."""

    def __init__(self, model: nn.Module, decay: float, every: int) -> None:
        self.decay, self.every = decay, every
        self.weights = {k: v.detach().float().clone() for k, v in trained(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Call after every step; acts on multiples of `every`."""
        if step % self.every == 0:
            for name, parameter in trained(model).items():
                self.weights[name].lerp_(parameter.float(), 1 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with the average in place of its weights. A copy of the weights is kept meanwhile: as much
        as the gradients, which are not there then."""
        parameters = trained(model)
        kept: dict[str, Tensor] = {k: v.detach().clone() for k, v in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.weights[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(kept[name])
