"""Training on the autoencoder and the text encoders of a released pipeline (small and random here)."""

import dataclasses

import pytest

from mmdit import Sampler, presets
from tests.mmdit.pipelines import made
from train.data.precompute import precompute
from train.data.records import DataError
from train.data.settings import Precompute
from train.data.shards import Cache
from train.engine.loop import train


def test_precompute_train_and_sample_with_clip_t5_and_an_autoencoder(config, folder, tmp_path):
    made().save_pretrained(tmp_path / "pipeline")
    settings = Precompute(
        source=str(folder), cache=tmp_path / "cache", sizes=((32, 32), (32, 64)), encoders=("clip_l", "clip_g", "t5"),
        pipeline=tmp_path / "pipeline", posterior="sample", t5_tokens=5, val_share=0.2,
    )  # fmt: skip
    precompute(settings)
    cache = Cache(tmp_path / "cache")
    assert cache.settings["autoencoder"]["posterior"] == "sample"
    sample = cache.buckets("train")["32x64"][0]
    assert sample.latent.shape == (16, 4, 8) and [tuple(f.tokens.shape) for f in sample.features] == [
        (77, 12), (77, 20), (5, 48)
    ]  # fmt: skip
    model = presets.tiny(in_channels=16, context_dim=48, pooled_dim=32, token_pixels=16)
    run = dataclasses.replace(config, cache=tmp_path / "cache", model=model, steps=2, batch=2)
    assert train(run).step == 2
    drawn = Sampler.load(run.run, "cpu")(["picture number 3"], steps=2, size=(32, 32))
    assert drawn.shape == (1, 32, 32, 3)
    with pytest.raises(DataError, match="autoencoder differ"):
        precompute(dataclasses.replace(settings, posterior="mode"))
    with pytest.raises(DataError, match="text encoder t5 is a pipeline's: pass --pipeline FOLDER"):
        precompute(Precompute(source=str(folder), cache=tmp_path / "other", encoders=("t5",)))
    with pytest.raises(ValueError, match=r"model\.pooled_dim is 16; the cache .* needs 32"):
        train(dataclasses.replace(run, model=dataclasses.replace(model, pooled_dim=16), run=tmp_path / "r2"))
