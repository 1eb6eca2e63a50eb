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

WITHOUT, UNCHANGED = "without the picture", "left as it was"


def score_edits(
    run: str | os.PathLike[str], *, count: int = 32, seed: int = 0, steps: int | None = None,
    guidance: float | None = None,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Makes `count` held-out edits of each task. Controls: all of them without the picture, and pictures that nobody
    changed, of each task too.

    Returns: of each task, of all, and of the controls: shares of pictures that show what was asked for, and in which
        all else is as it was (see `edits.judged`). Also written to RUN/score.json, and pictures to RUN/edits.png.
    """
    run = Path(run)
    config, sampler = Config.of_run(run), Sampler.load(run)
    wanted = edits.held_out(world_of(config), count)
    said = [edit.instruction for edit in wanted]

    def judged(images: np.ndarray) -> np.ndarray:
        return np.array([edits.judged(image, edit) for image, edit in zip(images, wanted, strict=True)], float)

    before = np.stack([edit.source() for edit in wanted])
    pictures = [Image.fromarray(image) for image in before]
    drawn = sampler(said, edit=pictures, seed=seed, steps=steps, guidance=guidance, progress=True)
    tasks = np.array([edit.task for edit in wanted])
    found: dict[str, np.ndarray] = {}
    for after, shares in (("", judged(drawn)), (f", {UNCHANGED}", judged(before))):
        found |= {task + after: shares[tasks == task] for task in edits.TASKS} | {f"all{after}": shares}
    found[f"all, {WITHOUT}"] = judged(sampler(said, seed=seed, steps=steps, guidance=guidance, progress=True))
    result = {name: (float(part[:, 0].mean()), float(part[:, 1].mean())) for name, part in found.items()}
    body = {"right and kept": result, "edits": len(wanted), "seed": seed}
    write_atomically(run / "score.json", json.dumps(body, indent=1).encode())
    rows = range(2 * len(edits.TASKS))
    pairs = [np.concatenate([before[i], drawn[i]], axis=1) for i in rows]
    captioned(np.stack(pairs), said[: len(rows)], columns=4).save(run / "edits.png")
    return result


def world_of(config: Config) -> str:
    """Whose edits a run was trained on. Raises: ValueError if they were none that were drawn by rule."""
    source = Index.load(config.cache).settings["source"]
    world = source.removesuffix("-edits")
    if world not in edits.WORLDS or world == source:
        raise ValueError(f"{config.cache} holds {source}; expected {' or '.join(f'{w}-edits' for w in edits.WORLDS)}")
    return str(world)
