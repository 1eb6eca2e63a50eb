"""The registered operators of rectified flow: schema, fake implementation and autograd of each, stated once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rfkernels.flow import launch, reference
from rfkernels.registration import Operator
from rfkernels.transforms import pullback


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in tensors)


# --- rectified_flow ---------------------------------------------------------------------------------------------------


def _save_flow(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    x0, noise, t = inputs
    ctx.time = ctx.needs_input_grad[2]
    ctx.save_for_backward(*((t, x0, noise) if ctx.time else (t,)))           # only t's gradient asks for the others


def _differentiate_flow(ctx: Any, call: Any, dz: Tensor, dtarget: Tensor) -> tuple[Tensor | None, ...]:
    t, *others = ctx.saved_tensors
    dx0, dnoise, dt = call(dz, dtarget, t, *(others or (None, None)))
    return dx0, dnoise, dt if ctx.time else None


def _flow_backward(
    dz: Tensor, dtarget: Tensor, t: Tensor, x0: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, ...]:
    """The backward by its definition, which asks for the values of x0 and noise for the gradient of t only."""
    a, b = (torch.zeros_like(dz) if x is None else x for x in (x0, noise))
    dx0, dnoise, dt = pullback(reference.rectified_flow, (a, b, t), (dz, dtarget))
    return dx0, dnoise, t.new_empty(0) if x0 is None else dt


rectified_flow = Operator(
    "rectified_flow",
    forward_schema="(Tensor x0, Tensor noise, Tensor t) -> (Tensor, Tensor)",
    backward_schema="(Tensor dz, Tensor dtarget, Tensor t, Tensor? x0, Tensor? noise) -> (Tensor, Tensor, Tensor)",
    forward=launch.rectified_flow,
    backward=launch.rectified_flow_backward,
    fake_forward=lambda x0, noise, t: _contiguous(x0, x0),
    fake_backward=lambda dz, dtarget, t, x0, noise: (
        *_contiguous(dz, dz), t.new_empty(0 if x0 is None else t.shape)
    ),
    save=_save_flow,
    differentiate=_differentiate_flow,
    definition=reference.rectified_flow,
    backward_definition=_flow_backward,
)  # fmt: skip


# --- weighted_mse -----------------------------------------------------------------------------------------------------


def _save_errors(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    prediction, target, weight = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(prediction, target, weight, output[1])


def _differentiate_errors(ctx: Any, call: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    prediction, target, weight, errors = ctx.saved_tensors
    if torch.is_grad_enabled():                                                      # errors has no graph of its own
        errors = (prediction.float() - target.float()).square().flatten(1).sum(1)
    _, wants_target, wants_weight = ctx.needs_input_grad[:3]
    dprediction, dtarget = call(dloss, prediction, target, weight, wants_target)
    dweight = (errors * (dloss / prediction.numel())).to(weight.dtype) if wants_weight else None
    return dprediction, dtarget if wants_target else None, dweight


def _errors_backward(
    dloss: Tensor, prediction: Tensor, target: Tensor, weight: Tensor, wants_target: bool
) -> tuple[Tensor, ...]:
    """The backward by its definition."""
    dprediction, dtarget, _ = pullback(reference.weighted_mse, (prediction, target, weight), (dloss,))
    return dprediction, dtarget if wants_target else target.new_empty(0)


_weighted_mse = Operator(
    "weighted_mse",
    forward_schema="(Tensor prediction, Tensor target, Tensor weight) -> (Tensor, Tensor)",
    backward_schema="(Tensor dloss, Tensor prediction, Tensor target, Tensor weight, bool wants_target)"
    " -> (Tensor, Tensor)",
    forward=launch.weighted_mse,
    backward=launch.weighted_mse_backward,
    fake_forward=lambda prediction, *_: tuple(
        prediction.new_empty(shape, dtype=torch.float32) for shape in ((), prediction.shape[:1])
    ),
    fake_backward=lambda dloss, prediction, target, weight, wants: (
        *_contiguous(prediction), target.new_empty(target.shape if wants else 0)
    ),
    save=_save_errors,
    differentiate=_differentiate_errors,
    definition=lambda *args: (reference.weighted_mse(*args),),
    backward_definition=_errors_backward,
)  # fmt: skip


def weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    loss: Tensor = _weighted_mse(prediction, target, weight)[0]
    return loss
