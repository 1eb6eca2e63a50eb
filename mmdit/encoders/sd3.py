"""The text encoders of Stable Diffusion 3, CLIP-L, CLIP bigG/14 and T5-XXL, and how their features are put together.

Context: [CLIP-L | CLIP-G | zeros] in the channels of the first 77 tokens, then T5's tokens; no mask, padding is
attended to, as in training. Pooled: CLIP-L, CLIP-G. Any of the three may be left out; zeros stand in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmdit.encoders import openclip
from mmdit.encoders.features import Conditioning, TextFeatures, assemble
from mmdit.encoders.openclip import OpenClip
from mmdit.encoders.pretrained import CLIP_TOKENS, T5, Clip
from mmdit.files import read_object


class Sd3Text:
    """The three encoders together, any of them absent.

    Args:
        clip_l, clip_g, t5: encoders, or None.
        context_dim, pooled_dim: of the model that reads them.
        t5_tokens: length of T5's part, present or not.
        device: where encoders run. offload: they wait on the CPU and visit the device one at a time.
    """

    def __init__(
        self,
        clip_l: Clip | OpenClip | None,
        clip_g: Clip | OpenClip | None,
        t5: T5 | None,
        *,
        context_dim: int = 4096,
        pooled_dim: int = 2048,
        t5_tokens: int = 256,
        device: torch.device | str = "cpu",
        offload: bool = False,
    ) -> None:
        self.encoders: tuple[Clip | OpenClip | T5 | None, ...] = (clip_l, clip_g, t5)
        self.context_dim, self.device, self.offload = context_dim, torch.device(device), offload
        known = {0: clip_l, 1: clip_g}
        pooled = [None if e is None else e.pooled_dim for e in known.values()]
        if pooled.count(None) == 2:
            pooled = [768 * pooled_dim // 2048, None]
        widths = [p if p is not None else pooled_dim - sum(q or 0 for q in pooled) for p in pooled]
        if sum(widths) != pooled_dim:
            raise ValueError(f"Sd3Text: pooled vectors of {widths} channels; the model reads {pooled_dim}")
        dims = [w if e is None else e.dim for w, e in zip(widths, known.values(), strict=True)]
        if sum(dims) > context_dim or (t5 is not None and t5.dim > context_dim):
            given = [*dims, None if t5 is None else t5.dim]
            raise ValueError(f"Sd3Text: the encoders have {given} channels; the model reads {context_dim}")
        if t5 is not None:
            t5.max_tokens = t5_tokens
        shapes = [(CLIP_TOKENS, dims[0], widths[0]), (CLIP_TOKENS, dims[1], widths[1]), (t5_tokens, context_dim, 0)]
        self._absent = [TextFeatures(torch.zeros(n, d), torch.zeros(p)) for n, d, p in shapes]
        if not offload:
            for encoder in self.encoders:
                if encoder is not None:
                    encoder.model.to(self.device)

    @contextmanager
    def _visiting(self, encoder: Clip | OpenClip | T5) -> Iterator[None]:
        if self.offload:
            encoder.model.to(self.device)
        try:
            yield
        finally:
            if self.offload:
                encoder.model.to("cpu")

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """[B, 77 + t5_tokens, context_dim], the lengths, and [B, pooled_dim]; fp32 on the CPU."""
        columns = []
        for encoder, absent in zip(self.encoders, self._absent, strict=True):
            if encoder is None:
                columns.append([absent] * len(prompts))
                continue
            with self._visiting(encoder):
                columns.append(encoder.encode(prompts))
        return assemble(list(zip(*columns, strict=True)), self.context_dim, beside=(False, True, False))

    def zeros(self, count: int) -> Conditioning:
        """Every encoder's output zeroed: the paper's unconditional."""
        return assemble([self._absent] * count, self.context_dim, beside=(False, True, False))


def clip(source: str, tokenizer: str = "", *, part: str, **settings: Any) -> Clip | OpenClip:
    """CLIP-L or CLIP-G ("clip_l", "clip_g") of Stable Diffusion 3, from a folder of transformers or of open_clip, or a
    single file."""
    if openclip.is_one(Path(source)):
        return OpenClip(source, part)
    if Path(source).is_file() or not tokenizer:
        settings |= {"part": part, "projected": part == "clip_g"}
    return Clip(source, tokenizer, beside=part == "clip_g", **settings)


def from_folder(folder: Path, names: Sequence[str], make: Callable[..., Any]) -> Any:
    """An encoder of a pipeline's folder, or None where it, or its entry in the index, is absent."""
    encoder, tokenizer = names
    index = folder / "model_index.json"
    listed = read_object(index).get(encoder, [""]) if index.is_file() else [""]
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{index}: {encoder} is {listed!r}; expected a library and a class")
    if not (folder / encoder).is_dir() or listed[0] is None:
        return None
    return make(str(folder / encoder), str(folder / tokenizer))
