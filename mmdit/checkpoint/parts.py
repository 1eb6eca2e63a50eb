"""What a released single file holds besides the model, under the names that ComfyUI and the released files have; and
files that hold one such part alone (clip_l.safetensors, t5xxl_fp16.safetensors)."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from mmdit.checkpoint.tensors import DTYPES, FP8, Source

PARTS = {
    "autoencoder": ("first_stage_model.", "decoder.conv_in.weight"),
    "clip_l": ("text_encoders.clip_l.transformer.", "text_model.embeddings.token_embedding.weight"),
    "clip_g": ("text_encoders.clip_g.transformer.", "text_model.embeddings.token_embedding.weight"),
    "t5xxl": ("text_encoders.t5xxl.transformer.", "shared.weight"),
}
"""Of each part its prefix in a single file, and a tensor that it always has. Alone in a file it has no prefix."""


def held(path: str | os.PathLike[str]) -> set[str]:
    """The parts that a single file holds besides its model; none of what is no file."""
    if not Path(path).is_file() or Path(path).suffix != ".safetensors":
        return set()
    names = Source(path).entries
    return {part for part, (prefix, sign) in PARTS.items() if prefix + sign in names}


def read(
    path: str | os.PathLike[str], part: str, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], torch.dtype]:
    """A part's tensors without their prefix, and their dtype: the one given, or as stored (of fp8 that of others, or
    bf16).

    Raises: FileNotFoundError; ValueError for a file without the part, or with several dtypes."""
    source, (prefix, sign) = Source(path), PARTS[part]
    prefix = next((p for p in (prefix, "") if p + sign in source.entries), "?")
    names = {name.removeprefix(prefix): name for name in source.entries if name.startswith(prefix)}
    if not names:
        raise ValueError(f"{path} holds no {part}: no tensor {PARTS[part][0]}{sign}, nor {sign}")
    names = {short: name for short, name in names.items() if not short.endswith("position_ids")}        # no weights
    if dtype is None:
        stored = {source.entries[name].dtype for name in names.values()} - FP8.keys()
        if len(stored) > 1:
            raise ValueError(f"{path}: {part} mixes dtypes ({', '.join(sorted(stored))}); say which one is wanted")
        dtype = DTYPES.get(stored.pop()) if stored else torch.bfloat16
    return {short: source.read(name).to(dtype) for short, name in names.items()}, dtype or torch.float32
