"""All that can be said of a run with what is at hand: python -m train evaluate RUN"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from mmdit.files import write_atomically
from mmdit.sample import Sampler, grid
from train.config import Config
from train.data import scenes
from train.data.shards import Cache
from train.evaluate.critics import Clip, feature_network
from train.evaluate.held_out import captions, pictures
from train.evaluate.prompts import Task, compbench, fill, geneval
from train.evaluate.shapes import score_shapes
from train.metrics import frechet
from train.objective import Objective
from train.validate import validate

FILE = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """What is asked of a run's averaged weights. The results are printed, and kept in RUN/evaluation.json."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    cache: Path | None = None
    """Its data, if that has been moved since."""
    images: int = 256
    """Pictures drawn for CLIP and distances, one for each caption of the validation split, from the first again."""
    reference: int = 10_000
    """Real pictures they are compared with, at most: the validation split's."""
    clip: Path | None = None
    """Folder of a CLIPModel that transformers reads (ViT-L/14 in the paper): CLIP score, and FID on its features."""
    features: str = ""
    """A network of your own for the Frechet distance: package.module:function, uint8 [N, H, W, 3] to [N, D]."""
    geneval: Path | None = None
    """GenEval's evaluation_metadata.jsonl: four pictures of each prompt, in its layout, into RUN/geneval."""
    compbench: tuple[Path, ...] = ()
    """T2I-CompBench's lists of prompts: ten pictures of each, in its layout, into RUN/compbench/NAME OF THE LIST."""
    steps: int = 50
    """Euler steps."""
    guidance: float = 5.0
    """Classifier-free guidance."""
    seed: int = 0
    """Of the noise."""
    device: str | None = None
    """cuda or cpu; a GPU if there is one."""


def evaluate(wanted: Evaluation) -> dict[str, float]:
    """Returns: everything that was measured, by name.

    Validation losses per level; CLIP score and FID (clip); a Frechet distance (features); for a run on the captioned
    shapes its score, for one on scenes that of each of GenEval's categories.
    Raises: FileNotFoundError, ValueError or DataError for a run, a cache, a network or a list that is not there."""
    sampler = Sampler.load(wanted.run, wanted.device)
    config = Config.from_json((wanted.run / "config.json").read_text())
    cache = Cache(wanted.cache or config.cache)
    device = next(sampler.model.parameters()).device
    found = {f"validation/{name}": loss for name, loss in validation(sampler, config, cache).items()}

    def draw(prompts: list[str], first: int = 0) -> np.ndarray:
        return sampler(prompts, seed=wanted.seed, steps=wanted.steps, guidance=wanted.guidance, first=first)

    found |= compared(wanted, sampler, cache)
    source = cache.settings.get("source")
    if source == "scenes":
        found |= {f"scenes/{tag}": share for tag, share in score_scenes(draw, wanted.run).items()}
    if source == "shapes":
        scores = score_shapes(wanted.run, steps=wanted.steps, guidance=wanted.guidance, seed=wanted.seed)
        found |= {f"shapes/{name}": share for name, share in scores.items()}
    folders: list[tuple[str, list[Task]]] = []
    if wanted.geneval:
        folders.append(("GenEval", list(geneval(wanted.geneval, wanted.run / "geneval"))))
    for path in wanted.compbench:
        folders.append((path.stem, list(compbench(path, wanted.run / "compbench" / path.stem))))
    for label, tasks in folders:
        fill(tasks, draw, label)
    about: dict[str, object] = {name: getattr(wanted, name) for name in ("images", "steps", "guidance", "seed")}
    about |= {"date": time.strftime("%Y-%m-%d"), "torch": str(torch.__version__), "device": str(device)}
    write_atomically(wanted.run / FILE, json.dumps({**found, "with": about}, indent=1).encode())
    return found


def compared(wanted: Evaluation, sampler: Sampler, cache: Cache) -> dict[str, float]:
    """Pictures of held-out captions against the pictures held out, by the networks that there are."""
    networks: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    clip = None
    if wanted.clip is not None:
        clip = Clip(wanted.clip, next(sampler.model.parameters()).device)
        networks["FID (CLIP features)"] = clip.embedded
    if wanted.features:
        networks[f"Frechet distance ({wanted.features})"] = feature_network(wanted.features)
    if not networks:
        return {}
    asked = captions(cache, wanted.images)
    drawn = sampler(asked, seed=wanted.seed, steps=wanted.steps, guidance=wanted.guidance, progress=True)
    found = {}
    for name, network in networks.items():
        real = np.concatenate([network(images) for images in pictures(cache, wanted.reference)])
        found[name] = frechet(network(drawn), real)
    if clip is not None:
        found["CLIP score"] = clip.score(drawn, asked)
    return found


def validation(sampler: Sampler, config: Config, cache: Cache) -> dict[str, float]:
    """Losses of the run's own formulation on all held-out samples it was validated on, and at its levels."""
    objective = Objective.of(config, cache, sampler.formulation)
    v = config.validation
    return validate(sampler.model.eval(), objective, cache.buckets("val"), v.grid, v.samples, config.batch)


def score_scenes(draw: Callable[[list[str]], np.ndarray], run: Path | None = None, images: int = 4) -> dict[str, float]:
    """Share of pictures that show what they should, by tag and as the mean of the tags: each of `scenes.asked()` drawn
    `images` times and read back by rule. With a run, one picture of each goes to RUN/scenes.png, a row for each tag."""
    asked = scenes.asked()
    drawn = draw([prompt["prompt"] for prompt in asked] * images)
    right = np.array([scenes.correct(image, asked[i % len(asked)]) for i, image in enumerate(drawn)])
    tags = np.array([prompt["tag"] for prompt in asked] * images)
    if run is not None:
        rows = [drawn[: len(asked)][tags[: len(asked)] == tag][:6] for tag in scenes.TAGS]
        grid(np.concatenate(rows), columns=6, scale=3).save(run / "scenes.png")
    found = {tag: float(right[tags == tag].mean()) for tag in scenes.TAGS}
    return {**found, "mean": sum(found.values()) / len(found)}
