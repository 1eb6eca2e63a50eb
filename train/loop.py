"""The training loop: load, noise, predict, loss, step, log, save."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass
from types import FrameType

import torch
from torch import nn
from tqdm import tqdm

from mmdit import autoencoder, flow, text
from mmdit import checkpoint as weights
from mmdit.files import write_atomically
from mmdit.model import MMDiT
from mmdit.sample import WEIGHTS, Sampler
from train import checkpoint
from train.config import Config
from train.config import Optimizer as OptimizerConfig
from train.data.plan import Plan
from train.data.shards import Cache
from train.data.sources import DataError
from train.ema import EmaWeights
from train.log import Log
from train.objective import Objective
from train.validate import validate


@dataclass
class Outcome:
    """How a run ended."""

    step: int
    stopped_by: signal.Signals | None
    """The signal that ended it early, if one did."""


def train(config: Config) -> Outcome:
    """Trains until the budget is spent, or until SIGINT or SIGTERM, after which the state is saved.

    A run found in config.run goes on from its newest checkpoint.
    Raises: DataError for a bad cache; ValueError if the cache does not fit the model, the run folder holds another run,
        or the loss is not finite.
    """
    device = pick_device(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    cache = Cache(config.cache)
    check_fit(config, cache)

    torch.manual_seed(config.seed)
    model = MMDiT(config.model).to(device)
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
    progress = checkpoint.restore(config.run / "checkpoints", model, ema, optimizer, decides)
    config.run.mkdir(parents=True, exist_ok=True)
    write_atomically(config.run / "config.json", config.to_json().encode())
    log = Log(config.run, progress.step)
    extra = sampling_extra(config, cache)
    if progress.step:
        print(f"going on from step {progress.step} of {config.run}")

    def save() -> None:
        checkpoint.save(config.run / "checkpoints", model, ema, optimizer, progress, decides, config.keep)
        averaged = {**model.state_dict(), **ema.weights}
        weights.save(model, config.run / WEIGHTS, weights=averaged, extra=extra)

    def look(*, draw: bool, check: bool) -> None:
        model.eval()
        with ema.applied(model), autocast(config, device):
            if check and (held_out := cache.buckets("val")):
                v = config.validation
                losses = validate(model, objective, held_out, v.grid, v.samples, config.batch)
                log.write(progress.step, **{f"validation/{name}": loss for name, loss in losses.items()})
            if draw and (prompts := sample_prompts(config, cache)):
                s = config.samples
                sampler = Sampler.from_extra(model, extra)
                log.picture(progress.step, sampler(prompts, steps=s.steps, guidance=s.guidance))
        model.train()

    budget = Budget(config, progress.seconds)
    with Interrupts() as interrupts, ProgressBar(config, progress.step) as bar:
        model.train()
        while not budget.spent(progress.step) and interrupts.received is None:
            name, rows = plan.at(progress.step)
            batch = objective.draw(training[name], rows, progress.step).to(device)
            with autocast(config, device):
                loss = objective.loss(model, batch)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip or math.inf)
            lr = learning_rate(config.optimizer, progress.step, budget.fraction(progress.step))
            for group in optimizer.param_groups:
                group["lr"] = lr
            value = loss.item()
            if not math.isfinite(value) or not math.isfinite(norm):
                raise ValueError(
                    f"step {progress.step}: loss {value}, gradient norm {norm.item()}; the last good state is in "
                    f"{config.run / 'checkpoints'}"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            progress.step += 1
            progress.seconds = budget.seconds()
            ema.update(model, progress.step)
            log.write(progress.step, **{"train/loss": value, "train/gradient_norm": norm.item(), "train/lr": lr})
            bar.advance(value, budget.fraction(progress.step))
            if due(config.checkpoint_every, progress.step):
                save()                                              # before anything that may fail
            draw, check = due(config.samples.every, progress.step), due(config.validation.every, progress.step)
            if draw or check:
                look(draw=draw, check=check)
        save()
    if interrupts.received is None:         # also if a former process ended before its last look
        look(draw=not log.drawn(progress.step), check=not log.validated(progress.step))
    log.close()
    log.plot()
    return Outcome(progress.step, interrupts.received)


# --- the parts of it --------------------------------------------------------------------------------------------------


def due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def pick_device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch sees no GPU; use --device auto or cpu")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(config: Config, device: torch.device) -> torch.autocast:
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


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

    def __init__(self, config: Config, step: int) -> None:
        self._bar = tqdm(
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
    """Remembers SIGINT and SIGTERM while inside, so that the loop can finish its step and save. A second SIGINT ends
    the process at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        print(f"\n{self.received.name}: saving after this step", flush=True)

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)   # type: ignore[arg-type]
