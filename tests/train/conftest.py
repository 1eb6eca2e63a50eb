import dataclasses

import numpy as np
import pytest
from PIL import Image

from mmdit import presets
from train.config import Config, Ema, Optimizer, Samples, Validation
from train.data.precompute import precompute
from train.data.settings import Precompute
from train.engine.log import Log
from train.engine.loop import train
from train.objectives import Flow


@pytest.fixture
def folder(tmp_path):
    """A folder of ten captioned images."""
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (20 + i, 40, 3), dtype=np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"picture number {i}")
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Shapes, precomputed once; tests must not write to it."""
    path = tmp_path_factory.mktemp("cache")
    precompute(Precompute(cache=path, copies=1, shard_size=100))
    return path


@pytest.fixture
def config(cache, tmp_path):
    return small(cache, tmp_path / "run")


def small(cache, run):
    """A run of twelve steps that takes about a second."""
    return Config(
        run=run,
        cache=cache,
        model=presets.tiny(in_channels=12, context_dim=64, pooled_dim=64, token_pixels=4),
        batch=4,
        steps=12,
        optimizer=Optimizer(lr=1e-3, warmup=4, decay="cosine"),
        ema=Ema(decay=0.9, every=2),
        validation=Validation(every=6, samples=8),
        samples=Samples(every=0, count=2, steps=2),
        checkpoint_every=4,
        device="cpu",
        threads=1,
    )


@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch):
    """A run's page and its curve take as long as the run: they are drawn where a test looks at them."""
    looked_at = request.module.__name__.endswith(("test_report", "test_fine_tuning_page"))
    if not looked_at and request.node.name != "test_a_run_leaves_what_it_promises":
        monkeypatch.setattr(Log, "page", lambda self, last=False: None)
        monkeypatch.setattr(Log, "plot", lambda self: None)


class Killed(Exception):
    pass


@pytest.fixture
def killed_at(monkeypatch):
    """Trains until the batch of a step is asked for, where the process would die."""

    def run(config, step):
        draw = Flow.draw

        def dies(self, bucket, rows, now, *more, **named):
            if now == step:
                raise Killed
            return draw(self, bucket, rows, now, *more, **named)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Flow, "draw", dies)
            train(config)

    return run


def changed(config: Config, **values) -> Config:
    return dataclasses.replace(config, **values)


@pytest.fixture
def launch(tmp_path):
    from .launching import Launch

    return Launch(tmp_path)


@pytest.fixture(scope="session")
def alone(cache, tmp_path_factory):
    """The run of one process, without torchrun. AdamW's eps is 1e-6: with the paper's 1e-15 a gradient that is rounding
    alone, as of the text's keys' biases, makes a step as large as any."""
    from .launching import plain

    base = Config(
        run=tmp_path_factory.mktemp("alone") / "run", cache=cache, steps=10, device="cpu", threads=1,
        model=presets.tiny(in_channels=12, context_dim=64, pooled_dim=64, token_pixels=4),
        optimizer=Optimizer(lr=1e-3, warmup=4, eps=1e-6), ema=Ema(decay=0.9, every=2), keep=3,
    )  # fmt: skip
    made = plain(base, base.run)
    train(made)
    return made
