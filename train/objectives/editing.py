"""Instruction editing: a picture before, an instruction, and the picture after, which the model learns to draw (Brooks
et al. 2023, InstructPix2Pix; Esser et al. 2024, appendix D).

Both pictures are scaled alike. Of a share p of the samples the text is zeroed, of another p the picture before, of a
third both, so that guidance can tell what each of the two does (`mmdit.flow.guided_twice`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from mmdit import keyed
from train.data.shards import Bucket, Sample
from train.objectives.flow import FlowBased, FlowBatch
from train.objectives.protocol import Metrics


def apart(batch: FlowBatch) -> FlowBatch:
    """Of latents [B, 2 C, h, w], after and before in channels: the one to draw and the one to edit."""
    after, before = batch.x0.chunk(2, 1)
    return batch._replace(x0=after.contiguous(), reference=before.contiguous())


@dataclass(frozen=True)
class EditingObjective(FlowBased):
    """The objective of a run on edits.

    Args: flow: the loss of the picture after, and what is drawn. dropout: p, of text, of the picture, and of both.
    """

    dropout: float

    def draw(self, bucket: Bucket, rows: np.ndarray, step: int) -> FlowBatch:
        keys = [(step, bucket[int(row)].id) for row in rows]
        u = keyed.uniforms(1, self.flow.seed, "edit dropout", keys)[:, 0]
        no_text = u < 2 * self.dropout
        no_picture = (u >= self.dropout) & (u < 3 * self.dropout)
        batch = apart(self.flow.draw(bucket, rows, step, pictures=2, without_text=no_text))
        assert batch.reference is not None
        batch.reference[no_picture] = 0
        return batch

    def at(self, samples: Sequence[Sample], t: float) -> FlowBatch:
        return apart(self.flow.at(samples, t, pictures=2))

    def loss(self, model: nn.Module, batch: FlowBatch) -> tuple[Tensor, Metrics]:
        return self.flow.loss(model, batch)
