"""Pairs of pictures: how they are read, the loss by its formula, and runs on them."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import logsigmoid

from mmdit import MMDiT, adapters, checkpoint
from mmdit.adapters import Lora
from mmdit.flow import by_name
from train.config import Config, Optimizer, Preference, Samples, Validation
from train.data.precompute import precompute
from train.data.records import DataError
from train.data.settings import Precompute
from train.data.shards import Cache
from train.data.sources import open_source
from train.engine.loop import train
from train.engine.metric_warnings import Warnings
from train.engine.parallel import World
from train.objectives import Flow, PreferenceObjective
from train.objectives.preference import stacked

from . import launching
from .conftest import changed


def picture(value, size=(32, 32)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Twelve pairs: better ones are light, worse ones dark."""
    root = tmp_path / "pairs"
    root.mkdir()
    lines = []
    for i in range(12):
        for kind, value in (("a", 200 + i), ("b", 20 + i)):
            (root / f"{i}{kind}.png").write_bytes(picture(value))
        split = "val" if i < 4 else "train"
        lines.append({"winner": f"{i}a.png", "loser": f"{i}b.png", "caption": f"pair {i}", "split": split})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


@pytest.fixture
def tuned(folder, config, tmp_path):
    cache, base = tmp_path / "cache", tmp_path / "base.safetensors"
    precompute(Precompute(source=str(folder), cache=cache, workers=1))
    torch.manual_seed(0)
    model = MMDiT(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    checkpoint.save(model, base)
    return changed(
        config, cache=cache, initial=base, adapter=Lora(rank=2, targets=("all",)), objective="preference",
        preference=Preference(beta=20.0), optimizer=Optimizer(lr=3e-3, warmup=2), encoder_dropout=0.0,
        validation=Validation(every=0, samples=4), samples=Samples(every=0, count=1, steps=1),
    )  # fmt: skip


# --- data -------------------------------------------------------------------------------------------------------------


def test_a_pair_is_one_sample_with_the_better_picture_first(folder, tuned):
    found = open_source(str(folder))
    assert len(found) == 12 and found.files == 25 and not found.passed
    cache = Cache(tuned.cache)
    latent = cache.buckets("train")["32x32"][0].latent
    assert cache.settings["pictures"] == 2 and latent.shape == (24, 16, 16)
    assert latent[:12].float().mean() > 0.5 and latent[12:].float().mean() < -0.5


def test_a_worse_picture_that_was_replaced_is_seen(folder, tuned):
    (folder / "3b.png").write_bytes(picture(99))
    with pytest.raises(DataError, match=r"3a.png: its picture has changed"):
        precompute(Precompute(source=str(folder), cache=tuned.cache, workers=1))


@pytest.mark.parametrize("names", [("jpg_0", "jpg_1"), ("winner", "loser")])
def test_columns_of_pairs(names, tmp_path):
    """Pick-a-Pic's by its labels, ties counted; without them nobody knows."""
    arrow = pytest.importorskip("pyarrow", reason="extra [parquet] is not installed")
    from pyarrow import parquet

    rows = {names[0]: [picture(1), picture(2), picture(3)], names[1]: [picture(11), picture(12), picture(13)]}
    if names[0] == "jpg_0":
        rows |= {"label_0": [1.0, 0.5, 0.0], "label_1": [0.0, 0.5, 1.0], "caption": ["a", "b", "c"]}
    else:
        rows |= {"text": ["a", "b", "c"]}
    parquet.write_table(arrow.table(rows), tmp_path / "x.parquet")
    found = open_source(str(tmp_path / "x.parquet"))
    values = [[image.getpixel((0, 0))[0] for image in record.read()[0]] for record in found]
    if names[0] == "jpg_0":
        parquet.write_table(arrow.table(rows).drop_columns("label_1"), tmp_path / "y.parquet")
        with pytest.raises(DataError, match=r"y.parquet has no label_1"):
            open_source(str(tmp_path / "y.parquet"))
        assert values == [[1, 11], [13, 3]] and found.passed == {"a tie, or a pair that nobody has judged": 1}
    else:
        assert values == [[1, 11], [2, 12], [3, 13]] and [r.caption for r in found] == ["a", "b", "c"]


def test_pairs_and_single_pictures_are_not_mixed(folder, tuned, config):
    with pytest.raises(ValueError, match="holds pairs of pictures, which the objective flow does not take"):
        train(changed(config, cache=tuned.cache))
    with pytest.raises(ValueError, match="holds single pictures, which the objective preference does not take"):
        train(changed(tuned, cache=config.cache))
    (folder / "alone.png").write_bytes(picture(5))
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"file_name": "alone.png", "caption": "alone"}))
    with pytest.raises(DataError, match=r"pairs of pictures \(\S+\) and single pictures \(\S+\); expected one kind"):
        precompute(Precompute(source=str(folder), cache=tuned.cache.with_name("other"), workers=1))


# --- the loss ---------------------------------------------------------------------------------------------------------


def batch_of(config, **chosen):
    flow = Flow(by_name("rf/lognorm(0,1)"), 64, 0.0, seed=0)
    objective = PreferenceObjective(flow, Preference(**{"beta": 20.0, **chosen}))
    bucket = Cache(config.cache).buckets("train")["32x32"]
    return objective, objective.draw(bucket, np.arange(6), step=3).to(torch.device("cpu"))


def adapted(config):
    model = checkpoint.load(config.initial)
    adapters.attach(model, config.adapter)
    return model.train()


@pytest.mark.parametrize("smoothing", (0.0, 0.2))
@pytest.mark.parametrize("weight", ("constant", "data", "noise"))
def test_the_loss_is_ln_2_at_first_to_the_last_digit(tuned, weight, smoothing):
    objective, batch = batch_of(tuned, beta=5000.0, weight=weight, smoothing=smoothing)
    loss, metrics = objective.loss(adapted(tuned), batch)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["better_over_reference"] == metrics["worse_over_reference"] == metrics["accuracy"] == 0
    assert metrics["norm_ratio"] == 1


def test_a_pair_shares_noise_time_and_text(tuned):
    _, batch = batch_of(tuned)
    both = stacked(batch)
    for value in (both.noise, both.t, both.text.context):
        one, two = value.chunk(2)
        assert torch.equal(one, two)
    assert both.noise.shape == both.x0.shape == (12, 12, 16, 16)


@pytest.mark.parametrize("weight", ("constant", "data", "noise"))
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_the_loss_by_its_formula_in_fp64(tuned, weight, smoothing):
    objective, batch = batch_of(tuned, weight=weight, smoothing=smoothing)
    model = adapted(tuned)
    for _, layer in adapters.layers(model):
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    loss, metrics = objective.loss(model, batch)
    s = stacked(batch)
    t = s.t.double().view(-1, 1, 1, 1)
    z = (1 - t) * s.x0.double() + t * s.noise.double()
    target = s.noise.double() - s.x0.double()
    errors = []
    for enabled in (True, False):
        for _, layer in adapters.layers(model):
            layer.enabled = enabled
        with torch.no_grad():
            v = model(z.float(), s.t, s.text.context, s.text.pooled, s.text.lengths).double()
        errors.append((v - target).square().mean((1, 2, 3)))
    ours, base = errors
    w = {"constant": 1.0, "data": batch.t.double() ** 2, "noise": (1 - batch.t.double()) ** 2}[weight]
    change = (ours - base).chunk(2)
    margin = -20.0 / 2 * w * (change[0] - change[1])
    expected = (-(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["accuracy"].item() == pytest.approx((margin > 0).double().mean().item())


def test_the_safeguard_keeps_the_better_pictures_gradient_a_descent(tuned):
    """Of each pair by itself: what is left of the worse one's gradient along the better one's is (1 - mu) of that."""
    from train.objectives.preference import _safeguarded

    torch.manual_seed(0)
    better = torch.randn(4, 3)
    worse = (torch.tensor([[3.0], [5.0], [2.0], [9.0]]) * better + 0.1 * torch.randn(4, 3)).requires_grad_()
    held = _safeguarded(better, worse, 0.5)
    assert torch.equal(held, worse)                                                    # the value is not touched
    (gradient,) = torch.autograd.grad(held.square().sum() / 2, worse)
    torch.testing.assert_close((better * gradient).sum(1), 0.5 * better.square().sum(1))
    half = _safeguarded(better[:2], worse[:2], 0.5)
    (alone,) = torch.autograd.grad(half.square().sum() / 2, worse)
    assert torch.equal(alone[:2], gradient[:2])                                        # whatever its company
    opposed = (-better).requires_grad_()
    (gradient,) = torch.autograd.grad(_safeguarded(better, opposed, 0.5).square().sum() / 2, opposed)
    assert torch.equal(gradient, opposed)


# --- runs -------------------------------------------------------------------------------------------------------------


def of_run(run, name):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_a_run_learns_the_preference_and_logs_it(tuned):
    train(tuned)
    loss = of_run(tuned.run, "train/loss")
    assert loss[0] == pytest.approx(math.log(2), abs=1e-6) and loss[-1] < loss[0] - 0.05
    assert np.mean(of_run(tuned.run, "train/accuracy")[-4:]) > 0.8
    for name in ("better_over_reference", "worse_over_reference", "norm_ratio"):
        assert len(of_run(tuned.run, f"train/{name}")) == 12


@pytest.mark.parametrize("processes", (2, 4))
def test_losses_do_not_depend_on_the_processes(processes, tuned, tmp_path, launch):
    train(changed(tuned, steps=5))
    spread = changed(tuned, run=tmp_path / "spread", steps=5)
    launch(spread, processes)
    for name in ("train/loss", "train/better_over_reference"):
        assert of_run(spread.run, name) == pytest.approx(of_run(tuned.run, name), rel=1e-3, abs=1e-5)
    assert launching.losses(spread.run)[0]


def test_evaluation_of_a_run_on_pairs_wants_single_pictures(tuned, config):
    from train.evaluate.run import Evaluation, evaluate

    train(changed(tuned, steps=1))
    with pytest.raises(ValueError, match="holds pairs of pictures, which the objective flow does not take"):
        evaluate(Evaluation(tuned.run, images=1, reference=1, steps=1))
    found = evaluate(Evaluation(tuned.run, cache=config.cache, images=1, reference=1, steps=1))
    assert any("validation" in name for name in found)


def test_a_prior_beside_pairs_is_refused(tuned, config):
    with pytest.raises(ValueError, match="expected one of the two"):
        changed(tuned, prior=config.cache)


def test_without_an_adapter_there_is_no_reference(tuned):
    with pytest.raises(ValueError, match=r"objective is preference and adapter.rank 0"):
        changed(tuned, adapter=Lora())
    assert Config.from_json(tuned.to_json()) == tuned


def test_better_pictures_that_get_worse_are_told_once(capsys, tuned):
    objective, _ = batch_of(tuned)
    warnings = Warnings(objective, World(torch.device("cpu")))
    fine = {"better_over_reference": 0.01, "accuracy": 1.0}
    for metrics in (fine, {**fine, "better_over_reference": 0.1}):
        for _ in range(120):
            warnings.observe(metrics)
    said = capsys.readouterr().err
    assert said.count("warning:") == 1 and "above the base's" in said
