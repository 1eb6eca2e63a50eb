"""Public functions position_grid, patch_embed and patch_unembed: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from rfkernels import checks, dispatch, native
from rfkernels.autocast import autocast_dtype, to_autocast
from rfkernels.position import operators, reference
from rfkernels.triton_support import INTERPRETED, interpreted, refuses_triton, too_many_rows


def position_grid(
    height: int,
    width: int,
    dim: int,
    *,
    resolution: int,
    max_height: int,
    max_width: int,
    base: int = 256,
    unit: int = 16,
) -> Tensor:
    """2-D frequency embedding of a centre-cropped position grid, for mixed aspect ratios.

    With s = resolution/unit and h_max = max_height/unit, row p of the full grid stands at
    ``(p - (h_max - s)/2) * base/resolution``, p = 0 .. h_max - 1, columns likewise; the central
    height/unit x width/unit of it is embedded.

    Args:
        height, width: of the image in pixels, multiples of unit.
        dim: channels, a multiple of 4; the first half encodes the column, the second the row (the order of the released
            models), each as sines then cosines of frequencies 10000^(-i/(dim/4)).
        resolution: S, the side of the square target resolution in pixels.
        max_height, max_width: of the largest bucket in pixels, multiples of unit.
        base: resolution in pixels at which neighbours are one apart.
        unit: pixels per token: the autoencoder's factor times the patch size.
    Returns: [h*w, dim] fp32 on the CPU, row by row.
    Raises: ValueError or TypeError that names the argument.
    Source: Esser et al. 2024, section 5.3.2, "Positional Encodings for Varying Aspect Ratios".

    >>> position_grid(256, 384, 64, resolution=256, max_height=512, max_width=512).shape
    torch.Size([384, 64])
    """
    grid = {"resolution": resolution, "max_height": max_height, "max_width": max_width, "base": base, "unit": unit}
    return dispatch.run("position_grid", *_check_grid(height, width, dim, **grid))


def patch_embed(
    latent: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    *,
    patch_size: int = 2,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Patchify, project, add positions.

    Args:
        latent: [B, C, H, W], H and W multiples of patch_size.
        weight: [dim, C, patch_size, patch_size], a convolution's layout; latent's dtype. bias: [dim] or None.
        positions: [h*w, dim] or [1, h*w, dim] with h = H/patch_size, any float dtype; added in fp32.
        dtype: of the tokens. None: latent's; under autocast what the convolution plus the positions gives, so fp32 for
            fp32 positions.
    Returns: tokens [B, h*w, dim], row by row.
    Raises: ValueError or TypeError that names the argument.
    Source: Esser et al. 2024, section 4.

    >>> latent, weight = torch.randn(2, 16, 8, 8), torch.randn(64, 16, 2, 2)
    >>> patch_embed(latent, weight, torch.zeros(64), torch.zeros(16, 64)).shape
    torch.Size([2, 16, 64])
    """
    made: Tensor | None = native.direct("patch_embed", latent, weight, bias, positions, patch_size, dtype)
    if made is not None:
        return made
    checked = _check_patch(latent, weight, bias, positions, patch_size=patch_size, dtype=dtype)
    return dispatch.run("patch_embed", *checked)


def patch_unembed(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, height: int, width: int, patch_size: int = 2
) -> Tensor:
    """The end of a model: project tokens to patches and put them together (unpatchify).

    A patch leaves as (row, column, channel), though `patch_embed` reads it as (channel, row, column): the layout of the
    released weights.

    Args:
        x: [B, h*w, dim] with h = height/patch_size, row by row; copied if channels are not next to each other.
        weight: [patch_size * patch_size * C, dim], the layout of nn.Linear; x's dtype. bias: its rows, or None.
        height, width: of the latent, multiples of patch_size.
    Returns: latent [B, C, height, width] in x's dtype (autocast's under autocast).
    Raises: ValueError or TypeError that names the argument.
    Source: Peebles & Xie 2023, section 3.2.

    >>> tokens, weight = torch.randn(2, 16, 64), torch.randn(2 * 2 * 16, 64)
    >>> patch_unembed(tokens, weight, torch.zeros(64), height=8, width=8).shape
    torch.Size([2, 16, 8, 8])
    """
    latent: Tensor | None = native.direct("patch_unembed", x, weight, bias, height, width, patch_size)
    if latent is not None:
        return latent
    return dispatch.run(
        "patch_unembed", *_check_unembed(x, weight, bias, height=height, width=width, patch_size=patch_size)
    )


def _check_grid(height, width, dim, *, resolution, max_height, max_width, base=256, unit=16):
    op = "position_grid"
    checks.positive_int(
        op,
        height=height,
        width=width,
        dim=dim,
        resolution=resolution,
        max_height=max_height,
        max_width=max_width,
        base=base,
        unit=unit,
    )
    for name, size in (("height", height), ("width", width), ("max_height", max_height), ("max_width", max_width)):
        if size % unit:
            raise ValueError(f"{op}: {name} is {size}; expected a multiple of unit = {unit}")
    for name, size, most in (("height", height, max_height), ("width", width, max_width)):
        if size > most:
            raise ValueError(f"{op}: {name} is {size}; expected at most max_{name} = {most}")
    if dim % 4:
        raise ValueError(f"{op}: dim is {dim}; expected a multiple of 4 (sine and cosine for each of two axes)")
    return height, width, dim, resolution, max_height, max_width, base, unit


def _check_patch(latent, weight, bias, positions, *, patch_size=2, dtype=None):
    op = "patch_embed"
    checks.is_float(op, latent=latent, weight=weight, positions=positions)
    checks.positive_int(op, patch_size=patch_size)
    checks.has_rank(op, 4, "[B, C, H, W]", latent=latent)
    _, channels, height, width = latent.shape
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(
            f"{op}: latent has shape {list(latent.shape)}; expected height and width to be multiples of patch_size = "
            f"{patch_size}"
        )
    checks.has_rank(op, 4, "[dim, C, patch_size, patch_size]", weight=weight)
    dim = weight.shape[0]
    checks.has_shape(op, (dim, channels, patch_size, patch_size), "to match latent and patch_size", weight=weight)
    if bias is not None:
        checks.is_float(op, bias=bias)
        checks.has_shape(op, (dim,), "to match weight", bias=bias)
        checks.same_device(op, "latent", latent, bias=bias)
    count = (height // patch_size) * (width // patch_size)
    if positions.ndim == 3 and positions.shape[0] == 1:
        positions = positions[0]
    checks.has_shape(op, (count, dim), "one row per token", positions=positions)
    checks.same_device(op, "latent", latent, weight=weight, positions=positions)
    latent, weight, bias = to_autocast(latent, weight, bias)
    checks.same_dtype(op, "latent", latent, weight=weight, **({} if bias is None else {"bias": bias}))
    if dtype is None:
        autocast = autocast_dtype(latent.device.type) is not None
        dtype = torch.promote_types(latent.dtype, positions.dtype) if autocast else latent.dtype
    checks.choice(op, "dtype", dtype, checks.FLOATS)
    return latent, weight, bias, positions, patch_size, dtype


def _check_unembed(x, weight, bias, *, height, width, patch_size=2):
    op = "patch_unembed"
    (x,) = checks.tokens(op, x=x)
    checks.is_float(op, weight=weight)
    checks.positive_int(op, height=height, width=width, patch_size=patch_size)
    for name, size in (("height", height), ("width", width)):
        if size % patch_size:
            raise ValueError(f"{op}: {name} is {size}; expected a multiple of patch_size = {patch_size}")
    count = (height // patch_size) * (width // patch_size)
    if x.shape[1] != count:
        raise ValueError(f"{op}: x has {x.shape[1]} tokens; expected {count}, the patches of {height} x {width}")
    checks.has_rank(op, 2, "[patch_size * patch_size * C, dim]", weight=weight)
    if weight.shape[0] % patch_size**2 or weight.shape[1] != x.shape[2]:
        raise ValueError(
            f"{op}: weight has shape {list(weight.shape)}; expected a multiple of {patch_size**2} rows and "
            f"{x.shape[2]} columns, x's channels"
        )
    given = {"weight": weight}
    if bias is not None:
        checks.is_float(op, bias=bias)
        checks.has_shape(op, (weight.shape[0],), "to match weight", bias=bias)
        given["bias"] = bias
    checks.same_device(op, "x", x, **given)
    x, weight, bias = to_autocast(x, weight, bias)
    checks.same_dtype(op, "x", x, weight=weight, **({} if bias is None else {"bias": bias}))
    return x, weight, bias, height, width, patch_size


dispatch.register(
    "position_grid", _check_grid, dispatch.Implementation("reference", "fp64 on the CPU", reference.position_grid)
)


def _refuses_embed(latent, weight, bias, positions, patch_size, dtype):
    if dtype == torch.float64:
        return "Triton kernels write fp32, bf16 and fp16, not torch.float64"
    return refuses_triton(latent, weight, bias) or too_many_rows(latent.shape[0] * positions.shape[0])


def _refuses_unembed(x, weight, bias, height, width, patch_size):
    return refuses_triton(x, weight, bias) or too_many_rows(x.shape[0] * x.shape[1])


def _refuses_native(first, weight, bias, *rest):
    if torch.float64 in rest:
        return "the native kernels write fp32, bf16 and fp16, not torch.float64"
    return native.refuses(first, weight, bias, *rest)


def _triton(what, run, refuses):
    return dispatch.Implementation(
        "triton", f"{what} in one kernel", run, refuses, interpreted if INTERPRETED else None
    )


for _name, _check, _fused, _definition in (
    (
        "patch_embed", _check_patch,       # positions may be fp64: they are read as fp32
        _triton("patchify, product, positions", operators.patch_embed, _refuses_embed), reference.patch_embed,
    ),
    (
        "patch_unembed", _check_unembed,
        _triton("product and unpatchify", operators.patch_unembed, _refuses_unembed), reference.patch_unembed,
    ),
):  # fmt: skip
    dispatch.register(
        _name,
        _check,
        _fused,
        dispatch.Implementation(
            "native", "PyTorch's product, one pass beside it", native.or_else(_name, _definition), _refuses_native
        ),
        dispatch.Implementation("reference", "plain PyTorch, op by op", _definition),
    )
