"""The kinds of study: what its variants change in the run that all have in common."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch

from mmdit import MMDiT
from mmdit.config import MMDiTConfig
from mmdit.cost.flops import training_flops
from mmdit.flow import FORMULATIONS
from train.config import Config
from train.data.shards import Cache
from train.recipes import UNCONDITIONAL
from train.study.plan import Changes, Study, Variants


def formulations(study: Study) -> Variants:
    """The 61 of section 5.1."""
    return {name: {"formulation": name} for name in FORMULATIONS}


def shifts(study: Study) -> Variants:
    """Times shifted towards noise (section 5.3.2): images with more pixels than they have to say need more of it."""
    names = ("rf", "rf/lognorm(0.00,1.00)")
    found = {f"{name}, shift {a:g}": {"formulation": name, "shift": a} for name in names for a in (1.0, 2.0, 4.0, 8.0)}
    return {**found, "edm(1.20,0.60)": {"formulation": "edm(1.20,0.60)"}}


def scaling(study: Study) -> Variants:
    """Depths, with width and heads in proportion (section 5.3)."""
    return {f"depth={d}": {"model.depth": d, "model.heads": d} for d in (2, 3, 4, 6, 8)}


BACKBONES: dict[str, Changes] = {
    "DiT": {"weight_sets": 1},
    "CrossDiT": {"backbone": "cross"},
    "UViT": {"backbone": "uvit", "conv_blocks": 1},
    "MM-DiT": {},
    "MM-DiT, 3 sets": {"weight_sets": 3, "context_split": 16},
}
"""Those of section 5.2.3, as changes of the model's configuration."""


def backbones(study: Study) -> Variants:
    """Each as wide as gives it the parameters of the base's MM-DiT, and as gives it the FLOPs."""
    base = study.base.model
    measures = {
        "parameters": parameters,
        "FLOPs": lambda model: step_flops(dataclasses.replace(study.base, model=model), Cache(study.caches[0])),
    }
    found: Variants = {}
    for name, changes in BACKBONES.items():
        model = dataclasses.replace(base, **changes)
        widths = {measure: matched(model, of, of(base)) for measure, of in measures.items()}
        for measure, head_dim in widths.items():
            same = len(set(widths.values())) == 1
            label = name if same else f"{name}, equal {measure}"
            found[label] = {f"model.{field}": value for field, value in {**changes, "head_dim": head_dim}.items()}
    return found


def matched(model: MMDiTConfig, measure: Callable[[MMDiTConfig], float], goal: float) -> int:
    """Channels of a head, even, at which a measure of the model comes closest to the goal."""
    off = lambda d: abs(math.log(measure(dataclasses.replace(model, head_dim=d)) / goal))  # noqa: E731
    return min(range(8, 4 * model.head_dim, 2), key=off)


def parameters(model: MMDiTConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MMDiT(model).parameters())


def step_flops(config: Config, cache: Cache) -> float:
    """Model FLOPs of a step, with the captions' mean length."""
    bucket = next(iter(cache.buckets("train").values()))
    sample = [bucket[row] for row in range(0, len(bucket), max(1, len(bucket) // 64))]
    text = round(sum(len(f.tokens) for s in sample for f in s.features) / len(sample))
    height, width = sample[0].latent.shape[1:]
    return config.batch * training_flops(config.model, height * width // config.model.patch_size**2, text).total


VARIANTS: dict[str, Callable[[Study], Variants]] = {
    "formulations": formulations, "shifts": shifts, "backbones": backbones, "scaling": scaling,
}  # fmt: skip


def default(kind: str) -> Study:
    """A kind's study on this machine, unless told otherwise. Backbones read two text encoders: a third weight set needs
    something of its own to read. Their cache: precompute --cache cache/study-two-encoders --sizes 16 16 --copies 6
    --encoders words minilm --max-words 16."""
    study = Study(Path(f"studies/{kind}"))
    if kind != "backbones":
        return study
    model = dataclasses.replace(study.base.model, context_dim=384, pooled_dim=64 + 384)
    base = dataclasses.replace(study.base, model=model, encoder_dropout=UNCONDITIONAL**0.5)          # of two encoders
    return dataclasses.replace(study, caches=(Path("cache/study-two-encoders"),), base=base)
