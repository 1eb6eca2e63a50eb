"""One run of a study: train, take the weights of the lowest validation loss, draw under every setting, write a row."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from mmdit import autoencoder, keyed
from mmdit.files import read_lines, write_atomically
from mmdit.flow import PathLength
from mmdit.sampling.sample import Sampler, Settings, conditioned, denoise
from train.data.shards import Cache
from train.engine.best import ABOUT, AVERAGED, RAW
from train.engine.loop import train
from train.engine.metrics import frechet
from train.evaluate.critics import Critic, clip
from train.evaluate.held_out import captions, pictures
from train.study.judge import trained
from train.study.plan import FEWER, SETTINGS, Job, Study, Variants, config_of, row_path
from train.study.variants import step_flops

WEIGHTS = {"EMA": AVERAGED, "raw": RAW}


def drawn(sampler: Sampler, captions: Sequence[str], steps: int, guidance: float) -> tuple[np.ndarray, float]:
    """(pictures, mean path length), at a fixed seed."""
    height, width = (side // sampler.autoencoder.factor for side in sampler.size)
    shape = (sampler.autoencoder.channels, height, width)
    noise = keyed.normals(shape, 0, "sampling noise", [(i,) for i in range(len(captions))])
    text, none = conditioned(sampler.encoders, captions, sampler.model.config, guidance > 1)
    settings = Settings(steps=steps, guidance=guidance, shift=sampler.shift)
    way = PathLength(noise * float(settings.times(sampler.formulation)[0]))
    z = denoise(
        sampler.model, noise, text, none, settings, formulation=sampler.formulation, constrain=way, masked=True
    )
    return autoencoder.to_uint8(sampler.autoencoder.decode(z)), float(way.lengths.mean())


def evaluated(run: Path, critic: Critic, wanted: Sequence[str], real: np.ndarray) -> dict[str, Any]:
    """{"settings": one entry per weights, steps and guidance; "path_length" and "decrease" of the average at guidance
    5; "parameters"}."""
    sampler = Sampler.load(run / AVERAGED)
    entries, scores, path_length = [], {}, float("nan")
    more = tuple((steps, 5.0) for steps in FEWER if (steps, 5.0) not in SETTINGS)
    for weights, file in WEIGHTS.items():
        sampler.model.load_state_dict(load_file(run / file))
        sampler.model.eval()
        for steps, guidance in (*SETTINGS, *(more if weights == "EMA" else ())):
            images, length = drawn(sampler, wanted, steps, guidance)
            score = critic.score(images, wanted)
            distance = frechet(critic.embedded(images), real)
            if (steps, guidance) in SETTINGS:
                setting = {"weights": weights, "steps": steps, "guidance": guidance}
                entries.append({**setting, "score": score, "distance": distance})
            if weights == "EMA" and guidance == 5.0:
                scores[steps] = score
                path_length = length if steps == 50 else path_length
    decrease = {str(steps): 1 - scores[steps] / scores[50] for steps in FEWER}
    parameters = sum(p.numel() for p in sampler.model.parameters())
    return {"settings": entries, "path_length": path_length, "decrease": decrease, "parameters": parameters}


def critic_of(study: Study) -> Critic:
    """CLIP, where there is one, as in the paper; or a small network that knows the captioned shapes."""
    if study.clip is None:
        return trained(study.folder)
    return clip(study.clip, "cuda" if torch.cuda.is_available() else "cpu")


def validation_curve(run: Path) -> list[tuple[int, float]]:
    lines = (json.loads(line) for line in read_lines(run / "metrics.jsonl"))
    return [(line["step"], line["validation/loss"]) for line in lines if "validation/loss" in line]


def work(study: Study, variants: Variants, job: Job) -> dict[str, Any] | None:
    """Runs a job and writes its row. Returns: the row, or None if a signal stopped it."""
    config, start = config_of(study, variants, job), time.time()
    torch.set_num_threads(config.threads or 1)
    outcome = train(config)
    if outcome.stopped_by is not None:
        return None
    cache, critic = Cache(job.cache), critic_of(study)
    best = json.loads((config.run / ABOUT).read_text())
    real = np.concatenate([critic.embedded(images) for images in pictures(cache)])
    found = evaluated(config.run, critic, captions(cache, study.images), real)
    row = {
        "variant": job.variant,
        "dataset": job.dataset,
        "seed": job.seed,
        "steps": outcome.step,
        "batch": config.batch,
        "best_step": best["step"],
        "validation_loss": best["loss"],
        "validation_curve": validation_curve(config.run),
        "flops": step_flops(config, cache) * outcome.step,
        **found,
        "images": study.images,
        "seconds": round(time.time() - start, 1),
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }
    write_atomically(row_path(study, job), json.dumps(row).encode())
    return row
