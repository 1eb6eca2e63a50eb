"""A text encoder without weights."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdit import keyed
from mmdit.encoders.features import TextFeatures


class WordVectors:
    """Fixed random vectors, one per word, plus a sinusoidal code of the word's place. No weights, no vocabulary: the
    vector of a word is drawn from a generator keyed by its spelling. The pooled vector is the bag of words.

    Args: dim: channels of a token and of the pooled vector, even. max_tokens: longer captions are cut.
    """

    beside = False

    def __init__(self, dim: int = 64, max_tokens: int = 77) -> None:
        if dim < 2 or dim % 2:
            raise ValueError(f"WordVectors: dim is {dim}; expected an even number of at least 2")
        self.dim = self.pooled_dim = dim
        self.max_tokens = max_tokens
        place = torch.arange(max_tokens, dtype=torch.float32).unsqueeze(1)
        angles = place * torch.exp(-math.log(1e4) * torch.arange(dim // 2) / (dim // 2))
        self._places = torch.cat([angles.sin(), angles.cos()], 1)
        self._vector = lru_cache(maxsize=65536)(self._draw)

    def _draw(self, word: str) -> Tensor:
        key = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        drawn = keyed.philox(keyed.rounded(key, keyed.digest("word vector")))
        return torch.from_numpy(drawn.standard_normal(self.dim, dtype=np.float32))

    def encode(self, captions: Sequence[str]) -> list[TextFeatures]:
        features = []
        for caption in captions:
            words = re.findall(r"\w+|[^\w\s]", caption.lower())[: self.max_tokens]
            if not words:
                features.append(TextFeatures(torch.zeros(1, self.dim), torch.zeros(self.dim)))
                continue
            vectors = torch.stack([self._vector(word) for word in words])
            features.append(TextFeatures(vectors + self._places[: len(words)], vectors.sum(0) / math.sqrt(len(words))))
        return features

    def spec(self) -> dict[str, Any]:
        return {"kind": "words", "dim": self.dim, "max_tokens": self.max_tokens}
