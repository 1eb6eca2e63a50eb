"""Preferences: a better and a worse picture of one caption, and the base, without its adapter, as the reference.

With m the mean squared error of a model's output for a picture at a time and noise that both pictures share, and w(t) a
weight (Wallace et al. 2023, Diffusion-DPO; Esser et al. 2024, appendix C):

    margin = -beta / 2 * w(t) * ((m_better - m_better of the reference) - (m_worse - m_worse of the reference))
    loss = -(1 - smoothing) * log sigmoid(margin) - smoothing * log sigmoid(-margin)

At the first step the model is the reference and the loss log 2, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit import adapters
from mmdit.encoders import Conditioning
from train.config import Preference
from train.data.shards import Bucket, Sample
from train.objectives.flow import FlowBased, FlowBatch
from train.objectives.protocol import Metrics

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like, "data": torch.square, "noise": lambda t: (1 - t) ** 2,
}  # fmt: skip
WORSE = 0.03
"""Share of the reference's error by which better pictures may get worse before it is said."""


def stacked(pairs: FlowBatch) -> FlowBatch:
    """All better pictures, then all worse ones, [2 B, C, h, w], of latents [B, 2 C, h, w] that have both."""
    twice = lambda tensor: torch.cat([tensor, tensor])  # noqa: E731
    x0, text = torch.cat(pairs.x0.chunk(2, 1)), Conditioning(*map(twice, pairs.text))
    return pairs._replace(x0=x0, noise=twice(pairs.noise), t=twice(pairs.t), text=text)


@dataclass(frozen=True)
class PreferenceObjective(FlowBased):
    """The objective of a run on pairs, whose pictures share noise, time and text.

    Args: flow: draws those, keyed by pair. chosen: the loss.
    """

    chosen: Preference

    def draw(self, bucket: Bucket, rows: np.ndarray, step: int) -> FlowBatch:
        return self.flow.draw(bucket, rows, step, pictures=2)

    def at(self, samples: Sequence[Sample], t: float) -> FlowBatch:
        return self.flow.at(samples, t, pictures=2)

    def loss(self, model: nn.Module, batch: FlowBatch) -> tuple[Tensor, Metrics]:
        pairs = stacked(batch)
        z, target = self.formulation.training_pair(pairs.x0, pairs.noise, pairs.t)
        with adapters.off(model):                         # first: checkpointing computes again what was on at the time
            reference = self._output(model, z.detach().requires_grad_(torch.is_grad_enabled()), pairs).detach().float()
        output = self._output(model, z, pairs).float()
        better, worse = (output - target).chunk(2)
        if self.chosen.safeguard is not None:
            worse = _safeguarded(better, worse, self.chosen.safeguard)
        known = (reference - target).square().flatten(1).mean(1).chunk(2)
        errors = [residual.square().flatten(1).mean(1) for residual in (better, worse)]
        change = [error - before for error, before in zip(errors, known, strict=True)]
        weight = WEIGHTS[self.chosen.weight](batch.t)
        margin = -self.chosen.beta / 2 * weight * (change[0] - change[1])
        smoothing = self.chosen.smoothing
        losses = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
        return losses.mean(), {
            "accuracy": (margin > 0).float().mean(),
            "better_over_reference": (errors[0] / known[0]).mean() - 1,
            "worse_over_reference": (errors[1] / known[1]).mean() - 1,
            "norm_ratio": (output.flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)).mean(),
        }

    def warning(self, metrics: dict[str, float]) -> str | None:
        change = metrics["better_over_reference"]
        if not change > WORSE:
            return None
        return (
            f"the better pictures' error is {change:.0%} above the base's: both kinds are getting worse; a smaller "
            "optimizer.lr, a larger preference.beta or preference.safeguard hold it"
        )

    def _output(self, model: nn.Module, z: Tensor, pairs: FlowBatch) -> Tensor:
        output: Tensor = model(z, pairs.t, pairs.text.context, pairs.text.pooled, pairs.text.lengths)
        return output


def _safeguarded(better: Tensor, worse: Tensor, mu: float) -> Tensor:
    """The worse pictures' residuals with a gradient so small that a step along it cannot make the better ones worse
    (Diffusion-SDPO): the share (1 - mu) |g_b|^2 / <g_b, g_w> of it, if that is between 0 and 1. Of each pair by itself:
    no pair's depends on its company."""
    with torch.no_grad():
        along = (better * worse).flatten(1).sum(1)
        share = torch.where(along > 0, ((1 - mu) * better.square().flatten(1).sum(1) / along).clamp(0, 1), 1.0)
    return worse.detach() + share.view(-1, *[1] * (worse.ndim - 1)) * (worse - worse.detach())
