"""Starting from the weights of another model: a lower resolution, or one without QK-norm."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmdit import checkpoint
from mmdit.checkpoint.layouts import POSITIONS
from mmdit.model import MMDiT
from train.engine.parallel import like

INPUTS = ("patch_embed.proj.weight", "stages.stem.weight")
"""What reads the latent: columns for a picture to edit come after its own."""


def _of_references(name: str) -> bool:
    return ".reference." in name or name == "reference_embed"


@torch.no_grad()
def start_from(model: MMDiT, source: str | os.PathLike[str]) -> list[str]:
    """Copies the weights of a checkpoint in any layout into a model, spread or not.

    Adapters are left alone. What the model has and the checkpoint has not may be norms of q and k, which stay at one,
    so that training begins near where the other ended, and what reads pictures to edit: channels of the input beside
    the latent's, whose weights are zero, and attentions to references, which take those of the image's own attention
    and add nothing at first. The position table is taken if it has the same places and made anew if not, as for another
    resolution.
    Returns: the names of which the checkpoint says nothing, or not all.
    Raises: ValueError for anything else that does not fit: all of it, by name.
    """
    opened = checkpoint.open_checkpoint(source)
    pieces = opened.pieces()
    ours: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    ours = {name: value for name, value in ours.items() if not name.endswith((".lora_a", ".lora_b"))}
    shapes: dict[str, list[int]] = {}
    for piece in pieces:
        rows = shapes.get(piece.native, [0])[0] + piece.shape[0]
        shapes[piece.native] = [rows, *piece.shape[1:]]
    positions = POSITIONS[0]
    new = [name for name in ours if name not in shapes and _of_references(name)]
    left = [name for name in ours if name not in shapes and name.endswith("_norm.weight")] + new
    if shapes[positions] != list(ours[positions].shape):
        left.append(positions)
        del shapes[positions]
    wider = {name for name in INPUTS if name in shapes and _widened(shapes[name], ours[name], model)}
    problems = [f"missing {name}" for name in ours if name not in shapes and name not in left]
    problems += [f"unknown {name}" for name in shapes if name not in ours]
    problems += [
        f"{name} has shape {shape}, the model's is {list(ours[name].shape)}"
        for name, shape in shapes.items()
        if name in ours and shape != list(ours[name].shape) and name not in wider
    ]
    if problems:
        raise ValueError(f"{opened.source.where} is no start for this model: " + "; ".join(sorted(problems)))
    for name in shapes:
        parameter, spread = ours[name], isinstance(ours[name], DTensor)
        whole = torch.empty(parameter.shape, dtype=parameter.dtype) if spread else parameter
        if name in wider:
            whole.zero_()
        for piece in pieces:
            if piece.native == name:                                      # in its dtype, a piece at a time
                region = whole[piece.first : piece.first + piece.shape[0]]
                (region[:, : piece.shape[1]] if name in wider else region).copy_(opened.read(piece))
        if spread:
            parameter.copy_(like(parameter, whole))
    for name in new:
        if ".proj." not in name and name != "reference_embed":
            ours[name].copy_(ours[name.replace(".reference.", ".attn.")])
    return list(dict.fromkeys([*left, *sorted(wider)]))


def _widened(shape: list[int], parameter: Tensor, model: MMDiT) -> bool:
    """Whether a checkpoint's input lacks no more than the columns of a picture to edit."""
    config, (rows, columns, *kernel) = model.config, parameter.shape
    return columns == config.input_channels > config.in_channels and shape == [rows, config.in_channels, *kernel]
