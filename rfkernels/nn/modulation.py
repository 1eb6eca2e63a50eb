"""Modulated norms, and where modulation comes from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rfkernels
from rfkernels import checks
from rfkernels.adaln.op import NORMS, Norm
from rfkernels.layers import Device


class AdaLN(nn.Module):
    """``norm(x) * (1 + scale) + shift``; see `rfkernels.adaln`.

    Args:
        channels: None for a norm without parameters, as in diffusion transformers; else it has a `weight` and, if
            "layer", a `bias`, as nn.LayerNorm and nn.RMSNorm do.
        norm: "layer" or "rms". eps: 1e-6, unlike theirs.

    >>> AdaLN()(torch.randn(2, 16, 64), shift=torch.randn(2, 64), scale=torch.randn(2, 64)).shape
    torch.Size([2, 16, 64])
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int | None = None,
        *,
        norm: Norm = "layer",
        eps: float = 1e-6,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        checks.choice(name, "norm", norm, NORMS)
        checks.positive(name, eps=eps)
        if channels is not None:
            checks.positive_int(name, channels=channels)
        self.channels, self.norm, self.eps = channels, norm, eps
        for parameter, wanted in (("weight", channels), ("bias", channels if norm == "layer" else None)):
            made = None if wanted is None else nn.Parameter(torch.empty(wanted, device=device, dtype=dtype))
            self.register_parameter(parameter, made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def settings(self) -> dict[str, Any]:
        return {"weight": self.weight, "bias": self.bias, "norm": self.norm, "eps": self.eps}

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        return rfkernels.adaln(x, shift, scale, **self.settings())

    def extra_repr(self) -> str:
        channels = "" if self.channels is None else f"{self.channels}, "
        return f"{channels}norm={self.norm!r}, eps={self.eps}"


class GatedAdaLN(AdaLN):
    """``h = residual + gate * branch; y = norm(h) * (1 + scale) + shift`` -> (h, y); see `rfkernels.gated_adaln`.

    Args: as for AdaLN.

    >>> residual, branch, vector = torch.randn(2, 16, 64), torch.randn(2, 16, 64), torch.randn(2, 64)
    >>> h, y = GatedAdaLN()(residual, branch, gate=vector, shift=vector, scale=vector)
    """

    def forward(  # type: ignore[override]
        self,
        residual: Tensor,
        branch: Tensor,
        gate: Tensor | None,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return rfkernels.gated_adaln(residual, branch, gate, shift, scale, **self.settings())


class Modulation(nn.Module):
    """SiLU and one projection: the modulation vectors of one consumer, or of all blocks of a model at once.

    adaLN's projections are a third of an MM-DiT's parameters and used once per sample, so one stacked product for all
    blocks reads them at full width, and a sampler can ask for all its timesteps at once: `project` on [steps * B, ...],
    then `split` step by step. Their gradients are written into one tensor, see `rfkernels.chunk_modulation`.

    Args:
        in_features: channels of the conditioning vector.
        width: of a modulation vector.
        counts: how many vectors each consumer takes: (6, 6, ..., 2).

    >>> (shift, scale, gate), final = Modulation(32, 64, counts=(3, 2))(torch.randn(2, 32))
    >>> gate.shape
    torch.Size([2, 64])
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        counts: Sequence[int],
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not counts:
            raise ValueError(f"{name}: counts is empty; expected the number of vectors of each consumer")
        numbers = {f"counts[{i}]": count for i, count in enumerate(counts)}
        checks.positive_int(name, in_features=in_features, width=width, **numbers)
        self.width, self.counts = width, tuple(counts)
        self.linear = nn.Linear(in_features, sum(counts) * width, device=device, dtype=dtype)

    def project(self, c: Tensor) -> Tensor:
        """c [B, in_features] -> [B, sum(counts) * width]."""
        out: Tensor = self.linear(F.silu(c))
        return out

    def split(self, modulation: Tensor) -> list[tuple[Tensor, ...]]:
        """What `project` gave, or rows of it, as one tuple of [B, width] for each consumer."""
        chunks = rfkernels.chunk_modulation(modulation, sum(self.counts))
        return [chunks[end - count : end] for end, count in zip(accumulate(self.counts), self.counts, strict=True)]

    def forward(self, c: Tensor) -> list[tuple[Tensor, ...]]:
        return self.split(self.project(c))

    def extra_repr(self) -> str:
        return f"width={self.width}, vectors={sum(self.counts)} for {len(self.counts)} consumers"
