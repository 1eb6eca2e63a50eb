"""Public functions of the adaLN family: checks and dispatch. The operators behind them: operators.py."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from rfkernels import checks, dispatch
from rfkernels.adaln import operators, reference
from rfkernels.triton_support import INTERPRETED, interpreted, refuses_triton

Norm = Literal["layer", "rms"]
NORMS = ("layer", "rms")


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
    if not (checks.fits(x, shift, scale) and norm in NORMS and type(eps) is float and eps > 0):
        checks.tokens("adaln", x=x)
        checks.modulation("adaln", "x", x, shift=shift, scale=scale)
        checks.choice("adaln", "norm", norm, NORMS)
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
    checks.choice("gated_adaln", "norm", norm, NORMS)
    checks.positive("gated_adaln", eps=eps)
    return residual, branch, gate, shift, scale, norm, eps


MAX_CHANNELS = 16384            # beyond, a row no longer fits in the registers of a program


def _refuses(x, *args):
    if x.shape[-1] > MAX_CHANNELS:
        return f"the kernels hold a row in registers, up to {MAX_CHANNELS} channels, not {x.shape[-1]}"
    return refuses_triton(x, *args)


def _triton(what, run):
    return dispatch.Implementation("triton", what, run, _refuses, interpreted if INTERPRETED else None)


def _reference(run):
    return dispatch.Implementation("reference", "plain PyTorch, op by op", run)


dispatch.register(
    "adaln",
    _check_adaln,
    _triton("one kernel forward, two backward", operators.triton_adaln),
    dispatch.Implementation(
        "library", "PyTorch's layer norm, one saved activation, explicit backward", operators.library_adaln
    ),
    _reference(reference.adaln),
)
dispatch.register(
    "gated_residual",
    _check_gated_residual,
    _triton("one kernel forward, two backward", operators.triton_gated_residual),
    _reference(reference.gated_residual),
)
dispatch.register(
    "gated_adaln",
    _check_gated_adaln,
    _triton("one kernel forward, two backward", operators.triton_gated_adaln),
    dispatch.Implementation(
        "library", "gated residual in plain PyTorch, then adaln's library", operators.library_gated_adaln
    ),
    _reference(reference.gated_adaln),
)
