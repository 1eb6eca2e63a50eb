"""Public functions position_grid and patch_embed: checks and dispatch."""

from __future__ import annotations

from torch import Tensor

from rfkernels import checks, dispatch
from rfkernels.position import reference


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
    """
    grid = {"resolution": resolution, "max_height": max_height, "max_width": max_width, "base": base, "unit": unit}
    return dispatch.run("position_grid", *_check_grid(height, width, dim, **grid))


def patch_embed(
    latent: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, *, patch_size: int = 2
) -> Tensor:
    """Patchify, project, add positions.

    Args:
        latent: [B, C, H, W], H and W multiples of patch_size.
        weight: [dim, C, patch_size, patch_size], a convolution's layout; latent's dtype. bias: [dim] or None.
        positions: [h*w, dim] with h = H/patch_size, any float dtype; added in fp32.
    Returns: tokens [B, h*w, dim], row by row, in latent's dtype (autocast's under autocast).
    Raises: ValueError or TypeError that names the argument.
    Source: Esser et al. 2024, section 4.
    """
    return dispatch.run("patch_embed", *_check_patch(latent, weight, bias, positions, patch_size=patch_size))


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


def _check_patch(latent, weight, bias, positions, *, patch_size=2):
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
    checks.has_shape(op, (count, dim), "one row per token", positions=positions)
    checks.same_device(op, "latent", latent, weight=weight, positions=positions)
    return latent, weight, bias, positions, patch_size


dispatch.register(
    "position_grid", _check_grid, dispatch.Implementation("reference", "fp64 on the CPU", reference.position_grid)
)
dispatch.register(
    "patch_embed",
    _check_patch,
    dispatch.Implementation("reference", "reshape, matrix product, addition", reference.patch_embed),
)
