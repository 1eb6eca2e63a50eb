"""Recipes: functions that return a configuration. Flags of `python -m train run RECIPE` change single fields."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmdit import presets
from mmdit.config import MMDiTConfig
from train.config import Config, Ema, Optimizer, Samples, Validation


def shapes() -> Config:
    """Captioned shapes on a laptop: a 32 x 32 pixel-space MM-DiT, minutes on two CPU cores (make demo)."""
    model = MMDiTConfig(
        depth=4,
        heads=4,
        head_dim=32,
        in_channels=12,
        context_dim=64,
        pooled_dim=64,
        qk_norm=True,
        resolution=32,
        max_height=32,
        max_width=32,
        position_base=32,
        token_pixels=4,
    )
    return Config(
        run=Path("runs/shapes"),
        cache=Path("cache/shapes"),
        model=model,
        batch=64,
        minutes=5.5,
        optimizer=Optimizer(lr=2e-3, betas=(0.9, 0.99), warmup=100, decay="cosine", weight_decay=0.01),
        ema=Ema(decay=0.9, every=10),
        encoder_dropout=0.1,
        validation=Validation(every=500),
        samples=Samples(every=0, guidance=3.0),
        checkpoint_every=500,
    )


RECIPES: dict[str, Callable[[], Config]] = {"shapes": shapes}
