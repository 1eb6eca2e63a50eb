"""What a run has never seen: captions to draw, and real pictures to compare with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mmdit import autoencoder
from train.data.shards import Cache
from train.data.sources import DataError


def captions(cache: Cache, count: int) -> list[str]:
    """`count` of the validation split, each once, and again from the first.

    Raises: DataError if nothing was held out."""
    buckets = cache.buckets("val").values()
    found = list(dict.fromkeys(caption for bucket in buckets for caption in bucket.captions()))
    if not found:
        raise DataError(f"{cache.path} holds no validation samples")
    return [found[i % len(found)] for i in range(count)]


def pictures(cache: Cache, most: int | None = None, batch: int = 64) -> Iterator[np.ndarray]:
    """The validation split's, all or at most so many, decoded: uint8 [N, H, W, 3], N up to `batch`."""
    vae = autoencoder.build(cache.settings["autoencoder"])
    left = sum(map(len, cache.buckets("val").values())) if most is None else most
    for bucket in cache.buckets("val").values():
        rows = range(min(left, len(bucket)))
        left -= len(rows)
        for start in range(0, len(rows), batch):
            decoded = [vae.decode(bucket[row].latent[None].float()) for row in rows[start : start + batch]]
            yield np.concatenate([autoencoder.to_uint8(image) for image in decoded])
