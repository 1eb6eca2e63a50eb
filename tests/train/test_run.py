import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from mmdit import MMDiT, flow
from train.config import Ema, Optimizer, Samples, Validation
from train.data.shards import Cache
from train.engine.ema import EmaWeights
from train.engine.loop import Budget, schedule, train
from train.engine.storage import Reader
from train.engine.validation import times, validate
from train.objectives import Flow

from ..processes import called
from .conftest import changed
from .launching import said, until


def test_a_run_leaves_what_it_promises(config):
    outcome = train(config)
    assert outcome.step == 12 and outcome.stopped_by is None
    run = config.run
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "train/loss" in e] == list(range(1, 13))
    levels = {k for e in entries for k in e if k.startswith("validation/t=")}
    assert levels == {f"validation/t={i / 8:g}" for i in range(1, 9)}
    assert [e["step"] for e in entries if "validation/loss" in e] == [6, 12]
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-00000008", "step-00000012"]
    assert json.loads((run / "config.json").read_text())["optimizer"]["eps"] == 1e-15
    for picture in ("loss.png", "samples/step-00000012.png"):
        assert (run / picture).stat().st_size > 1000
    assert list((run / "tensorboard").iterdir())


def state_of(run, step=12):
    """All tensors of a checkpoint."""
    path = run / "checkpoints" / f"step-{step:08d}"
    held = Reader(path).read_metadata().state_dict_metadata
    state = {key: torch.empty(m.size, dtype=m.properties.dtype) for key, m in held.items()}
    dcp.load(state, storage_reader=Reader(path), no_dist=True)
    return state


def same(one, two):
    assert one.keys() == two.keys() and one
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("at", (2, 5, 8))
def test_resume_is_bitwise_the_uninterrupted_run(config, tmp_path, killed_at, at):
    train(config)
    other = changed(config, run=tmp_path / "other")
    killed_at(other, at)
    train(other)
    one, two = (load_file(run / "model.safetensors") for run in (config.run, other.run))
    same(one, two)
    same(*(state_of(run) for run in (config.run, other.run)))
    logs = [(run / "metrics.jsonl").read_text().splitlines() for run in (config.run, other.run)]
    assert logs[0] == logs[1], "no step is missing from the log, none is there twice"


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_saves_and_the_same_command_goes_on(config, launch, number):
    long = changed(config, steps=3000, checkpoint_every=3000)
    process = launch(long, 1, wait=False)
    log = config.run / "metrics.jsonl"
    until(lambda: log.is_file() and log.read_text().count("\n") > 5, process)
    os.kill(process.pids[0], number)
    output = said(process)
    assert process.returncode == number, output
    assert "saving after this step" in output
    steps = [int(p.name[5:]) for p in (config.run / "checkpoints").iterdir()]
    assert len(steps) == 1 and steps[0] == log.read_text().count('"train/loss"')


def test_a_run_that_ended_before_its_last_look_is_looked_at(config, monkeypatch):
    def full(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("train.engine.log.Log.picture", full)
        train(changed(config, validation=Validation(every=0, samples=4)))
    assert (config.run / "checkpoints" / "step-00000012").is_dir(), "saved before anything that may fail"
    train(config)
    assert (config.run / "samples" / "step-00000012.png").is_file()
    lines = [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    assert sum("validation/loss" in line for line in lines) == 1
    before = (config.run / "metrics.jsonl").read_text()
    train(config)
    assert (config.run / "metrics.jsonl").read_text() == before, "a finished run stays as it is"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": None, "minutes": 0.0}, "minutes is 0.0"),
        ({"ema": Ema(every=0)}, "ema.every is 0"),
        ({"samples": Samples(steps=0)}, "samples.steps is 0"),
        ({"encoder_dropout": 1.5}, "encoder_dropout is 1.5"),
    ],
)
def test_impossible_settings_are_refused_before_anything_runs(config, change, message):
    with pytest.raises(ValueError, match=message):
        changed(config, **change)


def test_a_run_from_before_a_setting_was_there_goes_on(config):
    train(config)
    about = config.run / "checkpoints" / "step-00000012" / "run.json"
    written = json.loads(about.read_text())
    for name in ("backbone", "conv_blocks"):
        del written["decides"]["model"][name]
    about.write_text(json.dumps(written))
    assert train(config).step == 12


def test_another_configuration_does_not_go_on_in_the_same_folder(config):
    train(config)
    with pytest.raises(ValueError, match=r"other settings \(optimizer\); choose another"):
        train(changed(config, optimizer=Optimizer(lr=2e-3)))
    train(changed(config, keep=1, samples=Samples(count=1, steps=1)))          # these do not decide the weights


def test_a_finished_run_goes_on_to_more_steps_as_if_they_had_been_asked_for(config, tmp_path):
    config = changed(config, optimizer=Optimizer(lr=1e-3, warmup=4))
    train(changed(config, run=tmp_path / "at once", steps=20))
    train(changed(config, run=tmp_path / "later"))
    assert train(changed(config, run=tmp_path / "later", steps=20)).step == 20
    same(state_of(tmp_path / "at once", 20), state_of(tmp_path / "later", 20))


def test_a_decay_that_ends_with_the_budget_cannot_be_moved(config):
    decaying = Optimizer(lr=1e-3, warmup=2, decay="cosine")
    train(changed(config, optimizer=decaying))
    with pytest.raises(ValueError, match=r"other settings \(steps\): its learning rate's decay \(cosine\) ends with"):
        train(changed(config, optimizer=decaying, steps=20))


def test_a_damaged_checkpoint_is_named(config):
    train(config)
    newest = config.run / "checkpoints" / "step-00000012"
    (shard,) = newest.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"step-00000012 is damaged .*; remove it to resume"):
        train(config)
    shutil.rmtree(newest)
    assert train(config).step == 12


def test_a_loss_that_is_not_finite_stops_the_run(config, monkeypatch):
    loss = Flow.loss
    monkeypatch.setattr(Flow, "loss", lambda *a: (loss(*a)[0] * float("nan"), {}))
    with pytest.raises(ValueError, match=r"step 2: loss nan.* the last of 3 in a row; their samples are in"):
        train(changed(config, skip_nonfinite=2))
    found = json.loads((config.run / "nonfinite.json").read_text())
    assert [entry["step"] for entry in found] == [0, 1, 2] and len(found[0]["rows"]) == config.batch


def test_a_step_that_is_not_finite_changes_nothing(config, monkeypatch):
    loss, calls = Flow.loss, []

    def once(*args):
        calls.append(args)
        return loss(*args)[0] * (float("nan") if len(calls) == 3 else 1.0), {}

    monkeypatch.setattr(Flow, "loss", once)
    train(changed(config, validation=Validation(every=0, samples=4)))
    about = json.loads((config.run / "checkpoints" / "step-00000012" / "run.json").read_text())
    assert about["skipped"] == 1 and about["step"] == 12
    assert all(value.isfinite().all() for value in state_of(config.run).values())
    steps = [value.item() for key, value in state_of(config.run).items() if key.endswith(".step")]
    assert set(steps) == {11.0}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"in_channels": 3}, "model.in_channels is 3; the cache .* needs 12"),
        ({"pooled_dim": 32}, "model.pooled_dim is 32; the cache .* needs 64"),
        ({"context_dim": 32}, "model.context_dim is 32; the cache .* needs 64"),
        ({"max_height": 16}, "holds 32 x 32 images; the model's positions end at 16 x 64"),
    ],
)
def test_a_model_that_does_not_fit_the_cache_is_refused(config, change, message):
    model = {**config.model.to_dict(), **change}
    with pytest.raises(ValueError, match=message):
        train(changed(config, model=type(config.model)(**model)))


def test_randomness_is_keyed_by_sample_not_by_batch(config):
    bucket = Cache(config.cache).buckets("train")["32x32"]
    objective = Flow(flow.by_name("rf/lognorm(0,1)"), 64, 0.464, seed=3)
    whole = objective.draw(bucket, np.arange(8), step=5)
    half = objective.draw(bucket, np.arange(4, 8), step=5)
    assert torch.equal(whole.noise[4:], half.noise) and torch.equal(whole.t[4:], half.t)
    assert torch.equal(whole.text.pooled[4:], half.text.pooled)
    later = objective.draw(bucket, np.arange(8), step=6)
    assert not (whole.noise == later.noise).any() and not (whole.t == later.t).any()


def test_each_encoder_is_dropped_with_its_probability(config):
    bucket = Cache(config.cache).buckets("train")["32x32"]
    objective = Flow(flow.by_name("rf"), 64, 0.464, seed=0)
    dropped = [
        not objective.draw(bucket, np.array([i]), step).text.pooled.any() for step in range(40) for i in range(25)
    ]
    assert np.mean(dropped) == pytest.approx(0.464, abs=0.05)


def test_validation_grids():
    assert times("paper") == ([i / 8 for i in range(1, 9)], [i / 8 for i in range(1, 8)])
    assert times("mlperf")[0] == [i / 8 for i in range(8)] == times("mlperf")[1]
    assert times("midpoints")[0] == [(i + 0.5) / 8 for i in range(8)]


def test_validation_does_not_depend_on_the_batch(config):
    buckets = Cache(config.cache).buckets("val")
    objective = Flow(flow.by_name("rf"), 64, 0.464, seed=0)
    model = MMDiT(config.model)
    torch.nn.init.normal_(model.final_layer.unembed.linear.weight, std=0.1)
    one, two = (validate(model, objective, buckets, "paper", 10, batch) for batch in (10, 3))
    assert one == pytest.approx(two, rel=1e-5)
    assert one["loss"] == pytest.approx(sum(one[f"t={i / 8:g}"] for i in range(1, 8)) / 7)


def test_ema_follows_its_definition():
    model = torch.nn.Linear(2, 2)
    ema = EmaWeights(model, decay=0.99, every=100)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    for step in range(1, 201):
        ema.update(model, step)
        moved = 1 - 0.99 ** (step // 100)
        torch.testing.assert_close(ema.weights["weight"], start + moved, msg=f"after step {step}")
    with ema.applied(model):
        torch.testing.assert_close(model.weight.detach(), ema.weights["weight"])
    torch.testing.assert_close(model.weight.detach(), start + 1)
    assert Ema() == Ema(decay=0.99, every=100), "the paper's"


def test_learning_rate_follows_steps_or_minutes(config):
    optimizer = Optimizer(warmup=10, decay="linear")
    rates = [schedule(optimizer, step, step / 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(0.91) and rates[100] == 0
    budget = Budget(changed(config, steps=None, minutes=2.0), seconds=60)
    assert budget.fraction(0) == pytest.approx(0.5, abs=0.01) and not budget.spent(10**9)
    assert Budget(changed(config, steps=None, minutes=2.0), seconds=121).spent(0)
    with pytest.raises(ValueError, match="give exactly one"):
        changed(config, minutes=1.0)


def test_command_line_suggests_the_right_flag():
    done = called("train", "run", "shapes", "--encoder-dropuot", "0.1")
    assert done.returncode != 0 and "--encoder-dropout" in done.stdout + done.stderr
    done = called("train", "precompute", "--source", "/nowhere", "--cache", "/nowhere")
    assert done.returncode == 1 and done.stderr.startswith("error: source '/nowhere' does not exist")


def test_score_of_an_untrained_model_is_at_chance(config):
    from train.evaluate.shapes import score_shapes

    train(changed(config, steps=1))
    result = score_shapes(config.run, images=1, steps=2)
    assert result["all"] <= 0.1
    assert (config.run / "held-out.png").is_file() and json.loads((config.run / "score.json").read_text())["steps"] == 2
