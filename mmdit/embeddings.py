"""What turns latents, timesteps and pooled text into tokens and a conditioning vector, and tokens back into latents."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.blocks import Pending, norm_of
from mmdit.config import MMDiTConfig
from rfkernels.nn import PatchEmbed, PatchUnembed

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


class FinalLayer(nn.Module):
    """Modulated norm, projection, and tokens back to a latent. A patch leaves as (row, column, channel), though it
    enters as (channel, row, column): the layout of the released weights."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.unembed = PatchUnembed(config.width, config.unpatched_channels, patch_size=config.patch_size)

    def forward(self, x: Tensor | Pending, vectors: tuple[Tensor, ...], height: int, width: int) -> Tensor:
        """x [B, h*w, width] and (shift, scale) -> a latent of height x width."""
        out: Tensor = self.unembed(norm_of(x, *vectors)[1], height, width)
        return out


def patch_embed(config: MMDiTConfig) -> PatchEmbed:
    """The embedding of a latent with its position table."""
    c = config
    return PatchEmbed(
        c.patch_channels, c.width, patch_size=c.patch_size, resolution=c.resolution, max_height=c.max_height,
        max_width=c.max_width, base=c.position_base, unit=c.token_pixels,
    )  # fmt: skip
