"""Text encoders by kind: the same one again from what it says of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from mmdit.encoders.features import TextEncoder
from mmdit.encoders.minilm import MiniLM
from mmdit.encoders.openclip import OpenClip
from mmdit.encoders.pretrained import T5, Clip
from mmdit.encoders.words import WordVectors


def _minilm(weights: str | None = None, **arguments: Any) -> MiniLM:
    encoder = MiniLM(**arguments)
    if weights is not None and weights != encoder._weights:
        raise ValueError(f"text encoder minilm: installed weights are {encoder._weights}; the spec names {weights}")
    return encoder


def _from_spec(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Sizes are in a spec so that they can be told without loading the weights."""
    return lambda dim=0, pooled_dim=0, **arguments: kind(**arguments)


def _openclip(dim: int = 0, pooled_dim: int = 0, max_tokens: int = 0, **arguments: Any) -> OpenClip:
    return OpenClip(**arguments)


ENCODERS: dict[str, Callable[..., TextEncoder]] = {
    "words": WordVectors, "minilm": _minilm, "clip": _from_spec(Clip), "t5": _from_spec(T5), "openclip": _openclip,
}  # fmt: skip


def build(spec: dict[str, Any]) -> TextEncoder:
    """The encoder a spec describes. Raises: ValueError for an unknown kind or other weights than the spec names."""
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
