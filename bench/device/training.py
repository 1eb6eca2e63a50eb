"""Does training run on this device? python -m bench.device.training [plain | compiled | resumed | sampled]

    plain      40 steps of a tiny model in bf16 with checkpoints every 10; its losses against those of the CPU in fp32
    compiled   the same with compiled blocks
    resumed    killed in the middle and started again: the same losses as `plain`
    sampled    pictures by replayed CUDA graphs are those without, to the bit

Under torchrun, also with one process, `plain` and `compiled` are spread by FSDP2.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.device.runner import VERDICT
from bench.environment import pretending
from mmdit import presets
from mmdit.sampling import graphs
from mmdit.sampling.sample import Sampler
from train.config import Config, Ema, Optimizer, Parallel, Samples, Validation
from train.data.precompute import precompute
from train.data.settings import Precompute
from train.engine.loop import train

WORK = Path(os.environ.get("WORK", "."))
STEPS, BATCH = (12, 4) if pretending() else (40, 16)                  # interpreted kernels take their time
CLOSE = 0.03                 # relative, of the mean loss of the last ten steps: bf16 against fp32
SAME = 0.003                 # and of two ways to compute in bf16


def config(name: str, device: str = "auto", compiled: bool = False) -> Config:
    """A run of shapes in the tiny preset; its data is made once."""
    cache = WORK / "cache"
    if not cache.is_dir() and int(os.environ.get("RANK", "0")) == 0:
        precompute(Precompute(cache=cache, copies=1, shard_size=100))
    return Config(
        run=WORK / "runs" / name, cache=cache, steps=STEPS, batch=BATCH, checkpoint_every=10, keep=2, log_every=10,
        model=presets.tiny(in_channels=12, context_dim=64, pooled_dim=64, token_pixels=4),
        optimizer=Optimizer(lr=1e-3, warmup=4, eps=1e-8), ema=Ema(decay=0.9, every=2), device=device,                # type: ignore[arg-type]
        precision="fp32" if device == "cpu" else "bf16", validation=Validation(every=20, samples=8),
        samples=Samples(every=20, count=2, steps=2), parallel=Parallel(compile=compiled), threads=2,
    )  # fmt: skip


def losses(made: Config) -> list[float]:
    lines = [json.loads(line) for line in (made.run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def compare(name: str, made: Config, like: Config, close: float) -> int:
    a, b = (losses(one)[-10:] for one in (made, like))
    off = abs(sum(a) / sum(b) - 1)
    print(f"{VERDICT}{name}: mean of the last losses {sum(a) / len(a):.4f}, of {like.run.name} {sum(b) / len(b):.4f}")
    finished = (made.run / "checkpoints" / f"step-{made.steps:08d}").is_dir()
    return int(not (off <= close and finished))


def trained(name: str, compiled: bool = False) -> int:
    spread = "-spread" if "RANK" in os.environ else ""
    made = config(name + spread, compiled=compiled)
    train(made)
    if int(os.environ.get("RANK", "0")):
        return 0
    like, close = config("plain"), SAME
    if name == "plain" and not spread:
        like, close = config("cpu", device="cpu"), CLOSE
        train(like)
    return compare(name + spread, made, like, close)


def resumed() -> int:
    """In a process of its own, which is killed after its first checkpoint."""
    made = config("resumed")
    command = [sys.executable, "-W", "ignore", "-m", "bench.device.training", "run-resumed"]
    process = subprocess.Popen(command)
    while process.poll() is None and not (made.run / "checkpoints" / "step-00000010").is_dir():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    killed = process.wait() == -signal.SIGKILL and not (made.run / "checkpoints" / f"step-{STEPS:08d}").is_dir()
    print(f"{VERDICT}{'killed in the middle' if killed else 'NOT KILLED IN THE MIDDLE'}")
    train(made)
    return compare("resumed", made, config("plain"), 1e-6) or int(not killed)


def sampled() -> int:
    if not (config("plain").run / "model.safetensors").is_file():              # of a call before, and left behind there
        train(config("plain"))
    sampler = Sampler.load(config("plain").run)
    prompts, settings = ["a small red circle on the left", "a large blue square"], {"steps": 6, "guidance": 3.0}
    with_graphs, without = (sampler(prompts, graph=graph, **settings) for graph in (True, False))
    same = bool((with_graphs == without).all())
    captured = len(graphs.of(sampler.model).captured) if torch.cuda.is_available() else 1
    print(f"{VERDICT}sampling by CUDA graphs: {'the same bits' if same else 'OTHER PICTURES'}, {captured} captured")
    return int(not (same and captured))


def main(what: str) -> int:
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = False
    if what == "run-resumed":
        train(dataclasses.replace(config("resumed")))
        return 0
    ways = {"plain": lambda: trained("plain"), "compiled": lambda: trained("compiled", True), "resumed": resumed,
            "sampled": sampled}  # fmt: skip
    return ways[what]()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "plain"))
