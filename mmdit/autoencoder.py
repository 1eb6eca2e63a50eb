"""Autoencoders between images and the latents the model sees, behind one small interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Autoencoder(Protocol):
    @property
    def channels(self) -> int: ...

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel and axis."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> latents [B, channels, H/factor, W/factor]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse; not clamped."""
        ...

    def spec(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class PixelSpace:
    """No autoencoder: a block of factor x factor pixels becomes the channels of one latent pixel. Lossless."""

    factor: int = 1

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"PixelSpace: factor is {self.factor}; expected at least 1")

    @property
    def channels(self) -> int:
        return 3 * self.factor**2

    def encode(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, self.factor)

    def spec(self) -> dict[str, Any]:
        return {"kind": "pixels", "factor": self.factor}


AUTOENCODERS: dict[str, Callable[..., Autoencoder]] = {"pixels": PixelSpace}


def build(spec: dict[str, Any]) -> Autoencoder:
    """The autoencoder a spec describes. Raises: ValueError for an unknown kind."""
    arguments = dict(spec)
    kind = arguments.pop("kind", None)
    if kind not in AUTOENCODERS:
        raise ValueError(f"autoencoder {kind!r} is unknown; expected one of {', '.join(AUTOENCODERS)}")
    return AUTOENCODERS[kind](**arguments)


def to_float(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> fp32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] (clamped) -> uint8 [B, H, W, 3]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
