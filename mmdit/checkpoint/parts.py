"""What a released single file holds besides the model, under the names that ComfyUI and the released files have; and
files that hold one such part alone (clip_l.safetensors, t5xxl_fp16.safetensors)."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from mmdit.checkpoint.tensors import DTYPES, Source

PARTS = {
    "autoencoder": ("first_stage_model.", "decoder.conv_in.weight"),
    "clip_l": ("text_encoders.clip_l.transformer.", "text_model.embeddings.token_embedding.weight"),
    "clip_g": ("text_encoders.clip_g.transformer.", "text_model.embeddings.token_embedding.weight"),
    "t5xxl": ("text_encoders.t5xxl.transformer.", "shared.weight"),
}
"""Of each part its prefix in a single file, and a tensor that it always has. Alone in a file it has no prefix."""
ITS_OWN = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "text_model.", "text_projection.", "shared.")
"""How a part's names begin; what else may lie beside them (a logit scale, a picture tower) is not read."""


def held(path: str | os.PathLike[str]) -> set[str]:
    """The parts that a single file holds besides its model; none of what is no file."""
    if not Path(path).is_file() or Path(path).suffix != ".safetensors":
        return set()
    names = Source(path).entries
    return {part for part, (prefix, sign) in PARTS.items() if prefix + sign in names}


def read(
    path: str | os.PathLike[str], part: str, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], torch.dtype]:
    """A part's tensors without their prefix, and their dtype: the one given, or that in which most of the part is
    stored, fp8 aside; bf16 if all of it is fp8.

    Raises: FileNotFoundError; ValueError for a file without the part."""
    source, (prefix, sign) = Source(path), PARTS[part]
    prefix = next((p for p in (prefix, "") if p + sign in source.entries), "?")
    whole = {name.removeprefix(prefix): name for name in source.entries if name.startswith(prefix)}
    if not whole:
        raise ValueError(f"{path} holds no {part}: no tensor {PARTS[part][0]}{sign}, nor {sign}")
    names = {n: name for n, name in whole.items() if n.startswith(ITS_OWN) and not n.endswith("position_ids")}
    stored: Counter[str] = Counter()
    for name in names.values():
        stored[source.entries[name].dtype] += torch.Size(source.entries[name].shape).numel()
    known = [DTYPES[kind] for kind, _ in stored.most_common() if kind in DTYPES]
    dtype = dtype or (known[0] if known else torch.bfloat16)
    return {short: source.read(name).to(dtype) for short, name in names.items()}, dtype
