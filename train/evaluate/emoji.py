"""Emoji drawn from their names and scored by retrieval: is the nearest of 64 pictures the one that was asked for?

Names are of two kinds: those of training pictures, and colours that their pictures never had ("a green lobster"), whose
picture is the emoji with its hue changed. Chance is 1/64.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from mmdit import autoencoder, keyed
from mmdit.files import write_atomically
from mmdit.sampling.sample import Sampler, grid
from train.config import Config
from train.data.shards import Cache

COUNT = 64
HUES = {"red": 0, "orange": 30, "yellow": 55, "green": 120, "blue": 215, "purple": 280, "pink": 330}
"""In degrees."""
COLOURFUL = 0.25           # saturation above which a pixel has a hue that is seen
LEAST_COLOURFUL = 0.1      # of a picture's pixels, to be recoloured


def pictures(cache: Cache) -> dict[str, np.ndarray]:
    """Caption -> uint8 [H, W, 3], of the training split's first bucket, the first of each caption."""
    decoder, bucket = autoencoder.build(cache.settings["autoencoder"]), next(iter(cache.buckets("train").values()))
    found: dict[str, np.ndarray] = {}
    for row, caption in enumerate(bucket.captions()):
        if caption not in found:
            found[caption] = autoencoder.to_uint8(decoder.decode(bucket[row].latent.float()[None]))[0]
    return found


def hue_and_saturation(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of pixels [H, W], in degrees and in [0, 1]."""
    from PIL import Image

    hsv = np.asarray(Image.fromarray(image).convert("HSV"), dtype=float)
    return hsv[..., 0] * 360 / 255, hsv[..., 1] / 255


def recoloured(image: np.ndarray, hue: float) -> np.ndarray:
    """The picture with all its colours of one hue."""
    from PIL import Image

    hsv = np.array(Image.fromarray(image).convert("HSV"))
    hsv[..., 0] = np.where(hsv[..., 1] > COLOURFUL * 255, round(hue * 255 / 360), hsv[..., 0])
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def seen(known: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """So many names, and their pictures."""
    names = sorted(known)
    order = keyed.generator(0, "retrieval, seen").permutation(len(names))
    return {names[i]: known[names[i]] for i in order[:count]}


def never_seen(known: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Prompts with a colour that a picture does not have, 90 degrees from its own or more, and what they ask for."""
    names = [name for name in sorted(known) if not set(name.split()) & HUES.keys()]
    rng, found = keyed.generator(0, "retrieval, recoloured"), {}
    for i in rng.permutation(len(names)):
        image = known[names[i]]
        hue, saturation = hue_and_saturation(image)
        there = saturation > COLOURFUL
        if there.mean() < LEAST_COLOURFUL:
            continue
        angles = np.deg2rad(hue[there])
        own = np.rad2deg(np.arctan2(np.sin(angles).mean(), np.cos(angles).mean()))
        others = [c for c, h in HUES.items() if abs((h - own + 180) % 360 - 180) >= 90]
        colour = others[int(rng.integers(len(others)))]
        found[f"a {colour} {names[i]}"] = recoloured(image, HUES[colour])
        if len(found) == count:
            break
    return found


def retrieval(drawn: np.ndarray, wanted: np.ndarray) -> float:
    """Share of pictures [N, H, W, 3] whose nearest among `wanted` [N, H, W, 3], by squared error, is their own."""
    a, b = (images.reshape(len(images), -1).astype(float) for images in (drawn, wanted))
    distances = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
    return float((distances.argmin(1) == np.arange(len(a))).mean())


def score_emoji(
    run: str | os.PathLike[str], *, steps: int | None = None, guidance: float | None = None, seed: int = 0
) -> dict[str, float]:
    """Draws 64 names and 64 recolourings, and looks for each among the 64 pictures that were asked for.

    Returns: share found of "seen" and of "recoloured". Also written to RUN/score.json, and the pictures, each to the
        right of what was asked for, to RUN/retrieval.png.
    """
    config = Config.of_run(Path(run))
    steps = config.samples.steps if steps is None else steps
    guidance = config.samples.guidance if guidance is None else guidance
    known, sampler = pictures(Cache(config.cache)), Sampler.load(run)
    result, pairs = {}, []
    for kind, asked in (("seen", seen(known, COUNT)), ("recoloured", never_seen(known, COUNT))):
        drawn = sampler(list(asked), seed=seed, steps=steps, guidance=guidance, progress=True)
        wanted = np.stack(list(asked.values()))
        result[kind] = retrieval(drawn, wanted)
        pairs.append(np.concatenate([wanted, drawn], axis=2)[:16])
    body = {**result, "steps": steps, "guidance": guidance, "seed": seed}
    write_atomically(Path(run) / "score.json", json.dumps(body, indent=1).encode())
    grid(np.concatenate(pairs), columns=8, scale=2).save(Path(run) / "retrieval.png")
    return result
