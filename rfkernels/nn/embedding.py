"""From latents to tokens and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import rfkernels
from rfkernels import checks
from rfkernels.autocast import autocast_dtype
from rfkernels.layers import Device, plain


class PatchEmbed(nn.Module):
    """Patchify, project, add the centre crop of a position table; see `rfkernels.patch_embed` and `position_grid`.

    The table is data, not a formula: a persistent buffer `pos_embed` [1, rows * columns, dim], filled by the paper's
    formula, or loaded with the weights. It stays fp32 whatever the module is cast to. `proj` holds the weights in a
    convolution's layout.

    Args:
        in_channels, dim: of the latent and of the tokens.
        resolution, max_height, max_width, base: in pixels, as for `position_grid`.
        unit: pixels per token: the autoencoder's factor times patch_size.
        dtype: of `proj`.

    >>> embed = PatchEmbed(4, 64, resolution=256, max_height=512, max_width=512)
    >>> embed(torch.randn(2, 4, 32, 48)).shape
    torch.Size([2, 384, 64])
    """

    pos_embed: Tensor

    def __init__(
        self,
        in_channels: int,
        dim: int,
        *,
        patch_size: int = 2,
        resolution: int,
        max_height: int,
        max_width: int,
        base: int = 256,
        unit: int = 16,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.grid = {"resolution": resolution, "max_height": max_height, "max_width": max_width}
        self.grid |= {"base": base, "unit": unit}
        self.size = max_height // unit, max_width // unit
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size, bias=bias, device=device, dtype=dtype)
        table = torch.empty(1, self.size[0] * self.size[1], dim, dtype=torch.float32, device=device)
        self.register_buffer("pos_embed", table)
        if not self.pos_embed.is_meta:
            self.fill_positions()

    @torch.no_grad()
    def fill_positions(self) -> None:
        """Writes the paper's formula into the table."""
        grid = self.grid
        table = rfkernels.position_grid(grid["max_height"], grid["max_width"], self.pos_embed.shape[-1], **grid)
        self.pos_embed.copy_(table.unsqueeze(0))

    def _apply(self, fn: Any, recurse: bool = True) -> PatchEmbed:
        table = self.pos_embed
        super()._apply(fn, recurse)
        if self.pos_embed.dtype != torch.float32:               # bf16 would move every token: 16 bits hold 3 digits
            moved = self.pos_embed
            self.pos_embed = moved.float() if table.is_meta or moved.is_meta else table.to(moved.device)
        return self

    def crop(self, h: int, w: int) -> Tensor:
        """The centre of the table, [h*w, dim]. Raises: ValueError if it is smaller."""
        rows, columns = self.size
        if h > rows or w > columns:
            raise ValueError(
                f"{type(self).__name__}: latent has {h} x {w} patches; the position table holds {rows} x {columns}"
            )
        top, left = (rows - h) // 2, (columns - w) // 2
        table = self.pos_embed.view(rows, columns, -1)
        return table[top : top + h, left : left + w].reshape(h * w, -1)

    def forward(self, latent: Tensor) -> Tensor:
        """latent [B, in_channels, H, W] -> [B, H/p * W/p, dim]."""
        p = self.patch_size
        positions = self.crop(latent.shape[-2] // p, latent.shape[-1] // p)
        if not plain(self.proj, nn.Conv2d):
            tokens = self.proj(latent).flatten(2).transpose(1, 2)
            wide = tokens.to(torch.promote_types(tokens.dtype, positions.dtype)) + positions
            return wide if autocast_dtype(tokens.device.type) else wide.to(tokens.dtype)      # as patch_embed does
        return rfkernels.patch_embed(latent, self.proj.weight, self.proj.bias, positions, patch_size=p)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, table={self.size[0]}x{self.size[1]}"


class PatchUnembed(nn.Module):
    """Project tokens to patches and put them together; see `rfkernels.patch_unembed`. `linear` holds the weights.

    Args:
        dim, out_channels: of the tokens and of the latent.

    >>> PatchUnembed(64, 4)(torch.randn(2, 384, 64), height=32, width=48).shape
    torch.Size([2, 4, 32, 48])
    """

    def __init__(
        self,
        dim: int,
        out_channels: int,
        *,
        patch_size: int = 2,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive_int(type(self).__name__, dim=dim, out_channels=out_channels, patch_size=patch_size)
        self.patch_size = patch_size
        self.linear = nn.Linear(dim, patch_size**2 * out_channels, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x [B, h*w, dim] -> [B, out_channels, height, width], of the latent."""
        linear, p = self.linear, self.patch_size
        if not plain(linear):
            cells = linear(x).unflatten(2, (p, p, -1)).unflatten(1, (height // p, width // p))     # [B, h, w, p, p, C]
            return cells.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, height, width)
        return rfkernels.patch_unembed(x, linear.weight, linear.bias, height=height, width=width, patch_size=p)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}"
