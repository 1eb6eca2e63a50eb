"""From prompts to images with a trained model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from mmdit import autoencoder, checkpoint, flow, keyed, text
from mmdit.model import MMDiT

WEIGHTS = "model.safetensors"     # what a run folder offers for sampling


@dataclass
class Sampler:
    """A model with all that is needed to draw with it."""

    model: MMDiT
    encoders: tuple[text.TextEncoder, ...]
    autoencoder: autoencoder.Autoencoder
    formulation: flow.Formulation
    size: tuple[int, int]
    """Height and width of an image in pixels, unless asked otherwise."""
    shift: float = 1.0
    """alpha of the sampling schedule."""

    @classmethod
    def load(cls, source: str | os.PathLike[str], device: torch.device | str | None = None) -> Sampler:
        """From a run folder or a weights file written by training. Raises: FileNotFoundError, ValueError."""
        path = Path(source)
        if path.is_dir():
            if not (path / WEIGHTS).is_file():
                raise FileNotFoundError(f"{path} holds no {WEIGHTS}: is it a run folder, and has the run saved yet?")
            path = path / WEIGHTS
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, extra = checkpoint.load(path, device)
        return cls.from_extra(model, extra)

    @classmethod
    def from_extra(cls, model: MMDiT, extra: dict[str, Any]) -> Sampler:
        """From the JSON kept beside the weights (see `extra`)."""
        missing = {"encoders", "autoencoder", "formulation", "size", "shift"} - extra.keys()
        if missing:
            raise ValueError(f"these weights do not say how to sample: {sorted(missing)} missing in their metadata")
        return cls(
            model,
            tuple(text.build(spec) for spec in extra["encoders"]),
            autoencoder.build(extra["autoencoder"]),
            flow.by_name(extra["formulation"], extra["shift"]),
            (extra["size"][0], extra["size"][1]),
            extra["shift"],
        )

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        steps: int = 50,
        guidance: float = 5.0,
        size: tuple[int, int] | None = None,
        batch: int = 64,
        progress: bool = False,
        first: int = 0,
    ) -> np.ndarray:
        """Draws one image per prompt.

        Args:
            seed: image i starts from noise keyed by (seed, first + i), whatever the batch.
            steps: Euler steps. guidance: 1 switches classifier-free guidance off (half the work).
            size: (height, width) in pixels.
        Returns: uint8 [len(prompts), height, width, 3].
        Raises: ValueError if size does not fit the model.
        """
        if not prompts:
            raise ValueError("no prompts given; expected at least one")
        height, width = size or self.size
        cell = self.autoencoder.factor * self.model.config.patch_size
        if height % cell or width % cell or height < cell or width < cell:
            raise ValueError(f"size is {height} x {width}; expected multiples of {cell}")
        shape = (self.autoencoder.channels, height // self.autoencoder.factor, width // self.autoencoder.factor)
        images = []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            noise = keyed.normals(shape, seed, "sampling noise", [(first + start + i,) for i in range(len(part))])
            label = f"drawing {start + 1}-{start + len(part)} of {len(prompts)}"
            bar = (lambda steps, label=label: tqdm(steps, desc=label)) if progress else iter
            z = flow.euler(self._field(part, guidance), noise.to(self._device), flow.times(steps, self.shift), bar)
            images.append(autoencoder.to_uint8(self.autoencoder.decode(z)))
        return np.concatenate(images)

    @property
    def _device(self) -> torch.device:
        return self.model.patch_embed.proj.weight.device

    def _field(self, prompts: Sequence[str], guidance: float) -> flow.solvers.VelocityField:
        encoded = [encoder.encode(prompts) for encoder in self.encoders]
        features = [list(sample) for sample in zip(*encoded, strict=True)]
        keep = torch.ones(len(prompts), len(self.encoders), dtype=torch.bool)
        if guidance != 1.0:                       # unconditional: the encoders' outputs zeroed, as in training
            features, keep = features * 2, torch.cat([keep, ~keep])
        text_dtype = self.model.patch_embed.proj.weight.dtype
        context, lengths, pooled = text.assemble(features, self.model.config.context_dim, keep)
        context, pooled = context.to(self._device, text_dtype), pooled.to(self._device, text_dtype)
        lengths = lengths.to(self._device)

        def field(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            output = self.model(z.to(text_dtype), t, context, pooled, lengths)
            return self.formulation.velocity(output, z, t)

        return field if guidance == 1.0 else flow.guided(field, guidance)


def grid(images: np.ndarray, columns: int | None = None, margin: int = 2, scale: int = 1) -> Image.Image:
    """uint8 [N, H, W, 3] as one picture, row by row."""
    count, height, width, _ = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    page = np.full((rows * (height + margin) + margin, columns * (width + margin) + margin, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = margin + i // columns * (height + margin), margin + i % columns * (width + margin)
        page[top : top + height, left : left + width] = image
    picture = Image.fromarray(page)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
