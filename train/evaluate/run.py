"""All that can be said of a run with what is at hand: python -m train evaluate RUN"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from mmdit import adapters, numbers
from mmdit.files import claimed, write_atomically
from mmdit.sampling.sample import Sampler, grid
from train.config import Config
from train.data import scenes, shapes
from train.data.shapes import SIDE
from train.data.shards import Cache
from train.engine.compatibility import check_compatible
from train.engine.loop import autocast
from train.engine.metrics import frechet
from train.engine.validation import validate
from train.evaluate.critics import Critic, feature_network
from train.evaluate.critics import clip as clip_critic
from train.evaluate.held_out import captions, pictures
from train.evaluate.prompts import Task, compbench, fill, geneval
from train.objectives import Flow

FILE = "evaluation.json"
Network = Callable[[np.ndarray], np.ndarray]
"""uint8 [N, H, W, 3] -> features [N, D]."""
Drawing = Callable[[Sequence[str]], np.ndarray]
"""Prompts -> uint8 [N, H, W, 3]."""


@dataclass(frozen=True)
class Evaluation:
    """What is asked of a run's averaged weights. The results are printed, and kept in RUN/evaluation.json."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    cache: Path | None = None
    """Its data, if that has been moved since."""
    images: int = 1000
    """Pictures drawn for CLIP and distances, one for each caption of the validation split, from the first again. A
    Frechet distance of fewer than there are features (768 of ViT-L/14) is mostly bias."""
    reference: int = 10_000
    """Real pictures they are compared with, at most: the validation split's."""
    clip: Path | None = None
    """Folder of a CLIP of transformers or open_clip (ViT-L/14 in the paper): CLIP score, and FID on its features."""
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
    size: tuple[int, int] | None = None
    """Height and width of pictures in pixels; the cache's first unless given."""
    batch: int = 16
    """Pictures at a time, and samples of the validation."""
    device: str | None = None
    """cuda or cpu; a GPU if there is one."""


def evaluate(wanted: Evaluation) -> dict[str, float]:
    """`measure`, by one process at a time; the run itself may go on beside it."""
    if not (wanted.run / "config.json").is_file():
        raise FileNotFoundError(f"{wanted.run} is no run folder: it holds no config.json")
    for name in ("images", "reference", "steps", "batch"):
        numbers.whole(name, getattr(wanted, name), 1)
    numbers.between("guidance", wanted.guidance, 0)
    with claimed(wanted.run, "evaluation.lock"):
        return measure(wanted)


def measure(wanted: Evaluation) -> dict[str, float]:
    """Returns: everything that was measured, by name; what is finished is in RUN/evaluation.json at once.

    Validation losses per level; CLIP score and FID (clip); a Frechet distance (features); for a run on the captioned
    shapes its score, for one on scenes that of each of GenEval's categories.
    Raises: FileNotFoundError, ValueError or DataError for a run, a cache, a network or a list that is not there or does
        not fit, before anything is drawn."""
    folders = prompt_folders(wanted)
    sampler = Sampler.load(wanted.run, wanted.device)
    device = next(sampler.model.parameters()).device
    networks: dict[str, Network] = {}
    clip = clip_critic(wanted.clip, device) if wanted.clip else None
    if clip is not None:
        networks["FID (CLIP features)"] = clip.embedded
    if wanted.features:
        networks[f"Frechet distance ({wanted.features})"] = feature_network(wanted.features)
    config = Config.of_run(wanted.run)
    config = dataclasses.replace(config, cache=wanted.cache or config.cache, objective="flow")     # on single pictures
    cache = Cache(config.cache)
    check_compatible(config, cache)
    how: dict[str, Any] = {name: getattr(wanted, name) for name in ("seed", "steps", "guidance")}
    how["size"] = wanted.size or sampler.size
    about = {**how, "weights": digest(sampler), "torch": str(torch.__version__), "device": str(device)}
    found: dict[str, float] = {}

    def draw(prompts: Sequence[str], first: int = 0) -> np.ndarray:
        return sampler(prompts, first=first, batch=wanted.batch, progress=len(prompts) > wanted.batch, **how)

    def keep(more: dict[str, float]) -> None:
        found.update(more)
        compared_by = {"images": wanted.images, "clip": str(wanted.clip), "features": wanted.features}
        dated = {**about, **compared_by, "date": time.strftime("%Y-%m-%d")}
        write_atomically(wanted.run / FILE, json.dumps({**found, "with": dated}, indent=1).encode())

    asked = wanted.clip or wanted.features or folders or cache.settings.get("source") in ("scenes", "shapes")
    if not cache.buckets("val") and not asked:
        raise ValueError(f"{config.cache} holds no validation samples, and nothing else was asked for (--clip, ...)")
    if cache.buckets("val"):
        keep(validation(sampler, config, cache, wanted.batch))
    if networks:
        keep(compared(wanted, sampler, cache, draw, networks, clip))
    source, readable = cache.settings.get("source"), tuple(how["size"]) == (SIDE, SIDE)
    if source == "scenes" and readable:
        keep({f"scenes/{tag}": share for tag, share in score_scenes(draw, wanted.run).items()})
    if source == "shapes" and readable:
        _, held_out = shapes.split()
        drawn = draw([what.caption for what in held_out * 4])
        keep({f"shapes/{name}": share for name, share in shapes.score(drawn, held_out * 4).items()})
    for out, tasks in folders.items():
        fill(tasks, draw, out, about)
    return found


def prompt_folders(wanted: Evaluation) -> dict[Path, list[Task]]:
    """What is to be drawn into which folder. Raises: ValueError for a bad list, or two of one name."""
    found: dict[Path, list[Task]] = {}
    if wanted.geneval:
        out = wanted.run / "geneval"
        found[out] = list(geneval(wanted.geneval, out))
    for path in wanted.compbench:
        out = wanted.run / "compbench" / path.stem
        if out in found:
            raise ValueError(f"compbench has two lists of the name {path.stem}; expected one folder for each")
        found[out] = list(compbench(path, out))
    return found


def digest(sampler: Sampler) -> str:
    """Changes with every step of training: of the first and the last projection, and of adapters."""
    ends = [sampler.model.patch_embed.proj.weight, sampler.model.final_layer.unembed.linear.weight]
    ends += [factor for _, layer in adapters.layers(sampler.model) for factor in (layer.lora_a, layer.lora_b)]
    return hashlib.sha256(b"".join(end.detach().float().cpu().numpy().tobytes() for end in ends)).hexdigest()[:16]


def compared(
    wanted: Evaluation, sampler: Sampler, cache: Cache, draw: Drawing,
    networks: dict[str, Network], clip: Critic | None,
) -> dict[str, float]:  # fmt: skip
    """Pictures of held-out captions against the pictures held out, by the networks that there are."""
    asked = captions(cache, wanted.images)
    drawn = draw(asked)
    real: dict[str, list[np.ndarray]] = {name: [] for name in networks}
    stored = getattr(sampler.autoencoder, "inner", sampler.autoencoder)           # the cache's latents are not scaled
    for images in pictures(cache, wanted.reference, stored):
        for name, network in networks.items():
            real[name].append(network(images))
    found = {name: frechet(network(drawn), np.concatenate(real[name])) for name, network in networks.items()}
    found["reference pictures"] = float(sum(map(len, next(iter(real.values())))))
    return found if clip is None else {**found, "CLIP score": clip.score(drawn, asked)}


def validation(sampler: Sampler, config: Config, cache: Cache, batch: int) -> dict[str, float]:
    """Losses of the run's own formulation on the held-out samples it was validated on, and at its levels."""
    objective = Flow.of(config, cache, sampler.formulation)
    v, model = config.validation, sampler.model.eval()
    with autocast(config, next(model.parameters()).device):
        losses = validate(model, objective, cache.buckets("val"), v.grid, v.samples, batch)
    return {f"validation/{name}": loss for name, loss in losses.items()}


def score_scenes(draw: Drawing, run: Path | None = None, images: int = 4) -> dict[str, float]:
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
