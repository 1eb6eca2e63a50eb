"""Runs started with torchrun, and how two of them are compared."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.config import Samples, Validation

from ..processes import ranks
from .conftest import changed

TRAIN = """
import pickle, sys
from train.engine.loop import train
{before}
if __name__ == "__main__":
    outcome = train(pickle.load(open(sys.argv[1], "rb")))
    sys.exit(outcome.stopped_by or 0)
"""


class Launch:
    """Starts scripts on n processes, in a folder of their own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def start(self, script, argument, processes):
        """The ranks, forked from a process that has imported everything."""
        return ranks(script, [argument], processes)

    def torchrun(self, script, argument, processes, *flags):
        """The process of torchrun, whose workers import everything anew."""
        path = self.folder / "script.py"
        path.write_text(script)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        return subprocess.Popen(
            [*command, *flags, str(path), str(argument)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __call__(self, config, processes, wait=True, before="", torchrun=None):
        """Trains; returns the process, or what it printed. `before`: Python that runs first, in each process;
        `torchrun`: its flags, where it is to start them."""
        where = self.folder / f"{config.run.name}.pickle"
        where.write_bytes(pickle.dumps(config))
        script = TRAIN.format(before=before)
        start = self.start if torchrun is None else self.torchrun
        process = start(script, where, processes, *(torchrun or ()))
        return ended(process) if wait else process

    def workers(self):
        """The processes that torchrun started, by age."""
        found = subprocess.run(["pgrep", "-f", str(self.folder / "script.py")], capture_output=True, text=True).stdout
        parents = subprocess.run(
            ["pgrep", "-f", "torch.distributed.run.*" + str(self.folder)], capture_output=True, text=True
        ).stdout.split()
        return [int(number) for number in found.split() if number not in parents]


def ended(process):
    """What processes printed, once they have ended well."""
    output = said(process)
    assert process.returncode == 0, output[-4000:]
    return output


def said(process):
    """What processes printed, once they have ended."""
    if isinstance(process, subprocess.Popen):
        return process.communicate(timeout=240)[0]
    process.wait()
    return "".join(process.printed())


def until(condition, process, seconds=60):
    """Waits until something is true or the process has ended."""
    for _ in range(20 * seconds):
        if process.poll() is not None or condition():
            return
        time.sleep(0.05)


def logged(run):
    """Steps in a run's log."""
    log = run / "metrics.jsonl"
    return log.read_text().count('"train/loss"') if log.is_file() else 0


def plain(config, run, **more):
    """Ten steps without anything but training."""
    quiet = {"validation": Validation(every=0, samples=6), "samples": Samples(count=1, steps=1)}
    return changed(config, run=run, steps=10, checkpoint_every=5, batch=8, **{**quiet, **more})


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [e["train/loss"] for e in lines if "train/loss" in e], [e for e in lines if "validation/loss" in e]


def agree(one, other, rtol=1e-5, steps=10):
    """Losses of every step, validation, and the exported weights."""
    (a, checks_a), (b, checks_b) = losses(one), losses(other)
    assert len(a) == len(b) == steps
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=rtol, atol=0)
    for x, y in zip(checks_a, checks_b, strict=True):
        assert x == pytest.approx(y, rel=1e-4)
    ours, theirs = (load_file(run / "model.safetensors") for run in (one, other))
    worst = max(
        ((value - theirs[name]).norm() / value.norm().clamp_min(1e-12)).item() for name, value in ours.items()
    )
    assert worst <= rtol, worst
