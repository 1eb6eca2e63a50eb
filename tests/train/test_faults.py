"""What goes wrong at scale, and what is left of it: killed processes, full disks, numbers that are none."""

import json
import os
import random
import signal
import time

import pytest

from mmdit.encoders import WordVectors
from train.config import Parallel, Samples, Validation
from train.data.precompute import precompute
from train.data.records import DataError
from train.data.settings import Precompute
from train.engine.loop import train

from .conftest import changed
from .launching import agree, ended, logged, said, until

KILLS = int(os.environ.get("RFKERNELS_KILLS", "5"))
SLOW_SAVES = """
import time
import torch.distributed.checkpoint.filesystem as filesystem
write = filesystem.FileSystemWriter.write_data
filesystem.FileSystemWriter.write_data = lambda *a: time.sleep(0.3) or write(*a)
"""


def kill(workers, rng):
    """One process of a run, at random. Returns: whether there was one."""
    if workers:
        os.kill(rng.choice(workers), signal.SIGKILL)
    return bool(workers)


def test_killed_at_random_moments_the_run_is_the_undisturbed_one(alone, tmp_path, launch):
    """SIGKILL of one of two, in steps and in saves (which take most of the time here), again and again
    (RFKERNELS_KILLS): the same losses, each step once, and the same weights."""
    rng, finished = random.Random(1), 0
    disturbed = changed(alone, run=tmp_path / "run", checkpoint_every=1)
    in_a_save = 0
    for _ in range(KILLS):
        process = launch(disturbed, 2, wait=False, before=SLOW_SAVES)
        run, before = disturbed.run, logged(disturbed.run)
        until(lambda run=run, before=before: logged(run) != before, process)
        time.sleep(rng.random() * 0.8)
        in_a_save += any((disturbed.run / "checkpoints").glob("*.partial"))
        kill(process.pids, rng)
        said(process)
        if (disturbed.run / "checkpoints" / "step-00000010").is_dir():
            launch(disturbed, 2)
            agree(alone.run, disturbed.run)
            finished += 1
            disturbed = changed(disturbed, run=tmp_path / f"run-{finished}")
    assert in_a_save >= KILLS // 4, "not one was killed in a save"
    launch(disturbed, 2)
    agree(alone.run, disturbed.run)


def test_torchrun_restarts_a_run_by_itself(alone, tmp_path, launch):
    """--max-restarts: three times one process is killed, and all are started again and go on from the last checkpoint,
    though torchrun's store still has the addresses of those before."""
    config = changed(alone, run=tmp_path / "run", checkpoint_every=1)
    process = launch(config, 2, wait=False, before=SLOW_SAVES, torchrun=("--max-restarts", "3"))
    for kills in range(3):
        until(lambda kills=kills: logged(config.run) >= 2 * kills + 2, process)
        assert process.poll() is None and logged(config.run) < 10
        assert kill(launch.workers(), random.Random(kills))
    output = ended(process)
    assert output.count("failed (exitcode: -9)") == 3, "three were killed, and all were started again each time"
    assert "resuming " in output
    agree(alone.run, config.run)


def test_a_signal_to_one_stops_all_at_the_same_step(alone, tmp_path, launch):
    long = changed(alone, run=tmp_path / "run", steps=5000, checkpoint_every=5000)
    process = launch(long, 2, wait=False)
    until(lambda: logged(long.run) > 4, process)
    os.kill(process.pids[-1], signal.SIGUSR1)
    output = said(process)
    assert "saving after this step" in output
    (saved,) = (long.run / "checkpoints").iterdir()
    assert int(saved.name[5:]) == logged(long.run)


LATE_TEXT = """
import os
from train.engine.previews import Previews
encoded = Previews._encoded
Previews._encoded = lambda self: time.sleep(2) or encoded(self)
"""


def test_drawing_while_a_checkpoint_is_written_does_not_hang(alone, tmp_path, launch):
    """Both talk over Gloo, from two threads: over one process group, what one sends the other would receive."""
    samples = Samples(every=5, count=2, steps=1)
    config = changed(
        alone, run=tmp_path / "run", samples=samples, checkpoint_every=5, parallel=Parallel(timeout_minutes=0.5)
    )
    launch(config, 2, before=SLOW_SAVES.replace("0.3", "1.0") + LATE_TEXT)
    agree(alone.run, config.run)


NAN_IN_ONE = """
import os
from train.objectives import Flow
loss, calls = Flow.loss, []
def bad(self, model, batch):
    calls.append(batch)
    wrong = os.environ["RANK"] == "1" and len(calls) in {calls}
    return loss(self, model, batch)[0] * (float("nan") if wrong else 1.0), {}
Flow.loss = bad
"""


def test_nan_in_one_process_is_passed_over_by_all(alone, tmp_path, launch):
    config = changed(alone, run=tmp_path / "run", skip_nonfinite=2)
    launch(config, 2, before=NAN_IN_ONE.replace("{calls}", "(3, 4)"))
    about = json.loads((config.run / "checkpoints" / "step-00000010" / "run.json").read_text())
    assert about["skipped"] == 2
    lines = [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    bad = [line["step"] for line in lines if "train/loss" in line and line["train/loss"] != line["train/loss"]]
    assert bad == [3, 4] and all(line["validation/loss"] < 10 for line in lines if "validation/loss" in line)


def test_nan_in_one_process_that_stays_stops_all_and_names_the_samples(alone, tmp_path, launch):
    config = changed(alone, run=tmp_path / "run", skip_nonfinite=2, checkpoint_every=2)
    process = launch(config, 2, wait=False, before=NAN_IN_ONE.replace("{calls}", "range(5, 50)"))
    output = said(process)
    assert process.returncode != 0 and "the last of 3 in a row; their samples are in" in output
    found = json.loads((config.run / "nonfinite.json").read_text())
    assert [entry["step"] for entry in found] == [4, 5, 6] and len(found[0]["rows"]) == config.batch
    assert (config.run / "checkpoints" / "step-00000006").is_dir(), "weights of before: a bad step changes nothing"


def test_a_cache_without_its_index_or_of_another_encoder_is_refused(alone, tmp_path, monkeypatch):
    """Also where a run has begun: its samples would not be the ones it has seen."""
    cache = tmp_path / "cache"
    precompute(Precompute(cache=cache, copies=1))
    config = changed(alone, run=tmp_path / "run", cache=cache, steps=2)
    train(config)
    (cache / "index.json").rename(cache / "index.gone")
    with pytest.raises(DataError, match=r"is not a precomputed cache \(no index.json\)"):
        train(changed(config, steps=2))
    (cache / "index.gone").rename(cache / "index.json")
    train(changed(config, keep=1))
    monkeypatch.setattr(WordVectors, "spec", lambda self: {"kind": "words", "dim": self.dim, "max_tokens": 76})
    with pytest.raises(DataError, match=r"was made with other settings \(encoders differ\)"):
        precompute(Precompute(cache=cache, copies=1))
    monkeypatch.undo()
    precompute(Precompute(cache=tmp_path / "other", copies=2))
    with pytest.raises(ValueError, match=r"holds a run with other settings \(data\)"):
        train(changed(config, cache=tmp_path / "other"))
    index = (cache / "index.json").read_text()
    (cache / "index.json").write_text(index.replace('"max_tokens": 77', '"max_tokens": 12'))
    with pytest.raises(DataError, match="does not match its settings"):
        train(config)


def test_what_fails_later_does_not_take_a_checkpoint_along(alone, tmp_path, monkeypatch):
    import torch.distributed.checkpoint.filesystem as filesystem

    from train.engine import previews

    write = filesystem.FileSystemWriter.write_data
    monkeypatch.setattr(filesystem.FileSystemWriter, "write_data", lambda *a: time.sleep(1) or write(*a))

    def failing(*args):
        raise RuntimeError("validation failed")

    monkeypatch.setattr(previews, "validate", failing)
    config = changed(alone, run=tmp_path / "run", validation=Validation(every=5, samples=6))
    with pytest.raises(RuntimeError, match="validation failed"):
        train(config)
    assert (config.run / "checkpoints" / "step-00000005" / "run.json").is_file()


def test_a_full_disk_leaves_the_former_checkpoint(alone, tmp_path, monkeypatch):
    """What cannot be written is an error that says so; the run goes on from the one before."""
    import torch.distributed.checkpoint.filesystem as filesystem

    config = changed(alone, run=tmp_path / "run")
    write = filesystem.FileSystemWriter.write_data
    calls = []

    def full(self, *args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(self, *args)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"was not written: OSError.*No space left"):
        patch.setattr(filesystem.FileSystemWriter, "write_data", full)
        train(config)
    names = sorted(p.name for p in (config.run / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000010.partial"]
    assert not list((config.run / "checkpoints" / names[1]).iterdir()), "room for the weights"
    train(config)
    agree(alone.run, config.run)
