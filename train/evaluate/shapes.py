"""The captioned shapes that a run has never seen, drawn and read back by rule."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmdit.files import write_atomically
from mmdit.sampling.sample import Sampler
from train.config import Config
from train.data import shapes

if TYPE_CHECKING:
    from PIL import Image


def score_shapes(
    run: str | os.PathLike[str], *, images: int = 4, steps: int | None = None, guidance: float | None = None,
    seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Draws each of the 64 held-out shape captions `images` times and reads the pictures back by rule.

    Args: steps, guidance: as the run draws its samples, unless given.
    Returns: share of pictures with the right size, colour, shape, position, and all of them; edge error in pixels and
        IoU. Also written to RUN/score.json, and pictures above their captions to RUN/held-out.png.
    """
    samples = Config.of_run(Path(run)).samples
    steps = samples.steps if steps is None else steps
    guidance = samples.guidance if guidance is None else guidance
    _, held_out = shapes.split()
    wanted = held_out * images
    drawn = Sampler.load(run)([w.caption for w in wanted], seed=seed, steps=steps, guidance=guidance, progress=True)
    result = shapes.score(drawn, wanted)
    body = {**result, "pictures": len(drawn), "steps": steps, "guidance": guidance, "seed": seed}
    write_atomically(Path(run) / "score.json", json.dumps(body, indent=1).encode())
    truth = np.stack([shapes.draw(w, np.random.default_rng(i)) for i, w in enumerate(held_out)])
    pairs = np.concatenate([truth, drawn[: len(held_out)]], axis=2)
    captioned(pairs[:SHOWN], [w.caption for w in held_out[:SHOWN]]).save(Path(run) / "held-out.png")
    return result


SHOWN = 12


def captioned(pairs: np.ndarray, captions: list[str], columns: int = 3, scale: int = 4, room: int = 18) -> Image.Image:
    """Pictures uint8 [N, H, W, 3] above their captions, row by row."""
    from PIL import Image, ImageDraw

    count, height, width, _ = pairs.shape
    height, width = scale * height + room, scale * width + 8
    page = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    for i, (pair, caption) in enumerate(zip(pairs, captions, strict=True)):
        left, top = i % columns * width + 4, i // columns * height
        picture = Image.fromarray(pair)
        page.paste(picture.resize((width - 8, height - room), Image.Resampling.NEAREST), (left, top))
        ImageDraw.Draw(page).text((left, top + height - room + 3), caption, fill="black")
    return page
