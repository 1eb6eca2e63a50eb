"""The backbones that the paper compares MM-DiT with (section 5.2.3), behind its interface.

    joint   MM-DiT with 2 or 3 weight sets; with 1 the DiT on concatenated tokens
    cross   CrossDiT: image tokens attend to each other, then to the text, which stays as it was embedded
            (Chen et al. 2023, PixArt-alpha; here each block has modulations of its own, as in the others)
    uvit    UViT: residual convolutions on the latent, CrossDiT's blocks on patches of what they make, convolutions
            again, with skip connections (Hoogeboom et al. 2023, simple diffusion)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.blocks import JointBlock, Pending, Vectors, norm_of, pending, settled
from mmdit.config import MMDiTConfig
from rfkernels import gated_adaln, gated_residual, joint_attention, qk_norm
from rfkernels.nn import Mlp, StreamAttention


class CrossAttention(nn.Module):
    """Queries of the image, keys and values of the text."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.q_norm = nn.RMSNorm(self.head_dim) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim) if config.qk_norm else None

    def forward(self, x: Tensor, text: Tensor, lengths: Tensor | None) -> Tensor:
        """x [B, S, width], text [B, L, width], of which lengths [B] count -> [B, S, width]."""
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim))
        k, v = self.kv(text).unflatten(-1, (2, self.heads, self.head_dim)).unbind(2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk_norm(q, k, self.q_norm.weight, self.k_norm.weight)
        mask = None
        if lengths is not None:
            mask = (torch.arange(text.shape[1], device=text.device) < lengths[:, None])[:, None, None]
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return out


class CrossBlock(nn.Module):
    """A block of CrossDiT."""

    vectors = (7,)
    """(shift, scale, gate) of the attention, gate of the one to the text, (shift, scale, gate) of the MLP."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        self.leaves_pending = False
        self.attn = StreamAttention(config.width, config.heads, head_dim=config.head_dim, qk_norm=config.qk_norm)
        self.cross = CrossAttention(config)
        self.mlp = Mlp(config.width, config.mlp_ratio * config.width)

    def forward(
        self, xs: Sequence[Tensor | Pending], modulations: Sequence[Vectors], lengths: Sequence[Tensor | None]
    ) -> list[Tensor | Pending]:
        """As JointBlock's, of text and image; the text comes back as it was."""
        text = settled(xs[0])
        shift, scale, gate, gate_cross, shift_mlp, scale_mlp, gate_mlp = modulations[0]
        x, y = norm_of(xs[1], shift, scale)
        attended = joint_attention([self.attn.stream(y)])[0]
        x = gated_residual(x, self.attn.project(attended), gate)                                     # type: ignore[arg-type]
        h, y = gated_adaln(x, self.cross(x, text, lengths[0]), gate_cross, shift_mlp, scale_mlp)
        left = pending(h, self.mlp(y), gate_mlp)
        return [text, left if self.leaves_pending else settled(left)]


def block(config: MMDiTConfig, index: int) -> JointBlock | CrossBlock:
    """Block `index` of a model's backbone."""
    return JointBlock(config, index) if config.backbone == "joint" else CrossBlock(config, index)


class ConvBlock(nn.Module):
    """A residual block of two 3 x 3 convolutions; the identity before training, if it keeps the channels."""

    def __init__(self, incoming: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(incoming, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(incoming, channels, 1) if incoming != channels else nn.Identity()

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """x [B, incoming, h, w]; vector [B, 2 channels]: shift and scale between the convolutions."""
        shift, scale = vector[:, :, None, None].chunk(2, 1)
        h = normalised(self.conv1(F.silu(normalised(x)))) * (1 + scale) + shift
        out: Tensor = self.skip(x) + self.conv2(F.silu(h))
        return out


def normalised(x: Tensor) -> Tensor:
    """Group norm without weights, in as many groups up to 32 as have four channels or more."""
    channels = x.shape[1]
    return F.group_norm(x, max(n for n in range(1, min(32, channels // 4) + 1) if channels % n == 0))


class ConvStages(nn.Module):
    """What UViT has around its tokens: `down` before them and `up` after, on half as many channels as a token."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        channels, count = config.patch_channels, config.conv_blocks
        self.stem = nn.Conv2d(config.input_channels, channels, 3, padding=1)
        self.before = nn.ModuleList(ConvBlock(channels, channels) for _ in range(count))
        self.after = nn.ModuleList(ConvBlock(2 * channels, channels) for _ in range(count))
        self.out = nn.Conv2d(channels, config.in_channels, 3, padding=1)
        self.vectors = [1] * count
        """Of `down`, and of `up`: one of a token's width, which is shift and scale of a block's channels."""

    def down(self, latent: Tensor, vectors: Iterator[Vectors]) -> tuple[Tensor, list[Tensor]]:
        """Features to be made tokens of, and what `up` takes back."""
        x, kept = self.stem(latent), []
        for stage in self.before:
            x = stage(x, *next(vectors))
            kept.append(x)
        return x, kept

    def up(self, x: Tensor, kept: list[Tensor], vectors: Iterator[Vectors]) -> Tensor:
        """Features from tokens -> [B, in_channels, h, w]."""
        for stage, skipped in zip(self.after, reversed(kept), strict=True):
            x = stage(torch.cat([x, skipped], 1), *next(vectors))
        out: Tensor = self.out(F.silu(normalised(x)))
        return out
