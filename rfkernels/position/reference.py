"""Position grids and patch embedding in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos(positions: Tensor, dim: int) -> Tensor:
    """positions [N] -> [N, dim]: sines, then cosines, of frequencies 10000^(-2i/dim). fp64."""
    frequencies = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device=positions.device) / (dim / 2))
    angles = positions.double().unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def position_grid(
    height: int, width: int, dim: int, resolution: int, max_height: int, max_width: int, base: int, unit: int
) -> Tensor:
    def axis(size: int, most: int) -> Tensor:
        tokens, grid = size // unit, most // unit
        p = torch.arange(grid, dtype=torch.float64)
        positions = (p - (grid - resolution / unit) / 2) * (base / resolution)
        first = (grid - tokens) // 2                                       # centre crop
        return sincos(positions[first : first + tokens], dim // 2)

    rows, columns = axis(height, max_height), axis(width, max_width)      # [h, dim/2], [w, dim/2]
    h, w = len(rows), len(columns)
    grid = torch.cat([columns.expand(h, w, -1), rows.unsqueeze(1).expand(h, w, -1)], -1)
    return grid.reshape(h * w, dim).float()


def patch_embed(
    latent: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, patch_size: int, dtype: torch.dtype
) -> Tensor:
    batch, channels, height, width = latent.shape
    h, w = height // patch_size, width // patch_size
    patches = latent.reshape(batch, channels, h, patch_size, w, patch_size).permute(0, 2, 4, 1, 3, 5)
    tokens = torch.nn.functional.linear(patches.reshape(batch, h * w, -1), weight.flatten(1), bias)
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return (tokens.to(wide) + positions.to(wide)).to(dtype)


def patch_unembed(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, patch_size: int
) -> Tensor:
    p = patch_size
    patches = torch.nn.functional.linear(x, weight, bias).reshape(x.shape[0], height // p, width // p, p, p, -1)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, height, width)
