"""What the loop knows of an objective: that it draws batches and has a loss, not which one it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mmdit.autoencoder import Unit
from mmdit.flow import Formulation
from train.data.shards import Bucket, Sample

B = TypeVar("B", bound="Batch")
Metrics = dict[str, Tensor]
"""Scalars of a batch by name, each a mean over its samples."""


class Batch(Protocol):
    """What an objective made of some samples."""

    @property
    def samples(self) -> int:
        """How many."""

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of their latents."""

    @property
    def text_tokens(self) -> int:
        """Of a sample that are read, on average."""

    def to(self: B, device: torch.device) -> B:
        """On a device, in fp32 from there on."""

    def pinned(self: B) -> B:
        """In memory from which a GPU copies while it computes."""


class Objective(Protocol):
    """Draws batches and computes a loss. What is random is keyed by seed, step and sample, so no batch, process count
    or resume point changes what a sample sees.

    >>> objective = objectives.of_run(config, cache)                                                # doctest: +SKIP
    >>> loss, metrics = objective.loss(model, objective.draw(bucket, rows, step))                   # doctest: +SKIP
    """

    @property
    def formulation(self) -> Formulation: ...

    @property
    def latents(self) -> Unit:
        """How latents are scaled."""

    def draw(self, bucket: Bucket, rows: np.ndarray, step: int) -> Any:
        """The batch of a step."""

    def at(self, samples: Sequence[Sample], t: float) -> Any:
        """Samples at one time, with noise that never changes: for validation."""

    def warning(self, metrics: dict[str, float]) -> str | None:
        """What the user should know of a run whose metrics are these, averaged over a few steps."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Metrics]:
        """The mean over a batch's samples, scalar fp32, and what else is worth a curve."""
