"""Stratified validation loss: fixed times, fixed noise, one value per time and their mean."""

from __future__ import annotations

import torch
from torch import nn

from train.config import Grid
from train.data.shards import Bucket, Sample
from train.engine.parallel import World
from train.objectives import Objective

LEVELS = 8


def times(grid: Grid) -> tuple[list[float], list[float]]:
    """(times, those the mean is over). See train.config.Validation.grid."""
    if grid == "midpoints":
        levels = [(i + 0.5) / LEVELS for i in range(LEVELS)]
        return levels, levels
    if grid == "mlperf":
        levels = [i / LEVELS for i in range(LEVELS)]
        return levels, levels
    levels = [i / LEVELS for i in range(1, LEVELS + 1)]
    return levels, levels[:-1]


@torch.no_grad()
def validate(
    model: nn.Module, objective: Objective, buckets: dict[str, Bucket], grid: Grid, samples: int, batch: int,
    world: World | None = None,
) -> dict[str, float]:  # fmt: skip
    """{"loss": mean, "t=0.125": loss at that time, ...} over at most `samples` samples, each process a part of them."""
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    device = next(model.parameters()).device
    chosen: dict[str, list[Sample]] = {}
    left = samples
    for name, bucket in buckets.items():
        chosen[name] = [bucket[row] for row in range(min(left, len(bucket)))]
        left -= len(chosen[name])
    levels, averaged = times(grid)
    losses = {}
    for t in levels:
        total = count = 0.0
        for rows in chosen.values():
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch][rank::size]
                asked = part or rows[:1]               # every process computes, or those that do would wait for it
                loss, _ = objective.loss(model, objective.at(asked, t).to(device))
                total += loss.item() * len(part)
                count += len(part)
        if world is not None:
            total, count = world.sums(total, count)
        losses[t] = total / count
    mean = sum(losses[t] for t in averaged) / len(averaged)
    return {"loss": mean, **{f"t={t:g}": loss for t, loss in losses.items()}}
