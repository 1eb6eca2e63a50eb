"""Recipes, starts from other weights, speed, the watchdog, and the care of a cache."""

import dataclasses
import gc
import json
import math
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import reading
from mmdit import MMDiT, autoencoder, checkpoint, flow, presets
from mmdit.encoders import TextFeatures
from train.config import Validation
from train.data.blocks import check
from train.data.plan import Plan
from train.data.precompute import precompute
from train.data.settings import Precompute
from train.data.shards import Cache, DataError, Index, Sample, unit_of, write_shard
from train.engine import previews
from train.engine.budget import ProgressBar
from train.engine.initial import start_from
from train.engine.loop import train
from train.engine.parallel import World
from train.engine.reader import Reader
from train.engine.throughput import Throughput, Watchdog
from train.objectives import Flow
from train.recipes import RECIPES

from ..processes import called
from .conftest import changed

ALONE = World(torch.device("cpu"))


def test_recipes_are_the_papers():
    assert {f"d{d}-{s}" for d in (15, 18, 21, 24, 30, 38) for s in (256, 512, 1024)} <= RECIPES.keys()
    config = RECIPES["d24-256"]()
    assert (config.batch, config.steps, config.encoder_dropout, config.optimizer.eps) == (4096, 500_000, 0.464, 1e-15)
    assert (config.ema.decay, config.ema.every, config.optimizer.lr) == (0.99, 100, 1e-4)
    assert config.model == presets.by_depth(24) and config.formulation == "rf/lognorm(0.00,1.00)"
    fine = RECIPES["d38-1024"]()
    assert fine.shift == 3.0 and fine.model.qk_norm and fine.model.max_tokens == (96, 96)
    assert str(fine.initial) == "runs/d38-512/model.safetensors"
    for recipe in RECIPES.values():
        assert (recipe.__doc__ or "").strip()


def test_a_start_without_qk_norm_at_a_lower_resolution(config, tmp_path):
    low = dataclasses.replace(config.model, qk_norm=False, max_height=32, max_width=32)
    source = MMDiT(low)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    checkpoint.save(source, tmp_path / "start.safetensors")
    model = MMDiT(config.model)
    left = start_from(model, tmp_path / "start.safetensors")
    assert "patch_embed.pos_embed" in left and len(left) == 1 + 2 * 4
    for name, value in source.state_dict().items():
        if name not in left:
            assert torch.equal(model.state_dict()[name], value), name
    assert (model.blocks[0].image.attn.q_norm.weight == 1).all()
    assert torch.equal(model.patch_embed.pos_embed, MMDiT(config.model).patch_embed.pos_embed)
    train(changed(config, steps=1, initial=tmp_path / "start.safetensors"))
    other = MMDiT(dataclasses.replace(config.model, depth=3))
    with pytest.raises(ValueError, match=r"is no start for this model: .*missing blocks\.2\."):
        start_from(other, tmp_path / "start.safetensors")


def test_latents_of_unit_size(cache, config):
    """By the cache's own statistics, in training; what decodes the samples undoes it."""
    opened = Cache(cache)
    latents = torch.stack([b[i].latent.double() for b in opened.buckets("train").values() for i in range(len(b))])
    unit = unit_of(opened)
    assert (unit.mean, unit.std) == pytest.approx((float(latents.mean()), float(latents.std(correction=0))), rel=1e-6)
    plain, scaled = (Flow.of(changed(config, unit_latents=on), opened, flow.by_name("rf")) for on in (False, True))
    bucket = opened.buckets("train")["32x32"]
    a, b = (o.draw(bucket, np.arange(4), 0).x0.float() for o in (plain, scaled))
    torch.testing.assert_close(b, (a - unit.mean) / unit.std)
    decoder = autoencoder.build(previews.autoencoder_of(changed(config, unit_latents=True), opened))
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(decoder.decode(decoder.encode(images)), images)
    assert autoencoder.build(decoder.spec()).spec() == decoder.spec() and decoder.spec()["kind"] == "unit"


def test_progress_in_a_log_is_a_line_now_and_then(config, capsys):
    """Without a terminal: step, share, loss, pictures a second, time left; half a minute apart."""
    now = [100.0]
    bar = ProgressBar(changed(config, steps=100), step=20, shown=True, before=0.2, clock=lambda: now[0])
    for step in range(20, 100):
        now[0] += 1
        bar.advance(0.5, (step + 1) / 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "run  50%  step 50, loss 0.5000, 4 pictures/s, 0:50 left" and len(lines) == 3
    assert lines[-1] == "run 100%  step 100, loss 0.5000, 4 pictures/s, 0:00 left"
    hidden = ProgressBar(config, step=0, shown=False, before=0.0)
    hidden.advance(0.5, 1.0)
    assert not capsys.readouterr().err


def test_readings_of_speed(config):
    meter = Throughput(config.model, ALONE)
    readings = []
    for _ in range(20):
        with meter.waiting():
            time.sleep(0.002)
        readings.append(meter.step(8, 64, 10))
    assert readings[:19] == [{}] * 19
    found = readings[19]
    assert found["speed/tokens_per_second"] == pytest.approx(74 * found["speed/images_per_second"])
    assert 0.5 < found["speed/data_share"] <= 1 and "speed/MFU" not in found               # no GPU, no MFU
    train(changed(config, steps=20))
    lines = [json.loads(line) for line in (config.run / "speed.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20] and 0 <= lines[0]["speed/data_share"] < 1


def test_the_watchdog_names_who_is_behind(tmp_path, capsys):
    (tmp_path / "process-00000").write_text("7")
    (tmp_path / "process-00001").write_text("5")
    world = World(torch.device("cpu"), rank=2, size=4)
    with Watchdog(tmp_path, world, 0.2) as watchdog:
        watchdog.beat(7)
        time.sleep(0.1)
        assert not capsys.readouterr().err
        time.sleep(0.5)
    told = capsys.readouterr().err
    assert told.count("no progress") == 1
    assert "0: 7, 1: 5, 2: 7, 3: -1. Furthest behind: 3" in told


@pytest.mark.parametrize("fault", ("flipped byte", "truncated", "missing", "captions"))
def test_a_damaged_shard_is_named_and_made_anew(folder, tmp_path, fault):
    settings = Precompute(source=str(folder), cache=tmp_path / "cache", val_share=0.0, shard_size=3)
    precompute(settings)
    whole = Cache(tmp_path / "cache").contents
    shard = tmp_path / "cache" / "train" / "32x32" / "00001.safetensors"
    content = bytearray(shard.read_bytes())
    if fault == "flipped byte":
        content[-7] ^= 1
        shard.write_bytes(content)
    elif fault == "truncated":
        shard.write_bytes(content[:-20])
    elif fault == "missing":
        shard.unlink()
    else:
        shard.with_suffix(".jsonl").write_text("")
    run = lambda *words: called("train", "verify", tmp_path / "cache", *words)  # noqa: E731
    told = run()
    assert told.returncode == 1 and "00001.safetensors" in told.stdout and "1 damaged shards" in told.stderr
    assert run("--repair").returncode == 0
    with pytest.raises(DataError, match="precompute did not finish"):
        Cache(tmp_path / "cache")
    precompute(settings)
    assert not check(tmp_path / "cache")
    again = Cache(tmp_path / "cache")
    assert again.buckets("train")["32x32"].captions() == [f"picture number {i}" for i in range(10)]
    assert again.contents == whole                       # a run on the cache goes on: the shard has its former place


@pytest.fixture(scope="module")
def hundred_thousand(tmp_path_factory):
    """A cache of 100,000 records with tiny tensors, in three buckets."""
    path, shards = tmp_path_factory.mktemp("many"), {}
    features = [TextFeatures(torch.ones(1, 2), torch.ones(2))]
    for size, count in (("4x4", 60_000), ("4x8", 30_000), ("8x4", 10_000)):
        bucket, latent = f"train/{size}", torch.ones(1, *(int(side) for side in size.split("x")))
        for block, first in enumerate(range(0, count, 5_000)):
            samples = [Sample(i, "", "", latent, features) for i in range(first, first + 5_000)]
            shards.setdefault(bucket, []).append(write_shard(path, f"{bucket}/{block:05d}.safetensors", samples))
    Index({"encoders": [{"kind": "none"}], "sizes": [[4, 4]]}, True, shards).save(path)
    return Cache(path)


def test_plan_and_resume_of_a_hundred_thousand_samples_take_no_time(hundred_thousand):
    """Opened, shuffled, and at any step: no sample is read for it, and no step before it is gone through."""
    cache = Cache(hundred_thousand.path)
    sizes = {name: len(bucket) for name, bucket in cache.buckets("train").items()}
    plan = Plan(sizes, 64, seed=1)
    late = [plan.at(step) for step in (499_999, 250_000, 7)]
    assert sum(sizes.values()) == 100_000
    assert all(bucket._open.cache_info().misses == 0 for bucket in cache.buckets("train").values())
    again = Plan(sizes, 64, seed=1)
    for step, (name, rows) in zip((7, 250_000, 499_999), late[::-1], strict=True):
        found, same = again.at(step)
        assert found == name and (same == rows).all()


def resident():
    """Bytes of this process that are in memory and its own: shards that are read are the system's."""
    kilobytes = {line.split(":")[0]: line.split()[1] for line in Path("/proc/self/status").read_text().splitlines()
                 if line.startswith("Rss")}  # fmt: skip
    return 1024 * int(kilobytes["RssAnon"])


def test_memory_does_not_grow_while_a_hundred_thousand_are_read(hundred_thousand):
    buckets = hundred_thousand.buckets("train")
    objective = Flow(flow.by_name("rf"), 2, 0.464, 0)
    plan = Plan({name: len(bucket) for name, bucket in buckets.items()}, 64, 0)
    with Reader(plan, objective, buckets, ALONE, 1, 2) as reader:
        seen = []
        for step in range(1600):                                            # over 100,000 samples: every shard, twice
            list(reader.parts(step))
            if step % 400 == 399:
                gc.collect()
                seen.append(resident())
    assert seen[-1] - seen[0] < 8e6, seen


def test_speed_of_reading_is_measured_on_samples_of_the_papers_sizes(tmp_path):
    cache = reading.random_cache(tmp_path, samples=6, shard_size=4)
    (entries,) = cache.index.shards.values()
    each = 2 * (16 * 32 * 32 + 77 * (768 + 1280 + 4096) + 768 + 1280)
    assert sum(entry["bytes"] for entry in entries) / 6 == pytest.approx(each, rel=0.01)
    assert reading.samples_per_second(cache, batch=2, batches=3, ahead=1) > 1


def test_what_is_looked_at(config):
    """Losses by level of the average and of the weights, and how sharp attention is."""
    train(changed(config, steps=4, validation=Validation(every=2, samples=8)))
    lines = [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    previews = [line for line in lines if "validation/loss" in line]
    assert [line["step"] for line in previews] == [2, 4]
    levels = [f"t={i / 8:g}" for i in range(1, 9)]
    for look in previews:
        assert {f"{kind}/{level}" for kind in ("validation", "validation_raw") for level in levels} <= look.keys()
        assert look["validation/loss"] != look["validation_raw/loss"], "the average is not the weights"
        # 64 image tokens and up to 7 of text: no more than uniform attention to all of them
        assert 0 < look["attention/entropy"] <= math.log(71) and 0 < look["attention/max_logit"] < 8


def test_wandb_is_told_where_it_is_asked_for(config, monkeypatch):
    """A stand-in for the service: what is sent is what is written, and a run that goes on keeps its name there."""
    sent, begun = [], []

    class Run:
        log = staticmethod(lambda values, step: sent.append((step, values)))
        finish = staticmethod(lambda: sent.append("finished"))

    stand_in = types.ModuleType("wandb")
    stand_in.init = lambda **settings: begun.append(settings) or Run
    stand_in.Image = lambda path: path
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    train(changed(config, steps=2, wandb="mmdit"))
    assert begun[0]["project"] == "mmdit" and begun[0]["resume"] == "allow" and begun[0]["config"]["batch"] == 4
    losses = [step for step, values in sent[:-1] if "train/loss" in values]
    assert losses == [1, 2] and any("samples" in values for _, values in sent[:-1]) and sent[-1] == "finished"
    train(changed(config, steps=2, wandb="mmdit"))
    assert begun[1]["id"] == begun[0]["id"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="wandb is 'mmdit', but the package is not there"):
        train(changed(config, steps=2, wandb="mmdit"))
