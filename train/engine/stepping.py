"""Optimizer steps that never wait for the device: loss, gradient norm, clipping and the decision whether a step may be
taken stay there until somebody wants to read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train.engine.parallel import World
from train.objectives import Metrics


@dataclass(frozen=True)
class Taken:
    """A step as the host knows it."""

    step: int
    """Counted from 0."""
    rate: float
    """Share of the peak learning rates."""
    fraction: float
    """Of the budget, after it."""


class Stepper:
    """Takes the steps of a run, and keeps what they came to.

    Args:
        optimizer: a fused one: it divides gradients by `grad_scale` and leaves everything alone where `found_inf` is 1,
            both tensors, in the pass that it makes anyway.
        clip: largest norm of the gradient, over all parameters and processes; 0: any.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, clip: float, world: World) -> None:
        self._model, self._optimizer, self._clip, self._world = model, optimizer, clip, world
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self._taken: list[tuple[Taken, tuple[str, ...], Tensor]] = []

    def __call__(self, taken: Taken, loss: Tensor, metrics: Metrics | None = None) -> None:
        """A step with the gradients that are there, or none if the loss or their norm is not finite.

        Args: loss, metrics: this process's part of them, scalars; they are added up over the processes."""
        loss, *values = self._world.added(torch.stack([loss, *(metrics or {}).values()]).double()).unbind()
        norm = gradient_norm(self._model)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * taken.rate
        found_inf = (~(loss.isfinite() & norm.isfinite())).float()
        self._optimizer.grad_scale = (norm / self._clip).clamp(min=1) if self._clip else None        # type: ignore[attr-defined]
        self._optimizer.found_inf = found_inf                                                       # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._taken.append((taken, tuple(metrics or {}), torch.stack([loss, norm.double(), *values])))

    def read(self) -> Iterator[tuple[Taken, float, float, dict[str, float]]]:
        """(step, loss, gradient norm, metrics) of the steps since the last reading. Waits for the device, once."""
        if not self._taken:
            return
        steps, names, values = zip(*self._taken, strict=True)
        self._taken.clear()
        for taken, named, (loss, norm, *others) in zip(steps, names, torch.stack(values).tolist(), strict=True):
            yield taken, loss, norm, dict(zip(named, others, strict=True))


def gradient_norm(model: nn.Module) -> Tensor:
    """Of all gradients, over all processes; scalar fp32."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if any(g.dtype != torch.float32 for g in gradients):                  # of 16 bits the norm would have 16 bits too
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
        norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        return torch.linalg.vector_norm(torch.stack(norms))
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
