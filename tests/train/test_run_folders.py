"""Folders of runs as people move, copy and tidy them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmdit.__main__ import COMMANDS
from mmdit.devices import pick
from train import report
from train.data.precompute import precompute
from train.data.records import DataError
from train.data.settings import Precompute
from train.engine.loop import train
from train.evaluate.run import Evaluation, evaluate

from .conftest import changed
from .test_layouts import pictures


@pytest.fixture
def finished(config, tmp_path):
    constant = replace(config.optimizer, decay="none")                      # so that it may go on to more steps
    run = changed(config, run=tmp_path / "run", steps=4, checkpoint_every=2, optimizer=constant)
    train(run)
    return run


def checkpoints(run):
    return run.run / "checkpoints"


def test_weights_without_checkpoints_are_not_written_over(finished):
    shutil.rmtree(checkpoints(finished))
    with pytest.raises(ValueError, match=r"run holds model.safetensors of a run, and no checkpoint to resume from"):
        train(changed(finished, steps=6))
    (finished.run / "model.safetensors").unlink()
    assert train(changed(finished, steps=6)).step == 6


def test_a_run_killed_in_its_first_checkpoint_begins_anew(finished):
    shutil.rmtree(checkpoints(finished))
    (checkpoints(finished) / "step-00000002.partial").mkdir(parents=True)
    assert train(finished).step == 4


def test_a_run_whose_first_checkpoint_failed_begins_anew(config, tmp_path, monkeypatch):
    """As one of two processes that waits for the other, which was killed."""
    from train.engine.storage import Writer

    def failing(*_):
        raise OSError("the other is gone")

    run = changed(config, run=tmp_path / "run", steps=2)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="was not written: OSError: the other is gone"):
        patch.setattr(Writer, "write_data", failing)
        train(run)
    assert (run.run / "model.safetensors").is_file()
    assert train(run).step == 2


def test_a_checkpoint_without_its_description_is_damaged(finished):
    (checkpoints(finished) / "step-00000004" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"step-00000004 is damaged \(no run.json\); remove it to resume"):
        train(changed(finished, steps=6))


def test_a_copy_under_another_name_is_none_of_the_runs(finished, capsys):
    shutil.copytree(checkpoints(finished) / "step-00000002", checkpoints(finished) / "step-best")
    train(changed(finished, steps=6))
    assert "from step 4" in capsys.readouterr().out
    assert sorted(p.name for p in checkpoints(finished).iterdir()) == ["step-00000004", "step-00000006", "step-best"]


@pytest.mark.parametrize("name, value", (("step", "five"), ("step", 2.5), ("step", -5), ("seconds", None)))
def test_a_description_that_cannot_be_is_named(name, value, finished):
    about = checkpoints(finished) / "step-00000004" / "run.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), name: value}))
    with pytest.raises(ValueError, match=rf"run.json: {name} is"):
        train(changed(finished, steps=6))


def test_pictures_of_somebody_elses_are_none_of_the_page(finished):
    for name in ("step-abc.png", "step-00000004 copy.png"):
        Image.new("RGB", (8, 8)).save(finished.run / "samples" / name)
    page = report.write(finished.run).read_text()
    assert "step-abc" not in page
    (finished.run / "samples" / "captions.json").write_text("[")
    with pytest.raises(ValueError, match=r"captions.json"):
        report.write(finished.run)


def test_runs_and_caches_do_not_share_a_folder(finished):
    with pytest.raises(ValueError, match="the folder of a cache"):
        train(changed(finished, run=finished.cache))
    with pytest.raises(DataError, match="is a run's folder, no cache"):
        precompute(Precompute(cache=finished.run))


def test_what_nothing_validates_is_said(config, tmp_path, capsys):
    pictures(tmp_path / "in", "0.png", "1.png")
    options = {"sizes": ((32, 32),), "workers": 1, "val_share": 0.0}
    precompute(Precompute(source=str(tmp_path / "in"), cache=tmp_path / "cache", **options))
    run = changed(config, cache=tmp_path / "cache", run=tmp_path / "run", steps=1, batch=2)
    with pytest.raises(ValueError, match="keep_best goes by the validation loss"):
        train(changed(run, keep_best=True))
    train(run)
    assert "no validation loss, and nothing is drawn without --samples.prompts" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing else was asked for"):
        evaluate(Evaluation(run.run))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--weights", "none.safetensors"], "there is no --weights"),
        (["--negative", "blue", "--tiled"], "there is no --negative, --tiled"),
        (["--image", "none.png"], "there is no --image"),
        (["--image-guidance", "3"], "it is for --edit"),
        (["--interval", "2", "3"], r"interval is \(2.0, 3.0\)"),
        (["--device", "potato"], "device is 'potato'"),
    ],
)
def test_flags_that_a_run_would_not_heed_are_refused(flags, message, finished, tmp_path):
    with pytest.raises(ValueError, match=message):
        COMMANDS["sample"]([str(finished.run), "a", "--out", str(tmp_path / "x.png"), "--steps", "2", *flags])
    assert not (tmp_path / "x.png").exists()


def test_a_drawing_that_is_not_finite_is_none(finished, monkeypatch):
    from mmdit.sampling import sample

    sampler = sample.Sampler.load(finished.run, "cpu")
    assert sampler(["a"], steps=2).dtype == np.uint8
    monkeypatch.setattr(sample, "denoise", lambda model, z, *_, **__: z / 0)
    with pytest.raises(ValueError, match="not finite"):
        sampler(["a"], steps=2)


def test_a_device_that_is_not_there_is_named(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick(None).type == pick("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device is cuda:1, but PyTorch sees no GPU"):
        pick("cuda:1")
