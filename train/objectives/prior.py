"""Prior preservation: beside each sample one of what the model is not to forget (DreamBooth, arXiv 2208.12242).

    loss = loss of the samples + weight * loss of the prior's samples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmdit import keyed
from train.data.records import DataError
from train.data.shards import Bucket, Cache, Sample
from train.objectives.flow import FlowBased, FlowBatch
from train.objectives.protocol import Metrics


class PriorBatch(NamedTuple):
    """Samples, and as many of the prior."""

    own: FlowBatch
    prior: FlowBatch

    @property
    def samples(self) -> int:
        return self.own.samples

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.own.latent_size

    @property
    def text_tokens(self) -> int:
        return self.own.text_tokens

    def to(self, device: torch.device) -> PriorBatch:
        return PriorBatch(self.own.to(device), self.prior.to(device))

    def pinned(self) -> PriorBatch:
        return PriorBatch(self.own.pinned(), self.prior.pinned())


@dataclass(frozen=True)
class WithPrior(FlowBased):
    """The objective of a run with a prior.

    Args: flow: of both kinds of samples. prior: a cache of pictures that the model is not to forget. weight: of theirs.
    """

    prior: Cache
    weight: float

    def beside(self, like: Tensor) -> Bucket:
        """Of the prior, the pictures of a latent's size. Raises: DataError if there are none."""
        for bucket in self.prior.buckets("train").values():
            if bucket[0].latent.shape == like.shape:
                return bucket
        raise DataError(f"{self.prior.path} holds no pictures of the size {list(like.shape)}, of latents")

    def draw(self, bucket: Bucket, rows: np.ndarray, step: int) -> PriorBatch:
        own = self.flow.draw(bucket, rows, step)
        prior = self.beside(bucket[int(rows[0])].latent)
        keys = [(step, bucket[int(row)].id) for row in rows]
        chosen = keyed.uniforms(1, self.flow.seed, "prior", keys)[:, 0] * len(prior)
        return PriorBatch(own, self.flow.draw(prior, chosen.long().numpy(), step))

    def at(self, samples: Sequence[Sample], t: float) -> FlowBatch:
        return self.flow.at(samples, t)

    def loss(self, model: nn.Module, batch: PriorBatch | FlowBatch) -> tuple[Tensor, Metrics]:
        """Of a validation's batch the samples' alone."""
        if isinstance(batch, FlowBatch):
            return self.flow.loss(model, batch)
        own, _ = self.flow.loss(model, batch.own)
        prior, _ = self.flow.loss(model, batch.prior)
        return own + self.weight * prior, {"own_loss": own, "prior_loss": prior}
