"""Pictures to edit, as a model reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from torch import Tensor

from mmdit import pictures
from mmdit.autoencoder import Autoencoder, to_float
from mmdit.config import MMDiTConfig
from mmdit.model import MOST_REFERENCES

if TYPE_CHECKING:
    from PIL import Image

Edit: TypeAlias = "Image.Image | Sequence[Image.Image | Sequence[Image.Image]]"


def encoded(
    edit: Edit | None, count: int, size: tuple[int, int], config: MMDiTConfig, autoencoder: Autoencoder
) -> list[Tensor]:
    """The references of `count` images: latents [count, C, h, w] of the size that is drawn.

    Args:
        edit: PIL images, read as `pictures.shown` does, resized and cropped to the size: one for all, one for each, or
            several for each where the model takes pictures as tokens. None: none.
    Raises: ValueError if the model does not edit, or the counts do not fit.

    >>> config = mmdit.presets.tiny(in_channels=12, reference_channels=12)
    >>> picture = PIL.Image.new("RGB", (64, 48), "red")
    >>> [r.shape for r in encoded(picture, 2, (32, 32), config, mmdit.autoencoder.PixelSpace(2))]
    [torch.Size([2, 12, 16, 16])]
    """
    if edit is None:
        return []
    if not config.takes_references:
        raise ValueError("a picture to edit is given; the model has neither reference_channels nor reference_tokens")
    each = list(edit) if isinstance(edit, (list, tuple)) else [edit]
    if len(each) not in (1, count):
        raise ValueError(f"{len(each)} pictures to edit for {count} images; expected one, or as many")
    sets = [list(one) if isinstance(one, (list, tuple)) else [one] for one in each]
    most = MOST_REFERENCES if config.reference_tokens else config.reference_channels // config.in_channels
    counts = {len(one) for one in sets}
    if len(counts) > 1 or not 1 <= max(counts) <= most:
        raise ValueError(f"{sorted(counts)} pictures to edit for an image; expected one number, from 1 to {most}")
    found = []
    for beside in zip(*sets, strict=True):
        pixels = np.stack([pictures.fit_into(pictures.shown(image), *size) for image in beside])
        latents = autoencoder.encode(to_float(pixels))
        found.append(latents.expand(count, *latents.shape[1:]) if len(latents) == 1 else latents)
    return found
