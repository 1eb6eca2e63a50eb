"""What fine-tuning did to the demo's model: a new word learned and old ones kept, a preference followed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from mmdit import adapters
from mmdit.files import replacing, write_atomically
from mmdit.sampling.sample import Sampler
from train.config import Config
from train.data import shapes
from train.evaluate.shapes import captioned

Draw = Callable[[list[shapes.Shape]], np.ndarray]
HELD_OUT = 16
"""One pair in so many is held out for validation."""


def _drawing(run: Path, seed: int) -> tuple[Sampler, Draw]:
    """A run's sampler, and how it draws what captions say: as the run draws its samples."""
    sampler, samples = Sampler.load(run), Config.of_run(run).samples

    def draw(wanted: list[shapes.Shape]) -> np.ndarray:
        said = [what.caption for what in wanted]
        return sampler(said, seed=seed, steps=samples.steps, guidance=samples.guidance, progress=True)

    return sampler, draw


def _before_and_after(sampler: Sampler, draw: Draw, wanted: list[shapes.Shape]) -> dict[str, np.ndarray]:
    """Pictures of the same captions and noise, without the adapter and with it."""
    with adapters.off(sampler.model):
        before = draw(wanted)
    return {"before": before, "after": draw(wanted)}


def _write_score(run: Path, found: dict[str, float], images: int, seed: int) -> None:
    write_atomically(run / "score.json", json.dumps({**found, "pictures": images, "seed": seed}, indent=1).encode())


def score_word(run: str | os.PathLike[str], *, images: int = 4, seed: int = 0) -> dict[str, float]:
    """Share of pictures in which all is right, of held-out captions with the new word and of the demo's held-out ones,
    without the adapter and with it. Also written to RUN/score.json, and pictures to RUN/word.png."""
    run = Path(run)
    sampler, draw = _drawing(run, seed)
    (_, new), (_, old) = shapes.in_new_colour(), shapes.split()
    found: dict[str, float] = {}
    pages = []
    for name, wanted in (("new", new), ("old", old)):
        drawn = _before_and_after(sampler, draw, wanted * images)
        found |= {f"{name} {when}": shapes.score(page, wanted * images)["all"] for when, page in drawn.items()}
        pages.append(np.concatenate([page[: len(wanted)] for page in drawn.values()], axis=2))
    shown = np.concatenate([pages[0][:9], pages[1][:3]])
    captioned(shown, [what.caption for what in (*new[:9], *old[:3])]).save(run / "word.png")
    _write_score(run, found, images, seed)
    return found


def score_preference(run: str | os.PathLike[str], *, images: int = 4, seed: int = 0) -> dict[str, float]:
    """Of the demo's held-out captions: share of comparisons in which the picture with the adapter has cleaner edges
    than the one that the base draws from the same noise; and the scores of both. Also written to RUN/score.json, and
    pictures to RUN/preference.png."""
    run = Path(run)
    sampler, draw = _drawing(run, seed)
    wanted = shapes.split()[1] * images
    drawn = _before_and_after(sampler, draw, wanted)
    errors = np.array([[_edge(image) for image in page] for page in drawn.values()])
    both = np.isfinite(errors).all(0)
    found = {"wins": float((errors[1] < errors[0])[both].mean()), "compared": float(both.mean())}
    for when, page in drawn.items():
        found |= {f"{name} {when}": value for name, value in shapes.score(page, wanted).items()}
    pairs = np.concatenate([page[:12] for page in drawn.values()], axis=2)
    captioned(pairs, [what.caption for what in wanted[:12]]).save(run / "preference.png")
    _write_score(run, found, images, seed)
    return found


def _edge(image: np.ndarray) -> float:
    """Edge error in pixels; infinite of a picture that shows nothing."""
    found = shapes.find(image)
    return float("inf") if found is None else shapes.edges(image, found)[0]


def make_pairs(run: str | os.PathLike[str], out: Path, *, images: int = 2, seed: int = 1) -> int:
    """Draws the demo's training captions and writes pairs: the rendering that fits a picture best, whose edges are
    clean, is better than the picture. Left out is what shows something else. A folder that `precompute` reads.

    Returns: how many pairs."""
    wanted = [what for what in shapes.split()[0] for _ in range(images)]
    _, draw = _drawing(Path(run), seed)
    out.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, str]] = []
    for i, (what, image) in enumerate(tqdm(list(zip(wanted, draw(wanted), strict=True)), desc="pairs", disable=None)):
        found = shapes.find(image)
        if found is None or shapes.in_words(found) != what:
            continue
        names = {"winner": f"{i:04d}-clean.png", "loser": f"{i:04d}-drawn.png"}
        for name, picture in zip(names.values(), (shapes.redrawn(image, found), image), strict=True):
            with replacing(out / name) as partial:
                Image.fromarray(picture).save(partial, format="png")
        split = "val" if len(lines) % HELD_OUT == 0 else "train"
        lines.append({**names, "caption": what.caption, "split": split})
    write_atomically(out / "metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    return len(lines)
