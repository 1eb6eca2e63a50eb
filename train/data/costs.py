"""What the frozen networks cost, and what it would cost to run them in the training loop: the paper's table 7 for the
user's own encoders and data (python -m train precompute --report ...)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from mmdit import autoencoder
from mmdit.pictures import fit_into
from train.data.encoding import build_autoencoder, build_encoder, caption_of
from train.data.records import DataError
from train.data.settings import Precompute
from train.data.sources import open_source

REPEATS = 5


@dataclass(frozen=True)
class Cost:
    """Of one network."""

    name: str
    memory: int
    """Bytes of its weights."""
    seconds: float
    """Of a forward, per sample."""
    storage: float
    """Bytes of a sample in the cache."""


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of several, after one that is not counted."""
    taken = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def _memory(network: Any) -> int:
    models = [part for part in vars(network).values() if isinstance(part, nn.Module)]
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


def measure(config: Precompute) -> list[Cost]:
    """The autoencoder's cost and each text encoder's, on the first config.batch usable records of the source.

    Raises: DataError if there are none."""
    device = torch.device(config.device)
    usable = (r for r in open_source(config.source, copies=config.copies) if caption_of(r, config.synthetic))
    records = list(islice(usable, config.batch))
    if not records:
        raise DataError(f"source {config.source!r} has no captioned record")
    height, width = config.buckets[0]
    pixels = autoencoder.to_float(np.stack([fit_into(record.image(), height, width) for record in records]))
    captions = [caption_of(record, config.synthetic) or "" for record in records]
    vae = build_autoencoder(config, device)
    latent = vae.encode(pixels[:1])[0]
    kind = str(vae.spec()["kind"])
    found = [Cost(kind, _memory(vae), _seconds(lambda: vae.encode(pixels), device) / len(records), 2 * latent.numel())]
    for name in config.encoders:
        encoder = build_encoder(config, name, device)
        said = encoder.encode(captions)
        stored = sum(2 * (features.tokens.numel() + features.pooled.numel()) for features in said) / len(records)
        seconds = _seconds(lambda encoder=encoder: encoder.encode(captions), device)                # type: ignore[misc]
        found.append(Cost(name, _memory(encoder), seconds / len(records), stored))
    return found


def report(config: Precompute) -> str:
    """The table as text. Its last column: how much longer a training step takes that runs the network itself."""
    costs, height, width = measure(config), *config.buckets[0]
    lines = [
        f"{config.source}, {height} x {width} pixels, {config.batch} samples at a time, on {config.device}; "
        f"a training step of as many: {config.step_ms:g} ms",
        "",
        "| network | memory, MB | ms per sample | kB per sample | step longer by |",
        "|---|---|---|---|---|",
    ]
    total = Cost("all", sum(c.memory for c in costs), sum(c.seconds for c in costs), sum(c.storage for c in costs))
    for cost in (*costs, total):
        share = config.batch * cost.seconds * 1e3 / config.step_ms
        figures = f"{cost.memory / 1e6:.1f} | {cost.seconds * 1e3:.3f} | {cost.storage / 1e3:.1f} | {share:.1%}"
        lines.append(f"| {cost.name} | {figures} |")
    return "\n".join(lines)
