"""The training loop: load, noise, predict, loss, step, log, save."""

from __future__ import annotations

import json
import math
import signal
import time
from dataclasses import dataclass
from types import FrameType

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from mmdit import autoencoder, flow, text
from mmdit import checkpoint as weights
from mmdit.files import write_atomically
from mmdit.sample import WEIGHTS, Sampler
from train import parallel
from train.checkpoint import Checkpoints, Progress
from train.config import Config
from train.config import Optimizer as OptimizerConfig
from train.data.plan import Plan
from train.data.shards import Cache
from train.data.sources import DataError
from train.ema import EmaWeights
from train.initial import start_from
from train.log import Log
from train.meter import Meter, Watchdog
from train.objective import Batch, Objective
from train.parallel import World
from train.validate import validate


@dataclass
class Outcome:
    """How a run ended."""

    step: int
    stopped_by: signal.Signals | None
    """The signal that ended it early, if one did."""


def train(config: Config) -> Outcome:
    """Trains until the budget is spent, or until SIGINT, SIGTERM or SIGUSR1, after which the state is saved.

    Started with torchrun, the run is spread over its processes; losses and weights do not depend on their number. A run
    found in config.run goes on from its newest checkpoint, on any number of processes.
    Raises: DataError for a bad cache; ValueError if the cache does not fit the model, the run folder holds another run,
        or too many losses in a row are not finite; OSError if a checkpoint cannot be written.
    """
    with parallel.world(pick_device(config), config.parallel) as world:
        return train_in(config, world)


def train_in(config: Config, world: World) -> Outcome:
    """`train` for one of several processes."""
    device = world.device
    if config.threads:
        torch.set_num_threads(config.threads)
    cache = Cache(config.cache)
    check_fit(config, cache)
    parts = config.parallel.accumulate
    if config.batch < world.size * parts:
        wanted = f"a sample for each of {world.size} x {parts} parts"
        raise ValueError(f"batch is {config.batch}; expected at least {wanted}")

    model = parallel.build(config.model, config.parallel, world, config.seed, autocasts(config, device))
    if config.initial is not None:
        left = start_from(model, config.initial)
        if world.main:
            print(f"started from {config.initial}" + (f"; left as initialised: {', '.join(left)}" if left else ""))
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optimizer.weight_decay),
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=device.type == "cuda",
    )
    ema = EmaWeights(model, config.ema.decay, config.ema.every)
    objective = Objective(
        flow.by_name(config.formulation, config.shift), config.model.context_dim, config.encoder_dropout, config.seed,
        tuple(bool(spec.get("beside")) for spec in cache.settings["encoders"]),
    )  # fmt: skip
    training = cache.buckets("train")
    plan = Plan({name: len(bucket) for name, bucket in training.items()}, config.batch, config.seed)

    decides = {**config.decides(), "data": cache.contents}
    checkpoints = Checkpoints(config.run / "checkpoints", config.keep, world)
    progress = checkpoints.restore(model, ema, optimizer, decides)
    log = Log(config.run, progress.step, world.main)
    if world.main:
        write_atomically(config.run / "config.json", config.to_json().encode())
    extra = sampling_extra(config, cache)
    if progress.step and world.main:
        print(f"going on from step {progress.step} of {config.run}")

    def save() -> None:
        checkpoints.save(model, ema, optimizer, progress, decides)
        averaged = parallel.gathered({**model.state_dict(), **ema.weights}, world)
        if world.main:                                              # one file, so that it is whole or the former one
            weights.save(model, config.run / WEIGHTS, weights=averaged, extra=extra, max_shard_bytes=1 << 62)

    def look(*, draw: bool, check: bool) -> None:
        model.eval()
        with autocast(config, device), ema.applied(model), parallel.resharded(model, settle=not stepped):
            if check and (held_out := cache.buckets("val")):
                v = config.validation
                losses = validate(model, objective, held_out, v.grid, v.samples, config.batch, world)
                log.write(progress.step, **{f"validation/{name}": loss for name, loss in losses.items()})
            if draw and (prompts := sample_prompts(config, cache)):
                s = config.samples
                parallel.gather_root(model)
                sampler = Sampler.from_extra(model, extra)
                log.picture(progress.step, sampler(prompts, steps=s.steps, guidance=s.guidance))
        model.train()

    budget, bad = Budget(config, progress.seconds), Nonfinite(config, world)
    meter = Meter(config.model, world)
    watchdog = Watchdog(config.run / "processes", world, config.parallel.watch_seconds)
    stepped = False
    shown = ProgressBar(config, progress.step, world.main)
    with Interrupts() as interrupts, shown as bar, watchdog, checkpoints.finished():
        model.train()
        stopped = 0
        over = budget.spent(progress.step)
        while not over and not stopped:
            name, rows = plan.at(progress.step)
            value = 0.0
            for i, part in enumerate(np.array_split(world.mine(rows), parts)):
                parallel.reduce_gradients(model, i == parts - 1)
                with meter.waiting():
                    batch = objective.draw(training[name], part, progress.step).to(device)
                with autocast(config, device):
                    loss = objective.loss(model, batch) * (len(part) / config.batch)
                loss.backward()
                value += loss.item()
            norm = gradient_norm(model, config.optimizer.clip)
            lr = learning_rate(config.optimizer, progress.step, budget.fraction(progress.step))
            for group in optimizer.param_groups:
                group["lr"] = lr
            (value,) = world.sums(value)
            if bad.passes(progress, value, norm, (name, rows)):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            stepped = True
            progress.step += 1
            progress.seconds = budget.seconds()
            ema.update(model, progress.step)
            log.write(progress.step, **{"train/loss": value, "train/gradient_norm": norm, "train/lr": lr})
            log.speed(progress.step, **meter.step(config.batch, *tokens(batch, config)))
            bar.advance(value, budget.fraction(progress.step))
            watchdog.beat(progress.step)
            if due(config.checkpoint_every, progress.step):
                save()                                              # before anything that may fail
            draw, check = due(config.samples.every, progress.step), due(config.validation.every, progress.step)
            if draw or check:
                look(draw=draw, check=check)
            # one clock and any process's signal decide for all
            over = bool(world.largest(budget.spent(progress.step) and world.main)[0])
            stopped = int(world.largest(interrupts.received or 0)[0])
        save()
    if not stopped:                         # also if a former process ended before its last look
        drawn, validated = world.largest(*(seen(progress.step) for seen in (log.drawn, log.validated)))
        look(draw=not drawn, check=not validated)
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
    height, width = batch.x0.shape[2:]
    return height * width // config.model.patch_size**2, batch.text.context.shape[1]


def gradient_norm(model: nn.Module, clip: float) -> float:
    """Of all gradients, over all processes; they are scaled down to `clip` if it is above 0."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


class Nonfinite:
    """Passes over steps whose loss or gradient is not finite; after too many in a row the run stops, and what they
    were made of is on disk."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.last: list[dict] = []

    def passes(self, progress: Progress, loss: float, norm: float, batch: tuple[str, np.ndarray]) -> bool:
        """Whether the step may be taken. Raises: ValueError when the limit is passed."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.last.clear()
            return True
        progress.skipped += 1
        found = {"step": progress.step, "loss": str(loss), "gradient_norm": str(norm)}
        self.last.append({**found, "bucket": batch[0], "rows": batch[1].tolist()})
        if len(self.last) > self.config.skip_nonfinite:
            path = self.config.run / "nonfinite.json"
            if self.world.main:
                write_atomically(path, json.dumps(self.last, indent=1).encode())
            raise ValueError(
                f"step {progress.step}: loss {loss}, gradient norm {norm}, the last of {len(self.last)} in a row; "
                f"their samples are in {path}, the last good state in {self.config.run / 'checkpoints'}"
            )
        return False


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def learning_rate(config: OptimizerConfig, step: int, spent: float) -> float:
    """Linear warmup in steps; decay over the share of the budget that is spent."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    decay = {"none": 1.0, "linear": 1 - spent, "cosine": 0.5 * (1 + math.cos(math.pi * spent))}[config.decay]
    return config.lr * warm * decay


def check_fit(config: Config, cache: Cache) -> None:
    """The model must read what the cache holds."""
    settings, model = cache.settings, config.model
    vae = autoencoder.build(settings["autoencoder"])
    dims, pooled = zip(*map(text.sizes, settings["encoders"]), strict=True)
    needed = {
        "in_channels": vae.channels,
        "token_pixels": vae.factor * model.patch_size,
        "pooled_dim": sum(pooled),
        "context_dim": max(model.context_dim, *dims),                           # wider is zero-padded
    }
    for name, need in needed.items():
        if getattr(model, name) != need:
            raise ValueError(f"model.{name} is {getattr(model, name)}; the cache {config.cache} needs {need}")
    if model.weight_sets == 3:
        raise ValueError("model.weight_sets is 3; training joins all encoders' tokens into one stream: use 1 or 2")
    for height, width in settings["sizes"]:
        if height % model.token_pixels or width % model.token_pixels:
            raise ValueError(
                f"the cache {config.cache} holds {height} x {width} images; expected multiples of token_pixels = "
                f"{model.token_pixels}"
            )
        if height > model.max_height or width > model.max_width:
            raise ValueError(
                f"the cache {config.cache} holds {height} x {width} images; the model's positions end at "
                f"{model.max_height} x {model.max_width}"
            )
    if not cache.buckets("train"):
        raise DataError(f"{config.cache} holds no training samples")


def sampling_extra(config: Config, cache: Cache) -> dict:
    """What Sampler needs beside the weights."""
    settings = cache.settings
    return {
        "encoders": settings["encoders"],
        "autoencoder": settings["autoencoder"],
        "formulation": config.formulation,
        "shift": config.shift,
        "size": settings["sizes"][0],
    }


def sample_prompts(config: Config, cache: Cache) -> list[str]:
    if config.samples.prompts:
        return list(config.samples.prompts)
    captions = [c for bucket in cache.buckets("val").values() for c in bucket.captions()]
    return list(dict.fromkeys(captions))[: config.samples.count]


class Budget:
    """Steps or minutes, whichever the configuration names."""

    def __init__(self, config: Config, seconds: float) -> None:
        self._steps, self._minutes = config.steps, config.minutes
        self._before, self._start = seconds, time.monotonic()

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._start

    def fraction(self, step: int) -> float:
        if self._steps is not None:
            return min(1.0, step / self._steps)
        assert self._minutes is not None
        return min(1.0, self.seconds() / (60 * self._minutes))

    def spent(self, step: int) -> bool:
        return self.fraction(step) >= 1.0


class ProgressBar:
    """A bar over steps or over minutes."""

    def __init__(self, config: Config, step: int, shown: bool) -> None:
        self._bar = tqdm(
            disable=not shown,
            total=config.steps or 100,
            initial=step if config.steps else 0,
            desc=config.run.name,
            mininterval=0.5,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {postfix}",
        )
        self._config, self._step, self._average = config, step, math.nan

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, loss: float, fraction: float) -> None:
        self._step += 1
        self._average = loss if math.isnan(self._average) else 0.98 * self._average + 0.02 * loss
        self._bar.set_postfix_str(f"step {self._step}, loss {self._average:.4f}", refresh=False)
        self._bar.update(1 if self._config.steps else round(100 * fraction) - self._bar.n)


class Interrupts:
    """Remembers SIGINT, SIGTERM and SIGUSR1 while inside, so that the loop can finish its step and save. A second
    SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        print(f"\n{self.received.name}: saving after this step", flush=True)

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)   # type: ignore[arg-type]
