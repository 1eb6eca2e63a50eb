"""A run spread over processes is the run of one: gloo on a CPU, started with torchrun."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from train.config import Parallel, Samples, Validation
from train.loop import train

from .conftest import changed

SCRIPT = """
import pickle, sys
from train.loop import train
if __name__ == "__main__":
    outcome = train(pickle.load(open(sys.argv[1], "rb")))
    sys.exit(outcome.stopped_by or 0)
"""


@pytest.fixture
def launch(tmp_path):
    """Starts a configuration on n processes; returns the process, or its end."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def start(config, processes, wait=True):
        where = tmp_path / f"{config.run.name}.pickle"
        where.write_bytes(pickle.dumps(config))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        process = subprocess.Popen(
            [*command, str(tmp_path / "script.py"), str(where)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if not wait:
            return process
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output[-4000:]
        return process

    return start


def plain(config, run, **more):
    """Ten steps without anything but training."""
    quiet = {"validation": Validation(every=0, samples=6), "samples": Samples(count=1, steps=1)}
    return changed(config, run=run, steps=10, checkpoint_every=5, batch=8, **{**quiet, **more})


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [e["train/loss"] for e in lines if "train/loss" in e], [e for e in lines if "validation/loss" in e]


def agree(one, other, rtol=1e-5):
    """Losses of every step, validation, and the exported weights."""
    (a, checks_a), (b, checks_b) = losses(one), losses(other)
    assert len(a) == len(b) == 10
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=rtol, atol=0)
    for x, y in zip(checks_a, checks_b, strict=True):
        assert x == pytest.approx(y, rel=1e-4)
    ours, theirs = (load_file(run / "model.safetensors") for run in (one, other))
    for name, value in ours.items():
        # AdamW with eps 1e-15 turns a gradient's sign into a step: where it is rounding alone, the step is as well
        off = (value - theirs[name]).norm() / value.norm().clamp_min(1e-12)
        assert off <= 1e-3, f"{name}: {off}"


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory):
    """The run of one process, without torchrun."""
    from mmdit import presets
    from train.config import Config, Ema, Optimizer

    base = Config(
        run=tmp_path_factory.mktemp("alone") / "run", cache=cache, steps=10, device="cpu", threads=1,
        model=presets.tiny(in_channels=12, context_dim=64, pooled_dim=64, token_pixels=4),
        optimizer=Optimizer(lr=1e-3, warmup=4), ema=Ema(decay=0.9, every=2), keep=3,
    )  # fmt: skip
    made = plain(base, base.run)
    train(made)
    return made


@pytest.mark.parametrize(
    "processes, parallel",
    [
        (2, Parallel()),
        (4, Parallel()),
        (2, Parallel(replicas=2)),
        (2, Parallel(accumulate=4)),
        (1, Parallel(accumulate=8, checkpointing="full")),
        (2, Parallel(checkpointing="selective")),
    ],
    ids=("2", "4", "2 replicas", "2 x 4 parts", "1 x 8 parts, full", "2, selective"),
)
def test_losses_and_weights_do_not_depend_on_the_processes(processes, parallel, alone, tmp_path, launch):
    spread = changed(alone, run=tmp_path / "run", parallel=parallel)
    launch(spread, processes)
    agree(alone.run, spread.run)
    about = json.loads((spread.run / "checkpoints" / "step-00000010" / "run.json").read_text())
    assert about["processes"] == processes


@pytest.mark.parametrize("before, after", [(2, 1), (2, 4), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(before, after, alone, tmp_path, launch):
    """The first half on some, the second half on others: the same curve."""
    half = changed(alone, run=tmp_path / "run", steps=5, keep=5)
    launch(half, before)
    assert sorted(p.name for p in (half.run / "checkpoints").iterdir()) == ["step-00000005"]
    # the budget decides the decay of the learning rate; there is none here
    about = half.run / "checkpoints" / "step-00000005" / "run.json"
    written = json.loads(about.read_text())
    written["decides"]["steps"] = 10
    about.write_text(json.dumps(written))
    lines = (half.run / "metrics.jsonl").read_text().splitlines()
    (half.run / "metrics.jsonl").write_text("".join(f"{li}\n" for li in lines if "validation" not in li))
    launch(changed(half, steps=10), after)
    agree(alone.run, half.run)


def a_worker(tmp_path):
    """The process that torchrun started last."""
    found = subprocess.run(["pgrep", "-f", str(tmp_path / "run.pickle")], capture_output=True, text=True).stdout
    return int(found.split()[-1])


def test_a_killed_process_ends_the_run_and_the_next_start_loses_nothing(alone, tmp_path, launch):
    """SIGKILL of one of two in the middle; then two again, to the same weights as undisturbed."""
    disturbed = changed(alone, run=tmp_path / "run", checkpoint_every=1)
    process = launch(disturbed, 2, wait=False)
    log = disturbed.run / "metrics.jsonl"
    for _ in range(1200):
        if process.poll() is not None or (log.is_file() and log.read_text().count("\n") >= 4):
            break
        signal.sigtimedwait([], 0.05)
    os.kill(a_worker(tmp_path), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    launch(disturbed, 2)
    agree(alone.run, disturbed.run)


def test_a_signal_to_one_stops_all_at_the_same_step(alone, tmp_path, launch):
    long = changed(alone, run=tmp_path / "run", steps=5000, checkpoint_every=5000)
    process = launch(long, 2, wait=False)
    log = long.run / "metrics.jsonl"
    for _ in range(1200):
        if process.poll() is not None or (log.is_file() and log.read_text().count("\n") > 4):
            break
        signal.sigtimedwait([], 0.05)
    os.kill(a_worker(tmp_path), signal.SIGUSR1)
    output = process.communicate(timeout=120)[0]
    assert "saving after this step" in output
    (saved,) = (long.run / "checkpoints").iterdir()
    assert int(saved.name[5:]) == log.read_text().count('"train/loss"')


def test_looking_at_the_average_leaves_no_trace_in_the_weights(alone, tmp_path, launch):
    """Validation gathers the average's weights; the step after it must see its own again."""
    looked = changed(alone, run=tmp_path / "run", validation=Validation(every=1, samples=6))
    launch(looked, 2)
    (a, _), (b, checks) = losses(alone.run), losses(looked.run)
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=0)
    assert len(checks) == 10


def test_a_finished_run_that_was_not_drawn_is_drawn_by_two(alone, tmp_path, launch):
    config = changed(alone, run=tmp_path / "run", validation=Validation(every=5, samples=6))
    launch(config, 2)
    (config.run / "samples" / "step-00000010.png").unlink()
    launch(config, 2)
    assert (config.run / "samples" / "step-00000010.png").is_file()


def test_what_fails_later_does_not_take_a_checkpoint_along(alone, tmp_path, monkeypatch):
    import torch.distributed.checkpoint.filesystem as filesystem

    from train import loop

    write = filesystem.FileSystemWriter.write_data
    monkeypatch.setattr(filesystem.FileSystemWriter, "write_data", lambda *a: time.sleep(1) or write(*a))

    def failing(*args):
        raise RuntimeError("validation failed")

    monkeypatch.setattr(loop, "validate", failing)
    config = changed(alone, run=tmp_path / "run", validation=Validation(every=5, samples=6))
    with pytest.raises(RuntimeError, match="validation failed"):
        train(config)
    assert (config.run / "checkpoints" / "step-00000005" / "run.json").is_file()


def test_what_cannot_be_spread_is_said(alone, tmp_path, launch):
    for change, message in (
        ({"parallel": Parallel(replicas=3)}, "parallel.replicas is 3; expected a divisor of the 2 processes"),
        ({"batch": 4, "parallel": Parallel(accumulate=4)}, "expected at least a sample for each of 2 x 4 parts"),
    ):
        process = launch(changed(alone, run=tmp_path / "run", **change), 2, wait=False)
        output = process.communicate(timeout=120)[0]
        assert process.returncode != 0 and message in output


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
    train(config)
    agree(alone.run, config.run)
