"""Numbers that cannot be meant are refused by name, wherever they are given."""

from pathlib import Path

import numpy as np
import pytest

from mmdit import flow, presets
from mmdit.sampling.sample import Settings
from train.config import Config, Ema, Optimizer, Parallel, Samples, Validation
from train.data.settings import Precompute

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "name, value",
    (("steps", 0), ("steps", -3), ("steps", 2.5), ("shift", 0), ("shift", -1.0), ("shift", NAN), ("shift", INF),
     ("guidance", NAN), ("guidance", INF), ("guidance", -1.0), ("guidance", "7"), ("guidance", None),
     ("interval", (0.8, 0.2)), ("interval", (0.0,)), ("interval", (NAN, 1.0)),
     ("skip_scale", NAN), ("skip_from", 1.5), ("skip_until", -0.1), ("skip_blocks", (-1,)), ("skip_blocks", (1.5,))),
)  # fmt: skip
def test_of_a_sample(name, value):
    with pytest.raises(ValueError, match=f"^{name} is "):
        Settings(**{name: value})


def test_what_can_be_meant_passes():
    Settings(steps=1, shift=0.1, guidance=0, interval=[0, 1], skip_blocks=(0, 23), skip_from=0, skip_until=1)
    assert [Settings(guidance=g).guided for g in (0, 0.5, 1, 1.01, 7)] == [False, False, False, True, True]


@pytest.mark.parametrize(
    "name, settings",
    (("shift", {"shift": 0.0}), ("shift", {"shift": NAN}), ("samples.shift", {"samples": Samples(shift=0.0)}),
     ("samples.guidance", {"samples": Samples(guidance=NAN)}), ("samples.guidance", {"samples": Samples(guidance=-1)}),
     ("optimizer.lr", {"optimizer": Optimizer(lr=0.0)}), ("optimizer.lr", {"optimizer": Optimizer(lr=INF)}),
     ("optimizer.betas", {"optimizer": Optimizer(betas=(0.9, 1.5))}), ("ema.decay", {"ema": Ema(decay=NAN)}),
     ("optimizer.clip", {"optimizer": Optimizer(clip=-1.0)}), ("optimizer.warmup", {"optimizer": Optimizer(warmup=-1)}),
     ("validation.every", {"validation": Validation(every=-1)}), ("threads", {"threads": -1}),
     ("optimizer.betas", {"optimizer": Optimizer(betas=(0.9, NAN))}), ("batch", {"batch": 2.5}),
     ("optimizer.betas", {"optimizer": Optimizer(betas=(1.0, 0.9))}),
     ("optimizer.kind", {"optimizer": Optimizer(kind="sgd")}), ("minutes", {"steps": None, "minutes": INF}),
     ("keep", {"keep": 1.5}), ("threads", {"threads": 100000}), ("read_ahead", {"read_ahead": 10**6}),
     ("parallel.timeout_minutes", {"parallel": Parallel(timeout_minutes=0.0)})),
)  # fmt: skip
def test_of_a_run(name, settings):
    with pytest.raises(ValueError, match=f"^Config: {name} is "):
        Config(run=Path("run"), cache=Path("cache"), **{"steps": 1, **settings})


@pytest.mark.parametrize("seed", (None, 1.5, [3]))
def test_a_runs_seed_is_an_integer(seed):
    with pytest.raises(TypeError, match="seed is"):
        Config(run=Path("run"), cache=Path("cache"), steps=1, seed=seed)


@pytest.mark.parametrize("name, value", (("val_share", NAN), ("val_share", 2.0), ("area", -1), ("copies", 0),
                                         ("t5_tokens", 0), ("step_ms", INF), ("synthetic", -0.5)))  # fmt: skip
def test_of_precompute(name, value):
    with pytest.raises(ValueError, match=f"^precompute: {name} is "):
        Precompute(**{name: value})


@pytest.mark.parametrize("name", ("rf/lognorm(nan,1)", "rf/lognorm(inf,1)", "rf/lognorm(0,inf)", "edm(nan,1)"))
def test_of_a_formulation(name):
    with pytest.raises(ValueError, match=r"is (nan|inf); expected a"):
        flow.by_name(name)


@pytest.mark.parametrize("name, value", (("mlp_ratio", 0), ("token_pixels", 0), ("max_height", -16), ("depth", "4"),
                                         ("heads", 1.5), ("context_split", -1)))  # fmt: skip
def test_of_a_model(name, value):
    with pytest.raises(ValueError, match=f"^MMDiTConfig: {name} is "):
        presets.tiny(**{name: value})


def test_numbers_of_other_libraries_are_kept_as_numbers():
    config = Config(run=Path("run"), cache=Path("cache"), steps=1, seed=np.int64(3))
    assert Config.from_json(config.to_json()).seed == 3
