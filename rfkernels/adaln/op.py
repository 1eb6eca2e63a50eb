"""Public functions of the adaLN family: checks, registration, dispatch."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from rfkernels import checks, dispatch, registration
from rfkernels.adaln import library, reference

Norm = Literal["layer", "rms"]


# --- the operator rfkernels::adaln ------------------------------------------------------------------------------------


def _fake(x: Tensor, shift: Tensor, scale: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistic = x.new_empty(x.shape[:2], dtype=reference.accumulation(x))
    return torch.empty_like(x, memory_format=torch.contiguous_format), statistic, torch.empty_like(statistic)


def _fake_backward(
    dy: Tensor, x: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, norm: str
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dshift, dscale = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, shift, scale))
    return dx, dshift, dscale


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, shift, scale, ctx.norm, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, shift, scale, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate(ctx: Any, dy: Tensor, dmean: Tensor, drstd: Tensor) -> tuple[Tensor | None, ...]:
    dx, dshift, dscale = _operator.backward(dy, *ctx.saved_tensors, ctx.norm)
    return dx, dshift, dscale, None, None


_operator = registration.define(
    "adaln",
    forward_schema="(Tensor x, Tensor shift, Tensor scale, str norm, float eps) -> (Tensor, Tensor, Tensor)",
    backward_schema="(Tensor dy, Tensor x, Tensor shift, Tensor scale, Tensor mean, Tensor rstd, str norm)"
    " -> (Tensor, Tensor, Tensor)",
    fake_forward=_fake,
    fake_backward=_fake_backward,
    save=_save,
    differentiate=_differentiate,
)
registration.implement("adaln", "CompositeExplicitAutograd", library.adaln, library.adaln_backward)


# --- public functions -------------------------------------------------------------------------------------------------


def adaln(x: Tensor, shift: Tensor, scale: Tensor, *, norm: Norm = "layer", eps: float = 1e-6) -> Tensor:
    """Adaptive layer norm: ``norm(x) * (1 + scale) + shift``.

    Args:
        x: [B, S, C], any strides with unit-stride channels; bf16, fp16, fp32 or fp64.
        shift, scale: [B, C] per sample, [B, S, C] per token, or [C]; any of those dtypes.
        norm: "layer" (LayerNorm without affine) or "rms" (RMSNorm without weight).
        eps: added to the variance (or mean square) before the root.
    Returns: [B, S, C] in x's dtype; statistics and arithmetic in fp32.
    Raises: ValueError or TypeError if shapes, dtypes or devices do not fit; the message names the argument.
    Source: Peebles & Xie 2023, section 3.2; Esser et al. 2024, figure 2b.
    """
    return dispatch.run("adaln", *_check_adaln(x, shift, scale, norm=norm, eps=eps))


def gated_residual(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """``residual + gate * branch``.

    Args:
        residual, branch: [B, S, C], same dtype. gate: [B, C], [B, S, C] or [C].
    Returns: [B, S, C] in residual's dtype; one rounding, from fp32.
    Raises: ValueError or TypeError if shapes, dtypes or devices do not fit; the message names the argument.
    """
    return dispatch.run("gated_residual", *_check_gated_residual(residual, branch, gate))


def gated_adaln(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    norm: Norm = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The end of one branch and the start of the next: ``h = residual + gate * branch; y = adaln(h, shift, scale)``.

    Args:
        residual, branch: [B, S, C], same dtype. gate, shift, scale: [B, C], [B, S, C] or [C], each on its own.
        norm, eps: as for `adaln`.
    Returns: (h, y), both [B, S, C] in residual's dtype. y is the norm of h as stored, after rounding.
    Raises: ValueError or TypeError if shapes, dtypes or devices do not fit; the message names the argument.
    """
    return dispatch.run("gated_adaln", *_check_gated_adaln(residual, branch, gate, shift, scale, norm=norm, eps=eps))


def _check_adaln(x, shift, scale, *, norm="layer", eps=1e-6):
    checks.tokens("adaln", x=x)
    checks.modulation("adaln", "x", x, shift=shift, scale=scale)
    checks.choice("adaln", "norm", norm, ("layer", "rms"))
    checks.positive("adaln", eps=eps)
    return x, shift, scale, norm, eps


def _check_gated_residual(residual, branch, gate, *, op="gated_residual"):
    checks.tokens(op, residual=residual, branch=branch)
    checks.same_shape(op, "residual", residual, branch=branch)
    checks.same_dtype(op, "residual", residual, branch=branch)
    checks.same_device(op, "residual", residual, branch=branch)
    checks.modulation(op, "residual", residual, gate=gate)
    return residual, branch, gate


def _check_gated_adaln(residual, branch, gate, shift, scale, *, norm="layer", eps=1e-6):
    _check_gated_residual(residual, branch, gate, op="gated_adaln")
    checks.modulation("gated_adaln", "residual", residual, shift=shift, scale=scale)
    checks.choice("gated_adaln", "norm", norm, ("layer", "rms"))
    checks.positive("gated_adaln", eps=eps)
    return residual, branch, gate, shift, scale, norm, eps


def _library_adaln(x: Tensor, shift: Tensor, scale: Tensor, norm: str, eps: float) -> Tensor:
    return _operator.forward(x, shift, scale, norm, eps)[0]


def _library_gated_adaln(residual, branch, gate, shift, scale, norm, eps):
    h = reference.gated_residual(residual, branch, gate)
    return h, _library_adaln(h, shift, scale, norm, eps)


_AS_DEFINED = "plain PyTorch, op by op"
dispatch.register(
    "adaln",
    _check_adaln,
    dispatch.Implementation("library", "PyTorch's layer norm, one saved activation, explicit backward", _library_adaln),
    dispatch.Implementation("reference", _AS_DEFINED, reference.adaln),
)
dispatch.register(
    "gated_residual",
    _check_gated_residual,
    dispatch.Implementation("reference", _AS_DEFINED, reference.gated_residual),
)
dispatch.register(
    "gated_adaln",
    _check_gated_adaln,
    dispatch.Implementation("library", "gated residual in plain PyTorch, then adaln's library", _library_gated_adaln),
    dispatch.Implementation("reference", _AS_DEFINED, reference.gated_adaln),
)
