"""Held-out edits of drawn pictures, made by a run and judged by rule."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from mmdit.files import write_atomically
from mmdit.sampling.sample import Sampler
from train.config import Config
from train.data import edits
from train.data.shards import Index
from train.evaluate.shapes import captioned

WITHOUT = "without the picture"


def score_edits(
    run: str | os.PathLike[str], *, count: int = 32, seed: int = 0, steps: int | None = None,
    guidance: float | None = None,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Makes `count` held-out edits of each task, and all of them once more without the picture, as a control.

    Returns: of each task, of all, and without the picture: shares of pictures that show what was asked for, and in
        which all else is as it was (see `edits.judged`). Also written to RUN/score.json, and pictures to RUN/edits.png.
    """
    run = Path(run)
    config, sampler = Config.of_run(run), Sampler.load(run)
    wanted = edits.held_out(world_of(config), count)
    said = [edit.instruction for edit in wanted]

    def judged(images: np.ndarray) -> np.ndarray:
        return np.array([edits.judged(image, edit) for image, edit in zip(images, wanted, strict=True)], float)

    before = [Image.fromarray(edit.source()) for edit in wanted]
    drawn = sampler(said, edit=before, seed=seed, steps=steps, guidance=guidance, progress=True)
    shares, tasks = judged(drawn), np.array([edit.task for edit in wanted])
    found = {task: shares[tasks == task] for task in edits.TASKS} | {"all": shares}
    found[WITHOUT] = judged(sampler(said, seed=seed, steps=steps, guidance=guidance, progress=True))
    result = {name: (float(part[:, 0].mean()), float(part[:, 1].mean())) for name, part in found.items()}
    body = {"right and kept": result, "edits": len(wanted), "seed": seed}
    write_atomically(run / "score.json", json.dumps(body, indent=1).encode())
    rows = range(2 * len(edits.TASKS))
    pictures = [np.concatenate([wanted[i].source(), drawn[i]], axis=1) for i in rows]
    captioned(np.stack(pictures), said[: len(rows)], columns=4).save(run / "edits.png")
    return result


def world_of(config: Config) -> str:
    """Whose edits a run was trained on. Raises: ValueError if they were none that were drawn by rule."""
    source = Index.load(config.cache).settings["source"]
    world = source.removesuffix("-edits")
    if world not in edits.WORLDS or world == source:
        raise ValueError(f"{config.cache} holds {source}; expected {' or '.join(f'{w}-edits' for w in edits.WORLDS)}")
    return str(world)
