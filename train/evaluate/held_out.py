"""The validation split: captions to draw, and real pictures to compare with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from mmdit import autoencoder
from train.data.records import DataError
from train.data.shards import Cache


def captions(cache: Cache, count: int) -> list[str]:
    """`count` of the validation split, each once, and again from the first.

    Raises: DataError if nothing was held out."""
    buckets = cache.buckets("val").values()
    found = list(dict.fromkeys(caption for bucket in buckets for caption in bucket.captions()))
    if not found:
        raise DataError(f"{cache.path} holds no validation samples")
    return [found[i % len(found)] for i in range(count)]


def pictures(
    cache: Cache, most: int | None = None, vae: autoencoder.Autoencoder | None = None, batch: int = 64
) -> Iterator[np.ndarray]:
    """The validation split's, all or at most so many, of each bucket its share: uint8 [N, H, W, 3], N up to `batch`.

    Args: vae: the cache's autoencoder, where it is built already."""
    vae, buckets = vae or autoencoder.build(cache.settings["autoencoder"]), cache.buckets("val").values()
    share = 1.0 if most is None else min(1.0, most / max(1, sum(map(len, buckets))))
    for bucket in buckets:
        rows = range(round(share * len(bucket)))
        for start in range(0, len(rows), batch):
            latents = torch.stack([bucket[row].latent for row in rows[start : start + batch]])
            yield autoencoder.to_uint8(vae.decode(latents.float()))
