"""Pretraining and fine-tuning: the loss of a formulation on samples of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmdit import checkpoint, keyed
from mmdit.autoencoder import Unit
from mmdit.encoders import Conditioning, assemble
from mmdit.flow import Formulation
from train.config import Config
from train.data.shards import Bucket, Cache, Sample, unit_of
from train.objectives.protocol import Metrics

AS_STORED = Unit()


def unit_for(config: Config, cache: Cache) -> Unit:
    """How a run scales latents: as the weights that it starts from were trained, or else by its cache's statistics."""
    if not config.unit_latents:
        return AS_STORED
    if config.initial is not None:
        spec = checkpoint.open_checkpoint(config.initial).extra.get("autoencoder", {})
        if spec.get("kind") == "unit":
            return Unit(spec["mean"], spec["std"])
    return unit_of(cache)


class FlowBatch(NamedTuple):
    """What the model is trained on in one step."""

    x0: Tensor
    """[B, C, h, w]; bf16 as in the cache, fp32 after `to`."""
    noise: Tensor
    """[B, C, h, w] fp32."""
    t: Tensor
    """[B] fp32."""
    text: Conditioning
    """bf16 as in the cache, fp32 after `to`."""
    reference: Tensor | None = None
    """[B, C, h, w] of a picture to edit; as x0."""
    text_tokens: int = 0
    """Of a sample that are read, on average: of two text streams padding is not, for one is padded to all its room."""

    @property
    def samples(self) -> int:
        return len(self.t)

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.x0.shape[2], self.x0.shape[3]

    def to(self, device: torch.device) -> FlowBatch:
        """On a device, in fp32 from there on: half as much is copied."""
        x0, noise, t, context, lengths, pooled = (v.to(device, non_blocking=True) for v in (*self[:3], *self.text))
        conditioning = Conditioning(context.float(), lengths, pooled.float())
        reference = None if self.reference is None else self.reference.to(device, non_blocking=True).float()
        return self._replace(x0=x0.float(), noise=noise, t=t, text=conditioning, reference=reference)

    def pinned(self) -> FlowBatch:
        """In memory from which a GPU copies while it computes."""
        x0, noise, t, context, lengths, pooled = (v.pin_memory() for v in (*self[:3], *self.text))
        reference = None if self.reference is None else self.reference.pin_memory()
        text = Conditioning(context, lengths, pooled)
        return self._replace(x0=x0, noise=noise, t=t, text=text, reference=reference)


@dataclass(frozen=True)
class Flow:
    """Draws batches and computes the loss of a formulation."""

    formulation: Formulation
    context_dim: int
    dropout: float
    """Probability of zeroing each text encoder."""
    seed: int
    beside: tuple[bool, ...] | None = None
    """Of each encoder, whether its tokens stand beside those of the one before it."""
    split: int = 0
    """With two text streams, where the second begins."""
    latents: Unit = AS_STORED
    """How latents are scaled."""
    caption_dropout: float = 0.0
    """Probability of zeroing all text encoders at once."""

    @classmethod
    def of(cls, config: Config, cache: Cache, formulation: Formulation) -> Flow:
        """Of a run."""
        beside = tuple(bool(spec.get("beside")) for spec in cache.settings["encoders"])
        model = config.model
        unit = unit_for(config, cache)
        return cls(
            formulation, model.context_dim, config.encoder_dropout, config.seed, beside, model.text_split, unit,
            config.caption_dropout,
        )  # fmt: skip

    def draw(
        self, bucket: Bucket, rows: np.ndarray, step: int, pictures: int = 1, without_text: Tensor | None = None
    ) -> FlowBatch:
        """The batch of a step. Args: pictures: of a sample, which share its noise, time and text. without_text: [B],
        samples whose text is zeroed whatever else drops it."""
        samples = [bucket[int(row)] for row in rows]
        keys = [(step, s.id) for s in samples]
        u = keyed.uniforms(1, self.seed, "time", keys)[:, 0]
        t = self.formulation.density.sample(u).float()
        encoders = len(samples[0].features)
        keep = keyed.uniforms(encoders, self.seed, "encoder dropout", keys) >= self.dropout
        if self.caption_dropout:
            keep &= keyed.uniforms(1, self.seed, "caption dropout", keys) >= self.caption_dropout
        if without_text is not None:
            keep &= ~without_text[:, None]
        return self._batch(samples, t, keep, "noise", keys, pictures)

    def at(self, samples: Sequence[Sample], t: float, pictures: int = 1) -> FlowBatch:
        """Samples at one time, with all text and noise that never changes: for validation."""
        keys = [(round(t * 1e6), s.id) for s in samples]
        return self._batch(samples, torch.full((len(samples),), t), None, "validation noise", keys, pictures)

    def _batch(
        self, samples: Sequence[Sample], t: Tensor, keep: Tensor | None, purpose: str, keys: list[tuple[int, int]],
        pictures: int,
    ) -> FlowBatch:  # fmt: skip
        x0 = self.latents.encode(torch.stack([s.latent for s in samples]))
        noise = keyed.normals((x0.shape[1] // pictures, *x0.shape[2:]), self.seed, purpose, [(*key,) for key in keys])
        features = [s.features for s in samples]
        conditioning = assemble(features, self.context_dim, keep, self.beside, self.split)
        read = conditioning.context.shape[1]
        if conditioning.lengths.ndim == 2:
            read = round(float(conditioning.lengths.sum(1).float().mean()))
        return FlowBatch(x0, noise, t, conditioning, text_tokens=read)

    def loss(self, model: nn.Module, batch: FlowBatch) -> tuple[Tensor, Metrics]:
        """Mean weighted squared error of the batch."""
        z, target = self.formulation.training_pair(batch.x0, batch.noise, batch.t)
        references = {} if batch.reference is None else {"references": [batch.reference]}
        output = model(z, batch.t, batch.text.context, batch.text.pooled, batch.text.lengths, **references)
        return self.formulation.loss(output, target, batch.t), {}

    def warning(self, metrics: dict[str, float]) -> str | None:
        return None


@dataclass(frozen=True)
class FlowBased:
    """An objective that draws by a `Flow` and has a loss of its own."""

    flow: Flow

    @property
    def formulation(self) -> Formulation:
        return self.flow.formulation

    @property
    def latents(self) -> Unit:
        return self.flow.latents

    def warning(self, metrics: dict[str, float]) -> str | None:
        return None
