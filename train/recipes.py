"""Recipes: functions that return a configuration. Flags of `python -m train run RECIPE` change single fields."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmdit.config import MMDiTConfig
from train.config import Config, Ema, Optimizer, Samples, Validation

UNCONDITIONAL = 0.1          # with one encoder, the share that 0.464 leaves unconditional with the paper's three


def small_model(depth: int, head_dim: int, text_dim: int) -> MMDiTConfig:
    """Four heads on 32 x 32 pixels: pixel space of factor 2, so 12 channels and 64 tokens."""
    return MMDiTConfig(
        depth=depth,
        heads=4,
        head_dim=head_dim,
        in_channels=12,
        context_dim=text_dim,
        pooled_dim=text_dim,
        qk_norm=True,
        resolution=32,
        max_height=32,
        max_width=32,
        position_base=32,
        token_pixels=4,
    )


def shapes() -> Config:
    """Captioned shapes on a laptop: a 32 x 32 pixel-space MM-DiT, minutes on two CPU cores (make demo)."""
    return Config(
        run=Path("runs/shapes"),
        cache=Path("cache/shapes"),
        model=small_model(depth=4, head_dim=32, text_dim=64),
        batch=16,
        minutes=6,
        optimizer=Optimizer(lr=3e-3, betas=(0.9, 0.99), warmup=100, decay="cosine", weight_decay=0.01),
        ema=Ema(decay=0.9, every=10),
        encoder_dropout=UNCONDITIONAL,
        validation=Validation(every=1000),
        samples=Samples(every=0, guidance=3.0),
        checkpoint_every=1000,
    )


def openmoji() -> Config:
    """OpenMoji with MiniLM text features, 32 x 32 pixels: a real data set, the better part of an hour on two CPU cores
    (make demo-emoji)."""
    seen = ("red heart", "grinning face", "crescent moon", "red apple", "dog face", "sailboat", "umbrella", "pizza")
    unseen = ("a purple apple", "a green heart", "a blue book", "a face with a hat", "two red circles", "a black cat",
              "an orange boat", "moon and stars")  # fmt: skip
    return Config(
        run=Path("runs/openmoji"),
        cache=Path("cache/openmoji"),
        model=small_model(depth=6, head_dim=48, text_dim=384),
        batch=16,
        minutes=40,
        optimizer=Optimizer(lr=2e-3, betas=(0.9, 0.99), warmup=200, decay="cosine", weight_decay=0.05),
        ema=Ema(decay=0.9, every=10),
        encoder_dropout=UNCONDITIONAL,
        validation=Validation(every=1000),
        samples=Samples(every=2000, prompts=seen + unseen),
        checkpoint_every=1000,
    )


RECIPES: dict[str, Callable[[], Config]] = {"shapes": shapes, "openmoji": openmoji}
