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


@torch.no_grad()
def start_from(model: MMDiT, source: str | os.PathLike[str]) -> list[str]:
    """Copies the weights of a checkpoint in any layout into a model, spread or not.

    Adapters are left alone. What the model has and the checkpoint has not may be norms of q and k, which stay at one,
    so that training begins near where the other ended. The position table is taken if it has the same places and made
    anew if not, as for another resolution.
    Returns: the names that were left as they were.
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
    left = [name for name in ours if name not in shapes and name.endswith("_norm.weight")]
    if shapes[positions] != list(ours[positions].shape):
        left.append(positions)
        del shapes[positions]
    problems = [f"missing {name}" for name in ours if name not in shapes and name not in left]
    problems += [f"unknown {name}" for name in shapes if name not in ours]
    problems += [
        f"{name} has shape {shape}, the model's is {list(ours[name].shape)}"
        for name, shape in shapes.items()
        if name in ours and shape != list(ours[name].shape)
    ]
    if problems:
        raise ValueError(f"{opened.source.where} is no start for this model: " + "; ".join(sorted(problems)))
    for name, shape in shapes.items():
        parameter, own = ours[name], [piece for piece in pieces if piece.native == name]
        if not isinstance(parameter, DTensor):                            # in its dtype, a piece at a time
            for piece in own:
                parameter[piece.first : piece.first + piece.shape[0]].copy_(opened.read(piece))
            continue
        whole = torch.empty(shape, dtype=parameter.dtype)
        for piece in own:
            whole[piece.first : piece.first + piece.shape[0]] = opened.read(piece)
        parameter.copy_(like(parameter, whole))
    return left
