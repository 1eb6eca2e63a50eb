"""A cache and a run folder that an older version wrote (commit 159f3e4) are read, sampled from and resumed."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from mmdit import Sampler
from train.config import Config
from train.data.shards import Cache
from train.engine.loop import train

WRITTEN = Path(__file__).with_name("written_by_159f3e4")


@pytest.fixture
def config(tmp_path):
    shutil.copytree(WRITTEN, tmp_path / "old")
    written = Config.from_json((tmp_path / "old/run/config.json").read_text())
    return dataclasses.replace(written, run=tmp_path / "old/run", cache=tmp_path / "old/precomputed")


def test_its_cache_is_whole():
    cache = Cache(WRITTEN / "precomputed")
    ((size, bucket),) = cache.buckets("train").items()
    assert size == "32x32" and len(bucket) == 4 and bucket.captions()[0].startswith("a red circle")


def test_its_weights_draw(config):
    images = Sampler.load(config.run)(["a red circle 0"], steps=2)
    assert images.shape == (1, 32, 32, 3)


def test_its_run_is_resumed(config, capsys):
    """With settings that it did not know at their defaults: the budget in steps decides, so it is the same."""
    outcome = train(config)
    assert outcome.step == 2 and f"resuming {config.run} from step 2" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"other settings \(unit_latents\)"):
        train(dataclasses.replace(config, unit_latents=True))
