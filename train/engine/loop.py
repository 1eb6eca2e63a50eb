"""The training loop: load, noise, predict, loss, step, log, save."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mmdit.files import write_atomically
from rfkernels.optim import AdamW
from train import objectives
from train.config import Config
from train.config import Optimizer as OptimizerConfig
from train.data.plan import Plan
from train.data.shards import INDEX, Cache
from train.engine import parallel, weights
from train.engine.best import Best
from train.engine.budget import Budget, ProgressBar
from train.engine.checkpoint import Checkpoints
from train.engine.compatibility import check_compatible
from train.engine.ema import EmaWeights
from train.engine.initial import start_from
from train.engine.interrupts import Interrupts
from train.engine.log import Log
from train.engine.metric_warnings import Warnings
from train.engine.muon import Muon, MuonAdamW
from train.engine.nonfinite import Nonfinite
from train.engine.parallel import World
from train.engine.previews import Previews, sampling_extra
from train.engine.reader import Reader
from train.engine.stepping import Stepper, Taken
from train.engine.throughput import Throughput, Watchdog
from train.objectives import Batch, Metrics


@dataclass
class Outcome:
    """How a run ended."""

    step: int
    stopped_by: signal.Signals | None
    """The signal that ended it early, if one did."""


def train(config: Config) -> Outcome:
    """Trains until the budget is spent, or until SIGINT, SIGTERM or SIGUSR1, after which the state is saved.

    Started with torchrun, the run is spread over its processes; losses and weights do not depend on their number. A run
    found in config.run resumes from its newest checkpoint, on any number of processes.
    Raises: DataError for a bad cache; ValueError if the cache does not fit the model, the run folder holds another run,
        another process trains in it, or too many losses in a row are not finite; OSError if a checkpoint cannot be
        written.

    >>> train(Config(run=Path("runs/mine"), cache=Path("cache/shapes"), steps=100)).step            # doctest: +SKIP
    100
    """
    if (config.run / INDEX).is_file():
        raise ValueError(f"run is {config.run}, the folder of a cache; choose another")
    with parallel.world(pick_device(config), config.parallel) as world:
        return train_in(config, world)


def train_in(config: Config, world: World) -> Outcome:
    """`train` for one of several processes."""
    if config.threads:
        torch.set_num_threads(config.threads)
    cache = Cache(config.cache)
    check_compatible(config, cache)
    if config.prior is not None:
        check_compatible(replace(config, cache=config.prior), Cache(config.prior))
    parts = config.parallel.accumulate
    if config.batch < world.size * parts:
        wanted = f"a sample for each of {world.size} x {parts} parts"
        raise ValueError(f"batch is {config.batch}; expected at least {wanted}")
    with parallel.alone(config.run, world):
        return _train(config, world, cache)


def _train(config: Config, world: World, cache: Cache) -> Outcome:
    device, parts = world.device, config.parallel.accumulate
    bf16 = autocasts(config, device)
    store = torch.bfloat16 if bf16 and config.optimizer.weights == "bf16" else torch.float32
    model = parallel.build(config.model, config.parallel, world, config.seed, bf16, config.adapter, store)
    base = weights.base_of(config)
    if config.initial is not None:
        left = start_from(model, config.initial)
        if world.main:
            print(f"started from {config.initial}" + (f"; not in it, or not whole: {', '.join(left)}" if left else ""))
    optimizer = make_optimizer(model, config.optimizer)
    ema = EmaWeights(model, config.ema.decay, config.ema.every)
    objective = objectives.of_run(config, cache)
    training = cache.buckets("train")
    plan = Plan({name: len(bucket) for name, bucket in training.items()}, config.batch, config.seed)

    decides = {**config.decides(), "data": cache.contents, **base}
    if config.prior is not None:
        decides["prior data"] = Cache(config.prior).contents
    checkpoints = Checkpoints(config.run / "checkpoints", config.keep, world)
    progress = checkpoints.restore(model, ema, optimizer, decides)
    log = Log(config, progress.step, world.main)
    if world.main:
        write_atomically(config.run / "config.json", config.to_json().encode())
        log.started(progress.step, config, world)
    extra = sampling_extra(config, cache)
    if progress.step and world.main:
        print(f"resuming {config.run} from step {progress.step}")
    if world.main and not cache.buckets("val"):
        without = "" if config.samples.prompts else ", and nothing is drawn without --samples.prompts"
        print(f"note: {config.cache} holds no validation samples: there is no validation loss{without}")
    best = Best(config, world, extra, progress.step, base)
    preview = Previews(config, cache, world, model, ema, objective, log, lambda: autocast(config, device))

    def save() -> None:
        checkpoints.save(model, ema, optimizer, progress, decides)
        weights.save(weights.file_of(config), model, ema.weights, config, world, extra, base)

    budget, bad = Budget(config, progress.seconds), Nonfinite(config, world)
    stepper = Stepper(model, optimizer, config.optimizer.clip, world)
    throughput = Throughput(config.model, world, config.flops_share)
    watchdog = Watchdog(config.run / "processes", world, config.parallel.watch_seconds)
    reader = Reader(plan, objective, training, world, parts, config.read_ahead)
    shown = ProgressBar(config, progress.step, world.main, budget.fraction(progress.step))
    interrupts, warnings = Interrupts("saving after this step"), Warnings(objective, world)

    def read() -> None:
        """Logs the steps since the last reading: here the host waits for the device."""
        for taken, loss, norm, metrics in stepper.read():
            bad.check(progress, taken.step, loss, norm, plan.at(taken.step))
            values = {"train/loss": loss, "train/gradient_norm": norm, "train/lr": taken.rate * config.optimizer.lr}
            values |= {f"train/{name}": value for name, value in metrics.items()}
            log.write(taken.step + 1, **values)
            shown.advance(loss, taken.fraction)
            warnings.observe(metrics)

    with interrupts, shown, watchdog, checkpoints.finished(), reader:
        model.train()
        stopped = 0
        over = budget.spent(progress.step)
        while not over and not stopped:
            loss, batches = torch.zeros((), device=device), reader.parts(progress.step)
            metrics: Metrics = {}
            for i in range(parts):
                parallel.reduce_gradients(model, i == parts - 1)
                with throughput.waiting():
                    batch = next(batches)
                share = batch.samples / config.batch
                with autocast(config, device):
                    part, others = objective.loss(model, batch)
                (part * share).backward()
                loss += part.detach() * share
                metrics = {name: metrics.get(name, 0) + value.detach() * share for name, value in others.items()}
            rate = schedule(config.optimizer, progress.step, budget.fraction(progress.step))
            stepper(Taken(progress.step, rate, budget.fraction(progress.step + 1)), loss, metrics)

            preview.settled = True
            progress.step += 1
            progress.seconds = budget.seconds()
            ema.update(model, progress.step)
            saves = due(config.checkpoint_every, progress.step)
            draw, check = due(config.samples.every, progress.step), due(config.validation.every, progress.step)
            if due(config.log_every, progress.step) or saves or draw or check:
                read()
            log.speed(progress.step, **throughput.step(config.batch, *tokens(batch, config)))
            watchdog.beat(progress.step)
            if saves:
                save()                                              # before anything that may fail
            if draw or check:
                best.offer(progress.step, preview(progress.step, draw=draw, check=check), model, ema)
            # one clock and any process's signal decide for all
            spent, received = world.largest(budget.spent(progress.step) and world.main, interrupts.received or 0)
            over, stopped = bool(spent), int(received)
        read()
        save()
    if not stopped:                         # also if a former process ended before its last look
        drawn, validated = world.largest(*(seen(progress.step) for seen in (log.drawn, log.validated)))
        best.offer(progress.step, preview(progress.step, draw=not drawn, check=not validated), model, ema)
    log.close()
    log.plot()
    return Outcome(progress.step, signal.Signals(stopped) if stopped else None)


# --- the parts of it --------------------------------------------------------------------------------------------------


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def pick_device(config: Config) -> str:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch sees no GPU; use --device auto or cpu")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def autocasts(config: Config, device: torch.device) -> bool:
    return config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")


def autocast(config: Config, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=autocasts(config, device))


def tokens(batch: Batch, config: Config) -> tuple[int, int]:
    """Image and text tokens of a sample."""
    height, width = batch.latent_size
    return height * width // config.model.patch_size**2, batch.text_tokens


LEAST_EPS = 1e-8            # with states of few bits: below it a root that was rounded down would divide too much


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> Any:
    """AdamW, or Muon for the matrices inside blocks and AdamW for the rest. Weight decay is for matrices."""
    named = parallel.trained(model)
    inside = {n for n, p in named.items() if config.kind == "muon" and n.startswith("blocks.") and p.ndim == 2}
    matrices = [p for n, p in named.items() if p.ndim >= 2 and n not in inside]
    vectors = [p for p in named.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if config.states != "fp32":
        eps = max(config.eps, LEAST_EPS)
        return AdamW(groups, config.lr, config.betas, eps, config.weight_decay, states=config.states)
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    if not inside:
        return adamw
    packed = ("qkv.weight", ".kv.weight")
    pieces = {n: named[n].shape[0] // named[n].shape[1] if n.endswith(packed) else 1 for n in inside}
    by_pieces = [
        {"params": [named[n] for n in sorted(inside) if pieces[n] == count], "pieces": count}
        for count in sorted(set(pieces.values()))
    ]
    return MuonAdamW(Muon(by_pieces, config.muon_lr, weight_decay=config.weight_decay), adamw)


def schedule(config: OptimizerConfig, step: int, spent: float) -> float:
    """Share of the peak learning rate: linear warmup in steps; decay over the share of the budget that is spent."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    decay = {"none": 1.0, "linear": 1 - spent, "cosine": 0.5 * (1 + math.cos(math.pi * spent))}[config.decay]
    return warm * decay
