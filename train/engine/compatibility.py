"""Whether a model and a cache belong together."""

from __future__ import annotations

from mmdit import autoencoder, encoders
from train.config import Config
from train.data.records import PAIRS, DataError
from train.data.shards import Cache

TAKEN = {"flow": "", "preference": "preference", "editing": "edit"}
"""What pictures an objective takes; see `records.PAIRS`."""


def check_compatible(config: Config, cache: Cache) -> None:
    """The model must read what the cache holds."""
    settings, model = cache.settings, config.model
    vae = autoencoder.build(settings["autoencoder"])
    dims, pooled = zip(*map(encoders.sizes, settings["encoders"]), strict=True)
    needed = {
        "in_channels": vae.channels,
        "token_pixels": vae.factor * model.patch_size,
        "pooled_dim": sum(pooled),
        "context_dim": max(model.context_dim, *dims),                           # wider is zero-padded
    }
    for name, need in needed.items():
        if getattr(model, name) != need:
            raise ValueError(f"model.{name} is {getattr(model, name)}; the cache {config.cache} needs {need}")
    if model.weight_sets == 3:
        *first, _ = longest = [spec["max_tokens"] for spec in settings["encoders"] if not spec.get("beside")]
        apart, before = len(longest), sum(first)
        if apart < 2 or before > model.context_split:
            raise ValueError(
                f"model.weight_sets is 3 and context_split {model.context_split}; expected two text encoders or "
                f"more in the cache {config.cache}, all but the last within context_split: it has {apart}, {before} "
                "tokens long"
            )
    for height, width in settings["sizes"]:
        if height % model.token_pixels or width % model.token_pixels:
            raise ValueError(
                f"the cache {config.cache} holds {height} x {width} images; expected multiples of token_pixels = "
                f"{model.token_pixels}"
            )
        if height > model.max_height or width > model.max_width:
            raise ValueError(
                f"the cache {config.cache} holds {height} x {width} images; the model's positions end at "
                f"{model.max_height} x {model.max_width}"
            )
    there = settings.get("pair", "preference" if settings.get("pictures", 1) == 2 else "")
    if TAKEN[config.objective] != there:
        came = PAIRS[there]
        raise ValueError(f"the cache {config.cache} holds {came}, which the objective {config.objective} does not take")
    if model.reference_channels not in (0, vae.channels):
        raise ValueError(f"model.reference_channels is {model.reference_channels}; expected {vae.channels}, or 0")
    if not cache.buckets("train"):
        raise DataError(f"{config.cache} holds no training samples")
    if config.keep_best and not cache.buckets("val"):
        raise ValueError(f"keep_best goes by the validation loss; {config.cache} holds no validation samples")
