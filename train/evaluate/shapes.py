"""The captioned shapes that a run has never seen, drawn and read back by rule."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from mmdit.files import write_atomically
from mmdit.sample import Sampler, grid
from train.config import Config
from train.data import shapes


def score_shapes(
    run: str | os.PathLike[str], *, images: int = 4, steps: int | None = None, guidance: float | None = None,
    seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Draws each of the 64 held-out shape captions `images` times and reads the pictures back by rule.

    Args: steps, guidance: as the run draws its samples, unless given.
    Returns: share of pictures with the right size, colour, shape, position, and all of them; edge error in pixels and
        IoU. Also written to RUN/score.json, and one picture per caption to RUN/held-out.png.
    """
    samples = Config.from_json((Path(run) / "config.json").read_text()).samples
    steps, guidance = steps or samples.steps, samples.guidance if guidance is None else guidance
    _, held_out = shapes.split()
    wanted = held_out * images
    drawn = Sampler.load(run)([w.caption for w in wanted], seed=seed, steps=steps, guidance=guidance, progress=True)
    result = shapes.score(drawn, wanted)
    body = {**result, "pictures": len(drawn), "steps": steps, "guidance": guidance, "seed": seed}
    write_atomically(Path(run) / "score.json", json.dumps(body, indent=1).encode())
    truth = np.stack([shapes.draw(w, np.random.default_rng(i)) for i, w in enumerate(held_out)])
    pairs = np.concatenate([truth, drawn[: len(held_out)]], axis=2)[:32]
    grid(pairs, columns=8, scale=2).save(Path(run) / "held-out.png")
    return result
