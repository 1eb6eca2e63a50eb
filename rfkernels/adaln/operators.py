"""The registered operators of the adaLN family: schema, fake implementation and autograd of each, stated once."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rfkernels import bias
from rfkernels.adaln import launch, library, reference
from rfkernels.registration import Operator


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def _statistics(x: Tensor) -> Tensor:
    return x.new_empty((2, *x.shape[:2]), dtype=reference.accumulation(x))


# --- adaln ------------------------------------------------------------------------------------------------------------


def _save_adaln(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, shift, scale, ctx.norm, _ = inputs
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, shift, scale, statistics)


def _differentiate_adaln(ctx: Any, call: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    return *call(dy, *ctx.saved_tensors, ctx.norm), None, None


def _adaln_operator(name: str, forward: Any, backward: Any, direct_backward: Any = None) -> Operator:
    return Operator(
        name,
        forward_schema="(Tensor x, Tensor shift, Tensor scale, str norm, float eps) -> (Tensor, Tensor)",
        backward_schema="(Tensor dy, Tensor x, Tensor shift, Tensor scale, Tensor statistics, str norm)"
        " -> (Tensor, Tensor, Tensor)",
        forward=forward,
        backward=backward,
        fake_forward=lambda x, shift, scale, norm, eps: (*_like(x), _statistics(x)),
        fake_backward=lambda dy, x, shift, scale, statistics, norm: _like(x, shift, scale),
        save=_save_adaln,
        differentiate=_differentiate_adaln,
        direct_backward=direct_backward,
    )


_library = _adaln_operator("adaln_library", library.adaln, library.adaln_backward)
_triton = _adaln_operator(
    "adaln", launch.adaln, launch.adaln_backward, partial(launch.adaln_backward, in_chunks=True)
)


def library_adaln(x: Tensor, shift: Tensor, scale: Tensor, norm: str, eps: float) -> Tensor:
    return _library(x, shift, scale, norm, eps)[0]


def triton_adaln(x: Tensor, shift: Tensor, scale: Tensor, norm: str, eps: float) -> Tensor:
    return _triton(x, shift, scale, norm, eps)[0]


# --- gated_adaln ------------------------------------------------------------------------------------------------------


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, gate, shift, scale, ctx.norm, _ = inputs
    ctx.bias = bias.wanted(branch)
    h, _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, branch, gate, shift, scale, statistics)


def _differentiate_gated(
    ctx: Any, call: Any, dh: Tensor | None, dy: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    if dh is None and dy is None:
        return (None,) * 7
    saved = ctx.saved_tensors                   # once: activation checkpointing computes them again, and then lets go
    h = saved[0]
    dh = torch.zeros_like(h) if dh is None else dh
    dy = torch.zeros_like(h) if dy is None else dy
    *gradients, sums = call(dh, dy, *saved, ctx.norm, ctx.bias)
    if ctx.bias:
        bias.give(gradients[1], sums)
    return *gradients, None, None


_triton_gated = Operator(
    "gated_adaln",
    forward_schema="(Tensor residual, Tensor branch, Tensor gate, Tensor shift, Tensor scale, str norm, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    backward_schema="(Tensor dh, Tensor dy, Tensor h, Tensor branch, Tensor gate, Tensor shift, Tensor scale,"
    " Tensor statistics, str norm, bool bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward=launch.gated_adaln,
    backward=launch.gated_adaln_backward,
    fake_forward=lambda residual, branch, *_: (*_like(residual, residual), _statistics(residual)),
    fake_backward=lambda dh, dy, h, branch, gate, shift, scale, statistics, norm, bias: (
        *_like(h, branch, gate, shift, scale), branch.new_empty(branch.shape[2] if bias else 0)
    ),
    save=_save_gated,
    differentiate=_differentiate_gated,
    direct_backward=partial(launch.gated_adaln_backward, in_chunks=True),
)


def triton_gated_adaln(
    residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    return _triton_gated(residual, branch, gate, shift, scale, norm, eps)[:2]


def library_gated_adaln(
    residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    h = reference.gated_residual(residual, branch, gate)
    return h, library_adaln(h, shift, scale, norm, eps)


# --- gated_residual ---------------------------------------------------------------------------------------------------


def _save_residual(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _differentiate_residual(ctx: Any, call: Any, dh: Tensor) -> tuple[Tensor, ...]:
    return dh, *call(dh, *ctx.saved_tensors)                      # dresidual is dh itself: no copy


_triton_residual = Operator(
    "gated_residual",
    forward_schema="(Tensor residual, Tensor branch, Tensor gate) -> Tensor",
    backward_schema="(Tensor dh, Tensor branch, Tensor gate) -> (Tensor, Tensor)",
    forward=launch.gated_residual,
    backward=launch.gated_residual_backward,
    fake_forward=lambda residual, branch, gate: _like(residual)[0],
    fake_backward=lambda dh, branch, gate: _like(branch, gate),
    save=_save_residual,
    differentiate=_differentiate_residual,
    direct_backward=partial(launch.gated_residual_backward, in_chunks=True),
)


def triton_gated_residual(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return _triton_residual(residual, branch, gate)
