"""What turns latents, timesteps and pooled text into tokens and a conditioning vector, and tokens back into latents."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rfkernels
from mmdit.config import MMDiTConfig

FREQUENCIES = 256
TIME_SCALE = 1000.0       # the network sees t in [0, 1] as 0 .. 1000


def timestep_features(t: Tensor, dim: int = FREQUENCIES, max_period: float = 1e4) -> Tensor:
    """t [B] in [0, 1] -> [B, dim]: cosines, then sines, of 1000 t at geometric frequencies. Always fp32: bf16 has a
    spacing of 4 at 1000."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = (t.float() * TIME_SCALE).unsqueeze(1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class VectorEmbedder(nn.Module):
    """Linear, SiLU, Linear: [B, in] -> [B, width]."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x.to(self.fc1.weight.dtype))))


class PatchEmbed(nn.Module):
    """Patchify, project, add the centre crop of the position table.

    The table is data, not a formula: a persistent fp32 buffer [rows, columns, width], filled by the paper's formula for
    a model trained from scratch and loaded with the weights otherwise.
    """

    positions: Tensor

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        p = config.patch_size
        self.weight = nn.Parameter(torch.empty(config.width, config.in_channels, p, p))
        self.bias = nn.Parameter(torch.empty(config.width))
        self.register_buffer("positions", torch.empty(*config.max_tokens, config.width))

    def fill_positions(self) -> None:
        c = self.config
        table = rfkernels.position_grid(
            c.max_height,
            c.max_width,
            c.width,
            resolution=c.resolution,
            max_height=c.max_height,
            max_width=c.max_width,
            base=c.position_base,
            unit=c.token_pixels,
        )
        self.positions.copy_(table.view_as(self.positions))

    def crop(self, h: int, w: int) -> Tensor:
        rows, columns = self.positions.shape[:2]
        if h > rows or w > columns:
            raise ValueError(f"MMDiT: latent has {h} x {w} patches; the position table holds {rows} x {columns}")
        top, left = (rows - h) // 2, (columns - w) // 2
        return self.positions[top : top + h, left : left + w].reshape(h * w, -1)

    def forward(self, latent: Tensor) -> Tensor:
        p = self.config.patch_size
        positions = self.crop(latent.shape[-2] // p, latent.shape[-1] // p)
        return rfkernels.patch_embed(latent, self.weight, self.bias, positions, patch_size=p)


class FinalLayer(nn.Module):
    """Modulated norm, projection, and tokens back to a latent. A patch leaves as (row, column, channel), though it
    enters as (channel, row, column): the layout of the released weights."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.patch_size, self.channels = config.patch_size, config.in_channels
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.linear = nn.Linear(config.width, config.patch_size**2 * config.in_channels)

    def forward(self, x: Tensor, c: Tensor, h: int, w: int) -> Tensor:
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        p = self.patch_size
        patches = self.linear(rfkernels.adaln(x, shift, scale)).reshape(-1, h, w, p, p, self.channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.channels, h * p, w * p)
