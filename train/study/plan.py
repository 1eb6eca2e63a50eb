"""What a study consists of: variants x datasets x seeds, each a run, and how each run is evaluated."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmdit.files import read_object
from train import recipes
from train.config import Config, Ema, Optimizer, Samples, Validation

SETTINGS = ((50, 1.0), (50, 2.5), (50, 5.0), (5, 5.0), (10, 5.0), (25, 5.0))
"""(Euler steps, guidance): the paper's six."""
FEWER = (5, 10, 20)
"""Steps whose score is compared with that of 50 (table 6)."""
NAMED = (
    "rf", "edm(-1.20,1.20)", "eps/linear", "v/cos", "v/linear", "rf/lognorm(0.50,0.60)", "rf/mode(1.75)",
    "rf/lognorm(1.00,0.60)", "rf/lognorm(-0.50,1.00)", "rf/lognorm(0.00,1.00)",
)  # fmt: skip
"""Formulations of the paper's table 2."""


def small_base() -> Config:
    """A run of about a minute on a CPU core: captioned shapes of 16 x 16 pixels, a four-block MM-DiT of width 96, 900
    steps of 16. A token holds 4 x 4 pixels, 48 numbers: a model narrower than its tokens could not predict noise."""
    model = recipes.small_model(depth=4, head_dim=24, text_dim=64)
    small: dict[str, Any] = dict.fromkeys(("resolution", "max_height", "max_width", "position_base"), 16)
    return Config(
        run=Path("runs/study"),
        cache=Path("cache/study"),
        model=dataclasses.replace(model, **small),
        batch=16,
        steps=900,
        optimizer=Optimizer(lr=3e-3, betas=(0.9, 0.99), warmup=100, decay="cosine", weight_decay=0.01),
        ema=Ema(decay=0.9, every=10),
        encoder_dropout=recipes.UNCONDITIONAL,
        validation=Validation(every=150, samples=128),
        samples=Samples(every=0, count=16, steps=25),
        checkpoint_every=450,
        keep=1,
        keep_best=True,
        threads=1,
    )


@dataclass(frozen=True)
class Study:
    """Many runs that differ in one thing."""

    folder: Path
    """Rows, tables and plots, and a folder for each run."""
    caches: tuple[Path, ...] = (Path("cache/study"),)
    """Data sets."""
    base: Config = field(default_factory=small_base)
    """Of every run, but for what its variant changes."""
    seeds: int = 2
    """Of the best variants and of those named below; all others have one."""
    best_again: int = 10
    """How many of the best get all seeds."""
    clip: Path | None = None
    """Folder of a CLIP that scores pictures and makes features of them; without it a small network trained on the
    captioned shapes, which only data sets of those may be judged by."""
    images: int = 64
    """Pictures per control setting."""
    workers: int = 2
    """Runs at a time; on a machine with GPUs each on its own."""
    only: tuple[str, ...] = ()
    """Variants to restrict it to."""


@dataclass(frozen=True)
class Job:
    """One run."""

    variant: str
    cache: Path
    seed: int

    @property
    def dataset(self) -> str:
        return self.cache.name

    @property
    def slug(self) -> str:
        """Of file names."""
        return re.sub(r"[^\w.,-]+", "_", f"{self.variant}-{self.dataset}-{self.seed}")


Changes = dict[str, Any]
"""Field of Config, dotted, to its value."""
Variants = dict[str, Changes]


def changed(config: Any, changes: Changes) -> Any:
    """A copy with dotted fields replaced."""
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        inner = changed(getattr(config, head), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{head: inner})
    return config


def config_of(study: Study, variants: Variants, job: Job) -> Config:
    run = study.folder / "runs" / job.slug
    made: Config = changed(study.base, variants[job.variant])
    return dataclasses.replace(made, run=run, cache=job.cache, seed=job.seed)


def row_path(study: Study, job: Job) -> Path:
    return study.folder / "rows" / f"{job.slug}.json"


def rows(study: Study) -> list[dict[str, Any]]:
    """Of all finished runs."""
    return [read_object(path) for path in sorted((study.folder / "rows").glob("*.json"))]
