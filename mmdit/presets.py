"""Configurations of the released models and of the paper's scaling series."""

from __future__ import annotations

from typing import Any

from mmdit.config import MMDiTConfig


def by_depth(depth: int, *, resolution: int = 256, **changes: Any) -> MMDiTConfig:
    """The paper's series: width 64 * depth, as many heads as blocks, QK-RMSNorm. Depth 24 is 2B, 38 is 8B.

    >>> by_depth(24).width, by_depth(38, resolution=1024).max_height
    (1536, 1024)
    """
    values: dict[str, Any] = {"heads": depth, "qk_norm": True, "resolution": resolution}
    values |= {"max_height": resolution, "max_width": resolution}
    return MMDiTConfig(depth=depth, **{**values, **changes})


def sd3_medium() -> MMDiTConfig:
    """Stable Diffusion 3 medium: 2,028,328,000 parameters."""
    return by_depth(24, resolution=1024, max_height=3072, max_width=3072, qk_norm=False)


def sd35_medium() -> MMDiTConfig:
    """Stable Diffusion 3.5 medium (MMDiT-X): 2,243,171,520 parameters."""
    return by_depth(24, resolution=1024, max_height=6144, max_width=6144, dual_attention=tuple(range(13)))


def sd35_large() -> MMDiTConfig:
    """Stable Diffusion 3.5 large: 8,056,627,520 parameters."""
    return by_depth(38, resolution=1024, max_height=3072, max_width=3072)


def tiny(**changes: Any) -> MMDiTConfig:
    """A complete MM-DiT for tests and laptops: two blocks of width 64 on 32 x 32 pixels.

    >>> tiny(depth=3).depth
    3
    """
    values: dict[str, Any] = {
        "depth": 2,
        "heads": 2,
        "head_dim": 32,
        "in_channels": 4,
        "context_dim": 32,
        "pooled_dim": 16,
        "qk_norm": True,
        "resolution": 32,
        "max_height": 64,
        "max_width": 64,
        "position_base": 32,
        "token_pixels": 4,
    }
    return MMDiTConfig(**{**values, **changes})
