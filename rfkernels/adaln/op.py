"""Public functions of the adaLN family: checks and dispatch. The operators behind them: operators.py."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rfkernels import checks, dispatch, native
from rfkernels.adaln import operators, reference
from rfkernels.autocast import autocast_dtype
from rfkernels.triton_support import INTERPRETED, interpreted, refuses_triton

Norm = Literal["layer", "rms"]
NORMS = ("layer", "rms")


def adaln(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Norm = "layer",
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Adaptive layer norm: ``(norm(x) * weight + bias) * (1 + scale) + shift``; what is None is left out.

    Args:
        x: [B, S, C]; bf16, fp16, fp32 or fp64. Read with its strides if channels are next to each other, else copied.
        shift, scale: a modulation vector, any of those dtypes: per sample [B, C] or [B, 1, C], per token [B, S, C] or
            [1, S, C], or shared [C], [1, C], [1, 1, C].
        weight, bias: of the norm, in the shapes of a modulation vector. `weight` multiplies as it is: for a model whose
            scale has its one inside, pass it as weight (`scale=gamma - 1` loses gamma's digits in 16 bits).
        norm: "layer" (LayerNorm) or "rms" (RMSNorm).
        eps: added to the variance (or mean square) before the root. The default is that of diffusion transformers:
            nn.LayerNorm's is 1e-5, nn.RMSNorm's 1.2e-7 (fp32's machine epsilon).
        dtype: of the result. None: what the next product wants, autocast's dtype where it is on, else x's.
    Returns: [B, S, C]; statistics and arithmetic in fp32, one rounding. Gradients have their input's dtype.
    Raises: ValueError or TypeError if shapes, dtypes or devices do not fit; the message names the argument.
    Source: Peebles & Xie 2023, section 3.2; Esser et al. 2024, figure 2b.

    >>> x, shift, scale = torch.randn(2, 16, 64), torch.zeros(2, 64), torch.zeros(2, 64)
    >>> adaln(x, shift, scale).shape
    torch.Size([2, 16, 64])
    """
    if weight is bias is None and (y := native.direct("adaln", x, shift, scale, True, norm, eps, dtype)) is not None:
        return y
    checked = _check_adaln(x, shift, scale, weight=weight, bias=bias, norm=norm, eps=eps, dtype=dtype)
    return dispatch.run("adaln", *checked)


def gated_residual(residual: Tensor, branch: Tensor, gate: Tensor | None = None) -> Tensor:
    """``residual + gate * branch``.

    Args:
        residual, branch: [B, S, C]; any float dtypes. gate: a modulation vector, see `adaln`, or None for 1.
    Returns: [B, S, C] in the dtype that eager PyTorch would give (fp32 for an fp32 residual and a bf16 branch); one
        rounding, from fp32.
    Raises: ValueError or TypeError if shapes, dtypes or devices do not fit; the message names the argument.

    >>> x, branch, gate = torch.randn(2, 16, 64), torch.randn(2, 16, 64), torch.zeros(2, 64)
    >>> torch.equal(gated_residual(x, branch, gate), x)
    True
    """
    h: Tensor | None = native.direct("gated_residual", residual, branch, gate)
    return dispatch.run("gated_residual", *_check_gated_residual(residual, branch, gate)) if h is None else h


def gated_adaln(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Norm = "layer",
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The end of one branch and the start of the next: ``h = residual + gate * branch; y = adaln(h, shift, scale)``.

    Args: as of `gated_residual` and `adaln`. dtype: of y.
    Returns: (h, y), both [B, S, C]: h in the dtype that eager PyTorch would give, y in `dtype`. y is the norm of h as
        stored, after rounding.
    Raises: ValueError or TypeError if shapes, dtypes or devices do not fit; the message names the argument.

    >>> x, branch = torch.randn(2, 16, 64), torch.randn(2, 16, 64)
    >>> gate, shift, scale = torch.randn(3, 2, 64)
    >>> residual, normed = gated_adaln(x, branch, gate, shift, scale)
    >>> normed.shape
    torch.Size([2, 16, 64])
    """
    plain = (residual, branch, gate, shift, scale, True, norm, eps, dtype)
    if weight is bias is None and (made := native.direct("gated_adaln", *plain)) is not None:
        return made
    checked = _check_gated_adaln(
        residual, branch, gate, shift, scale, weight=weight, bias=bias, norm=norm, eps=eps, dtype=dtype
    )
    return dispatch.run("gated_adaln", *checked)


def _check_adaln(x, shift=None, scale=None, *, weight=None, bias=None, norm="layer", eps=1e-6, dtype=None):
    op, plus_one = "adaln", True
    plain = weight is bias is None and checks.fits(x, shift, scale)
    if not (plain and norm in NORMS and type(eps) is float and eps > 0):
        (x,) = checks.tokens(op, x=x)
        vectors = checks.modulation(op, "x", x, shift=shift, scale=scale, weight=weight, bias=bias)
        shift, scale, plus_one = _composed(x, *vectors)
        checks.choice(op, "norm", norm, NORMS)
        checks.positive(op, eps=eps)
    return x, shift, scale, plus_one, norm, eps, _dtype(op, dtype, x.dtype, x)


def _check_gated_residual(residual, branch, gate=None, *, op="gated_residual"):
    residual, branch = checks.tokens(op, residual=residual, branch=branch)
    checks.same_shape(op, "residual", residual, branch=branch)
    checks.same_device(op, "residual", residual, branch=branch)
    (gate,) = checks.modulation(op, "residual", residual, gate=gate)
    return residual, branch, gate


def _check_gated_adaln(
    residual, branch, gate, shift=None, scale=None, *, weight=None, bias=None, norm="layer", eps=1e-6, dtype=None
):
    op = "gated_adaln"
    residual, branch, gate = _check_gated_residual(residual, branch, gate, op=op)
    vectors = {"shift": shift, "scale": scale, "weight": weight, "bias": bias}
    shift, scale, plus_one = _composed(residual, *checks.modulation(op, "residual", residual, **vectors))
    checks.choice(op, "norm", norm, NORMS)
    checks.positive(op, eps=eps)
    h_dtype = reference.promoted(residual, branch, gate)
    return residual, branch, gate, shift, scale, plus_one, norm, eps, _dtype(op, dtype, h_dtype, residual)


def _composed(x, shift, scale, weight, bias):
    """(shift, scale, plus_one) with the norm's weight and bias in them: (n weight + bias) (1 + scale) + shift is
    n (weight (1 + scale)) + (bias (1 + scale) + shift). Of vectors per sample or shared that is little work."""
    if weight is None and bias is None:
        return shift, scale, True
    if scale is None and (shift is None or bias is None):
        return shift if bias is None else bias, weight, weight is None
    vectors = (shift, scale, weight, bias)
    wide = reference.accumulation(reference.promoted(x, *vectors))
    shift, scale, weight, bias = (v if v is None else reference.per_token(v, wide) for v in vectors)
    factor = None if scale is None else 1 + scale
    if bias is not None:
        lifted = bias if factor is None else bias * factor
        shift = lifted if shift is None else lifted + shift
    if weight is not None:
        factor = weight if factor is None else weight * factor
    return *(v if v is None else checks.canonical(v, x.shape) for v in (shift, factor)), factor is None


def _dtype(op, asked, otherwise, x):
    if asked is None:
        autocast = autocast_dtype(x.device.type)
        return otherwise if autocast is None or otherwise == torch.float64 else autocast
    checks.choice(op, "dtype", asked, checks.FLOATS)
    return asked


MAX_CHANNELS = 16384            # beyond, a row no longer fits in the registers of a program


def _refuses(x, *args):
    if x.shape[-1] > MAX_CHANNELS:
        return f"the kernels hold a row in registers, up to {MAX_CHANNELS} channels, not {x.shape[-1]}"
    if args[-1] is torch.float64:
        return "Triton kernels write fp32, bf16 and fp16, not torch.float64"
    return refuses_triton(x, *args)


def _triton(what, run):
    return dispatch.Implementation("triton", what, run, _refuses, interpreted if INTERPRETED else None)


def _refuses_native(x, *args):
    if args[-1] is torch.float64:                    # of gated_residual it is a tensor, which Dynamo does not compare
        return "the native kernels write fp32, bf16 and fp16, not torch.float64"
    return native.refuses(x, *args)


def _native(run):
    return dispatch.Implementation("native", "one pass forward, one backward", run, _refuses_native)


def _reference(run):
    return dispatch.Implementation("reference", "plain PyTorch, op by op", run)


dispatch.register(
    "adaln",
    _check_adaln,
    _triton("one kernel forward, two backward", operators.triton_adaln),
    _native(operators.native_adaln),
    dispatch.Implementation(
        "library", "PyTorch's layer norm, one saved activation, explicit backward", operators.library_adaln
    ),
    _reference(reference.adaln),
)
dispatch.register(
    "gated_residual",
    _check_gated_residual,
    _triton("one kernel forward, two backward", operators.triton_gated_residual),
    _native(operators.native_gated_residual),
    _reference(reference.gated_residual),
)
dispatch.register(
    "gated_adaln",
    _check_gated_adaln,
    _triton("one kernel forward, two backward", operators.triton_gated_adaln),
    _native(operators.native_gated_adaln),
    dispatch.Implementation(
        "library", "gated residual in plain PyTorch, then adaln's library", operators.library_gated_adaln
    ),
    _reference(reference.gated_adaln),
)
