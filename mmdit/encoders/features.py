"""What text encoders say of captions, and how that is put together into what MM-DiT reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class TextFeatures(NamedTuple):
    """What an encoder says of one caption."""

    tokens: Tensor
    """[L, dim], L the real length, no padding; fp32 from an encoder, bf16 from a cache."""
    pooled: Tensor
    """[pooled_dim], likewise."""


@torch.no_grad()
def batched(
    features: Callable[[Sequence[str]], tuple[Tensor, Tensor]], captions: Sequence[str], batch: int
) -> list[TextFeatures]:
    """Of captions, `batch` at a time, in fp32 on the CPU."""
    found = []
    for start in range(0, len(captions), batch):
        tokens, pooled = features(captions[start : start + batch])
        found += [TextFeatures(t, p) for t, p in zip(tokens.float().cpu(), pooled.float().cpu(), strict=True)]
    return found


class TextEncoder(Protocol):
    dim: int
    pooled_dim: int
    max_tokens: int
    beside: bool
    """Whether its tokens stand in the channels beside those of the encoder before it, as CLIP-G's beside CLIP-L's, and
    not after them along the sequence."""

    def encode(self, captions: Sequence[str]) -> list[TextFeatures]: ...

    def spec(self) -> dict[str, Any]:
        """JSON from which `build` makes the same encoder, on this machine or another."""
        ...


class Conditioning(NamedTuple):
    """Text as MM-DiT reads it."""

    context: Tensor
    """[B, L, context_dim], zero beyond each sample's length."""
    lengths: Tensor
    """[B] int64; of two streams [B, 2]."""
    pooled: Tensor
    """[B, sum of pooled_dim]."""


def assemble(
    features: Sequence[Sequence[TextFeatures]],
    context_dim: int,
    keep: Tensor | None = None,
    beside: Sequence[bool] | None = None,
    split: int = 0,
) -> Conditioning:
    """Joins the encoders' features: tokens one after another along the sequence, zero-padded to context_dim channels;
    pooled vectors one after another.

    Args:
        features: [samples][encoders].
        keep: [samples, encoders] bool; False zeroes an encoder's tokens and its part of the pooled vector, as the
            paper's encoder dropout does. The tokens stay in the sequence.
        beside: of each encoder, whether its tokens stand in the channels beside those of the one before it.
        split: with two text streams, where the second begins: the last encoder's tokens, whatever the others' length.
    Raises: ValueError if the others' tokens do not fit before it.
    """
    beside = beside or [False] * len(features[0])
    own = [[f.tokens for f, joined in zip(sample, beside, strict=True) if not joined] for sample in features]
    ends = torch.tensor([[sum(map(len, sample[:-1])), sum(map(len, sample))] for sample in own])
    lengths, longest = ends[:, 1], int(ends[:, 1].max())
    if split:
        lengths = torch.stack([ends[:, 0], ends[:, 1] - ends[:, 0]], 1)
        longest = split + int(lengths[:, 1].max())
        if int(ends[:, 0].max()) > split:
            most = int(ends[:, 0].max())
            raise ValueError(f"text: all encoders but the last give {most} tokens; expected {split} at most")
    first = features[0][0]
    last = max(j for j, joined in enumerate(beside) if not joined)
    context = torch.zeros(len(features), longest, context_dim, dtype=first.tokens.dtype)
    pooled = torch.zeros(len(features), sum(f.pooled.numel() for f in features[0]), dtype=first.pooled.dtype)
    for i, sample in enumerate(features):
        row = end = channel = column = 0
        for j, (tokens, vector) in enumerate(sample):
            if not beside[j]:
                row, channel = split if split and j == last else end, 0
            if keep is None or bool(keep[i, j]):
                context[i, row : row + len(tokens), channel : channel + tokens.shape[1]] = tokens
                pooled[i, column : column + len(vector)] = vector
            end, channel, column = row + len(tokens), channel + tokens.shape[1], column + len(vector)
    return Conditioning(context, lengths, pooled)
