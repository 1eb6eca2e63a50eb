"""The registered operators of the adaLN family: schema, fake implementation and autograd of each, stated once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rfkernels import bias, native
from rfkernels.adaln import launch, library, reference
from rfkernels.registration import Operator
from rfkernels.transforms import pullback


def _like(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Contiguous ones, [0] of what is not given."""
    some = next(t for t in tensors if t is not None)
    return tuple(
        some.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors
    )


def _statistics(x: Tensor) -> Tensor:
    return x.new_empty((2, *x.shape[:2]), dtype=reference.accumulation(x.dtype))


def _given(inputs: Sequence[Tensor | None], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if t is None else g for t, g in zip(inputs, gradients, strict=True)]


def _all(like: Tensor, gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """What a backward returns of gradients some of which are None."""
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


# --- adaln ------------------------------------------------------------------------------------------------------------


def _save_adaln(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, shift, scale, *ctx.settings, _ = inputs
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, shift, scale, statistics)


def _differentiate_adaln(ctx: Any, call: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    saved = ctx.saved_tensors
    return *_given(saved[:3], call(dy, *saved, *ctx.settings)), None, None, None, None


def _adaln_backward(
    dy: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor | None, statistics: Tensor, plus_one: bool, norm: str,
    eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The backward by its definition."""
    return _all(x, pullback(reference.adaln, (x, shift, scale, plus_one, norm, eps, dy.dtype), (dy,))[:3])


def _adaln_operator(name: str, forward: Any, backward: Any, direct_backward: Any = None) -> Operator:
    return Operator(
        name,
        forward_schema="(Tensor x, Tensor? shift, Tensor? scale, bool plus_one, str norm, float eps, ScalarType dtype)"
        " -> (Tensor, Tensor)",
        backward_schema="(Tensor dy, Tensor x, Tensor? shift, Tensor? scale, Tensor statistics, bool plus_one,"
        " str norm, float eps) -> (Tensor, Tensor, Tensor)",
        forward=forward,
        backward=backward,
        fake_forward=lambda x, *settings: (x.new_empty(x.shape, dtype=settings[-1]), _statistics(x)),
        fake_backward=lambda dy, x, shift, scale, *_: _like(x, shift, scale),
        save=_save_adaln,
        differentiate=_differentiate_adaln,
        direct_backward=direct_backward,
        definition=lambda *args: (reference.adaln(*args),),
        backward_definition=_adaln_backward,
    )


_library = _adaln_operator("adaln_library", library.adaln, library.adaln_backward)
_native = _adaln_operator("adaln_native", None, None)
_triton = _adaln_operator(
    "adaln", launch.adaln, launch.adaln_backward, partial(launch.adaln_backward, in_chunks=True)
)


def library_adaln(*args: Any) -> Tensor:
    return _library(*args)[0]


def native_adaln(*args: Any) -> Tensor:
    made: Tensor | None = native.direct("adaln", *args)
    return _native(*args)[0] if made is None else made


def triton_adaln(*args: Any) -> Tensor:
    return _triton(*args)[0]


# --- gated_adaln ------------------------------------------------------------------------------------------------------


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    residual, branch, gate, shift, scale, *ctx.settings, ctx.y_dtype = inputs
    ctx.dtype, ctx.bias = residual.dtype, bias.wanted(branch)
    h, _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, branch, gate, shift, scale, statistics)


def _differentiate_gated(
    ctx: Any, call: Any, dh: Tensor | None, dy: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    if dh is None and dy is None:
        return (None,) * 9
    saved = ctx.saved_tensors                   # once: activation checkpointing computes them again, and then lets go
    h = saved[0]
    dh = torch.zeros_like(h) if dh is None else dh
    dy = torch.zeros_like(h, dtype=ctx.y_dtype) if dy is None else dy
    sums = ctx.bias and not torch.is_grad_enabled()
    *gradients, dbias = call(dh, dy, *saved, *ctx.settings, ctx.dtype, sums)
    if sums:
        bias.give(gradients[1], dbias)
    return *_given(saved[:5], gradients), None, None, None, None


def _gated_backward(
    dh: Tensor, dy: Tensor, h: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    statistics: Tensor, plus_one: bool, norm: str, eps: float, dtype: torch.dtype, bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The backward by its definition, of h: that of the norm, then that of the residual, which is linear in it."""
    dx, dshift, dscale, *_ = pullback(reference.adaln, (h, shift, scale, plus_one, norm, eps, dy.dtype), (dy,))
    residual = torch.zeros_like(h, dtype=dtype)
    gradients = pullback(reference.gated_residual, (residual, branch, gate), (dh + dx,))
    return _all(h, (*gradients, dshift, dscale, None))


def _gated_operator(name: str, forward: Any, backward: Any, direct_backward: Any = None) -> Operator:
    return Operator(
        name,
        forward_schema="(Tensor residual, Tensor branch, Tensor? gate, Tensor? shift, Tensor? scale, bool plus_one,"
        " str norm, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
        backward_schema="(Tensor dh, Tensor dy, Tensor h, Tensor branch, Tensor? gate, Tensor? shift, Tensor? scale,"
        " Tensor statistics, bool plus_one, str norm, float eps, ScalarType dtype, bool bias)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        forward=forward,
        backward=backward,
        fake_forward=lambda residual, branch, gate, *settings: (
            residual.new_empty(residual.shape, dtype=reference.promoted(residual, branch, gate)),
            residual.new_empty(residual.shape, dtype=settings[-1]),
            _statistics(residual),
        ),
        fake_backward=lambda dh, dy, h, branch, gate, shift, scale, statistics, plus_one, norm, eps, dtype, bias: (
            h.new_empty(h.shape, dtype=dtype),
            *_like(branch, gate, shift, scale),
            branch.new_empty(branch.shape[2] if bias else 0),
        ),
        save=_save_gated,
        differentiate=_differentiate_gated,
        direct_backward=direct_backward,
        definition=reference.gated_adaln,
        backward_definition=_gated_backward,
    )


_native_gated = _gated_operator("gated_adaln_native", None, None)
_triton_gated = _gated_operator(
    "gated_adaln", launch.gated_adaln, launch.gated_adaln_backward, partial(launch.gated_adaln_backward, in_chunks=True)
)


def native_gated_adaln(*args: Any) -> tuple[Tensor, Tensor]:
    made: tuple[Tensor, Tensor] | None = native.direct("gated_adaln", *args)
    return _native_gated(*args)[:2] if made is None else made


def triton_gated_adaln(*args: Any) -> tuple[Tensor, Tensor]:
    return _triton_gated(*args)[:2]


def library_gated_adaln(
    residual: Tensor, branch: Tensor, gate: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    h = reference.gated_residual(residual, branch, gate)
    return h, library_adaln(h, *rest)


# --- gated_residual ---------------------------------------------------------------------------------------------------


def _save_residual(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    residual, branch, gate = inputs
    ctx.dtype, ctx.branch_dtype = residual.dtype, branch.dtype
    ctx.save_for_backward(None if gate is None else branch, gate)


def _differentiate_residual(ctx: Any, call: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    branch, gate = ctx.saved_tensors
    dresidual = dh.to(ctx.dtype)                                      # dh itself, most often: no copy
    return (dresidual, dh.to(ctx.branch_dtype), None) if gate is None else (dresidual, *call(dh, branch, gate))


def _residual_operator(name: str, forward: Any, backward: Any, direct_backward: Any = None) -> Operator:
    return Operator(
        name,
        forward_schema="(Tensor residual, Tensor branch, Tensor? gate) -> Tensor",
        backward_schema="(Tensor dh, Tensor branch, Tensor gate) -> (Tensor, Tensor)",
        forward=forward,
        backward=backward,
        fake_forward=lambda residual, branch, gate: residual.new_empty(
            residual.shape, dtype=reference.promoted(residual, branch, gate)
        ),
        fake_backward=lambda dh, branch, gate: _like(branch, gate),
        save=_save_residual,
        differentiate=_differentiate_residual,
        direct_backward=direct_backward,
        definition=reference.gated_residual,
        backward_definition=lambda dh, branch, gate: pullback(reference.gated_residual, (dh, branch, gate), (dh,))[1:],
    )


_native_residual = _residual_operator("gated_residual_native", None, None)
_triton_residual = _residual_operator(
    "gated_residual", launch.gated_residual, launch.gated_residual_backward,
    partial(launch.gated_residual_backward, in_chunks=True),
)  # fmt: skip


def native_gated_residual(residual: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    made: Tensor | None = native.direct("gated_residual", residual, branch, gate)
    return _native_residual(residual, branch, gate) if made is None else made


def triton_gated_residual(residual: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return _triton_residual(residual, branch, gate)
