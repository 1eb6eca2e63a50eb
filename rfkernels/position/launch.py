"""Launches of the patch kernels: `Patches` says how a latent is cut, the functions go between it and its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rfkernels.adaln.launch import column_sums
from rfkernels.launch_tables import patch_launch
from rfkernels.triton_support import capability, device_name, kernels_of, multiprocessors, on

PROGRAMS_PER_SM = 2          # of the weight's gradient, each with a partial sum of its own


_kernels = kernels_of(f"{__package__}.kernels")


@dataclass(frozen=True)
class Patches:
    """How a latent [B, C, H, W] is cut into tokens."""

    latent: Tensor
    size: int
    """Side of a patch."""
    channel_first: bool
    """Elements of a patch in the order (channel, row, column); otherwise (row, column, channel)."""

    @property
    def grid(self) -> tuple[int, int]:
        return self.latent.shape[2] // self.size, self.latent.shape[3] // self.size

    @property
    def tokens(self) -> int:
        h, w = self.grid
        return self.latent.shape[0] * h * w

    def settings(self, kernel: str, channels: int) -> dict[str, Any]:
        """Compile-time arguments of a kernel for tokens of this many channels."""
        latent = self.latent
        launch = patch_launch(kernel, channels, latent.dtype.itemsize, device_name(latent.device))
        # Three tf32 products for one of fp32; AMD has none. It says nothing about the products of 16-bit numbers.
        precision = "tf32x3" if latent.dtype == torch.float32 and capability(latent.device) else "ieee"
        return {
            "N": channels, "K": latent.shape[1] * self.size**2, "CHANNELS": latent.shape[1], "P": self.size,
            "CHANNEL_FIRST": self.channel_first, "PRECISION": precision, "BLOCK_M": launch.block_m,
            "BLOCK_N": launch.block_n, "BLOCK_K": launch.block_k, "num_warps": launch.warps,
            "num_stages": launch.stages, "enable_fp_fusion": True,
        }  # fmt: skip


def unit(x: Tensor) -> Tensor:
    """A gradient may come expanded or transposed; the kernels need unit-stride channels."""
    return x if x.stride(-1) == 1 else x.contiguous()


def to_tokens(
    patches: Patches, weight: Tensor, strides: tuple[int, int], channels: int, bias: Tensor | None = None,
    positions: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """[B, h*w, channels] = patches times w(n, k), weight addressed by `strides` of n and k, plus bias and positions; in
    the latent's dtype if none is given."""
    latent = patches.latent
    h, w = patches.grid
    out = torch.empty((latent.shape[0], h * w, channels), dtype=dtype or latent.dtype, device=latent.device)
    if not out.numel():
        return out
    settings = patches.settings("patches_to_tokens", channels)
    programs = -(-patches.tokens // settings["BLOCK_M"]) * -(-channels // settings["BLOCK_N"])
    with on(latent.device):
        _kernels().patches_to_tokens[(programs,)](
            latent, weight, bias, positions, out, patches.tokens, h, w, latent.stride(), strides,
            BIAS=bias is not None, POSITIONS=positions is not None, **settings,
        )  # fmt: skip
    return out


def to_latent(
    x: Tensor, patches: Patches, weight: Tensor, strides: tuple[int, int], bias: Tensor | None = None
) -> Tensor:
    """Fills patches.latent from tokens x [B, h*w, N] times w(n, k), plus bias."""
    x, latent, (h, w) = unit(x), patches.latent, patches.grid
    if not latent.numel():
        return latent
    settings = patches.settings("tokens_to_patches", x.shape[-1])
    programs = -(-patches.tokens // settings["BLOCK_M"]) * -(-settings["K"] // settings["BLOCK_K"])
    with on(x.device):
        _kernels().tokens_to_patches[(programs,)](
            x, weight, bias, latent, patches.tokens, h, w, x.stride()[:2], strides, latent.stride(),
            BIAS=bias is not None, **settings,
        )  # fmt: skip
    return latent


def weight_gradient(
    x: Tensor, patches: Patches, dweight: Tensor, strides: tuple[int, int], sums: Tensor | None = None
) -> None:
    """Fills dweight(n, k), contiguous, addressed by `strides`, with the sum over tokens of x(m, n) patch(m, k), and
    sums [N] with that of x(m, n)."""
    x, (h, w), tokens = unit(x), patches.grid, patches.tokens
    if not tokens:
        dweight.zero_()
        if sums is not None:
            sums.zero_()
        return
    channels = x.shape[-1]
    settings = patches.settings("patch_weight_bwd", channels)
    rows = settings["BLOCK_M"]
    tiles = -(-channels // settings["BLOCK_N"]) * -(-settings["K"] // settings["BLOCK_K"])
    splits = max(1, min(-(-tokens // rows), PROGRAMS_PER_SM * multiprocessors(x.device) // tiles))
    span = -(-tokens // (splits * rows)) * rows
    splits = -(-tokens // span)
    with on(x.device):
        partials = torch.empty((splits, dweight.numel()), dtype=torch.float32, device=x.device)
        row_sums = torch.empty((0 if sums is None else splits, channels), dtype=torch.float32, device=x.device)
        _kernels().patch_weight_bwd[(tiles, splits)](
            x, patches.latent, partials, row_sums, tokens, h, w, span, x.stride()[:2], patches.latent.stride(), strides,
            SUMS=sums is not None, **settings,
        )  # fmt: skip
        column_sums(partials[None], dweight)
        if sums is not None:
            column_sums(row_sums[None], sums)
