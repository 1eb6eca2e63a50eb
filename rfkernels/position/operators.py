"""The registered operators of patch_embed and patch_unembed: each one's forward is a part of the other's backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rfkernels.position import launch, reference
from rfkernels.position.launch import Patches
from rfkernels.registration import Operator
from rfkernels.transforms import pullback


def _strides(weight: Tensor) -> tuple[int, int]:
    """Of a weight [rows, columns, ...] seen as a matrix."""
    return weight.shape[1:].numel(), 1


def _optional(like: Tensor, wanted: bool, shape: Any = None) -> Tensor:
    return like.new_empty((like.shape if shape is None else shape) if wanted else 0)


# --- patch_embed: weight [dim, C, p, p] ------------------------------------------------------------------------------


def _embed(
    latent: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, size: int, dtype: torch.dtype
) -> Tensor:
    patches, weight = Patches(latent, size, True), weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    return launch.to_tokens(patches, weight, _strides(weight), weight.shape[0], bias, positions.contiguous(), dtype)


def _embed_backward(
    dy: Tensor, latent: Tensor, weight: Tensor, wants_latent: bool, wants_weight: bool, wants_bias: bool, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of latent, weight and bias, [0] where not wanted; the last two from one reading of dy."""
    dy, weight = launch.unit(dy), weight.contiguous()
    dlatent, dweight = _optional(latent, wants_latent), _optional(weight, wants_weight)
    dbias = _optional(weight, wants_bias, weight.shape[:1])
    if wants_latent:
        launch.to_latent(dy, Patches(dlatent, size, True), weight, _strides(weight))
    if wants_weight:
        sums = dbias if wants_bias else None
        launch.weight_gradient(dy, Patches(latent, size, True), dweight, _strides(weight), sums)
    elif wants_bias:
        dbias.copy_(dy.sum((0, 1), dtype=torch.float32))
    return dlatent, dweight, dbias


def _save_embed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    latent, weight, _, positions, ctx.size, _ = inputs
    ctx.positions_dtype = positions.dtype
    ctx.save_for_backward(latent, weight)


def _differentiate_embed(ctx: Any, call: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:4]
    made = call(dy, *ctx.saved_tensors, *wanted[:3], ctx.size)
    gradients = [gradient if asked else None for gradient, asked in zip(made, wanted, strict=False)]
    dpositions = dy.sum(0, dtype=torch.float32).to(ctx.positions_dtype) if wanted[3] else None
    return *gradients, dpositions, None, None


def _embed_backward_definition(
    dy: Tensor, latent: Tensor, weight: Tensor, wants_latent: bool, wants_weight: bool, wants_bias: bool, size: int
) -> tuple[Tensor, ...]:
    bias, positions = torch.zeros_like(weight[:, 0, 0, 0]), torch.zeros_like(dy[0])
    made = pullback(reference.patch_embed, (latent, weight, bias, positions, size, dy.dtype), (dy,))
    wanted = (wants_latent, wants_weight, wants_bias)
    return tuple(g if asked else g.new_empty(0) for g, asked in zip(made, wanted, strict=False))


def _tokens(latent: Tensor, weight: Tensor, size: int) -> tuple[int, int, int]:
    return latent.shape[0], (latent.shape[2] // size) * (latent.shape[3] // size), weight.shape[0]


patch_embed = Operator(
    "patch_embed",
    forward_schema="(Tensor latent, Tensor weight, Tensor? bias, Tensor positions, int patch_size,"
    " ScalarType dtype) -> Tensor",
    backward_schema="(Tensor dy, Tensor latent, Tensor weight, bool wants_latent, bool wants_weight, bool wants_bias,"
    " int patch_size) -> (Tensor, Tensor, Tensor)",
    forward=_embed,
    backward=_embed_backward,
    fake_forward=lambda latent, weight, bias, positions, size, dtype: latent.new_empty(
        _tokens(latent, weight, size), dtype=dtype
    ),
    fake_backward=lambda dy, latent, weight, *wanted: (
        _optional(latent, wanted[0]), _optional(weight, wanted[1]), _optional(weight, wanted[2], weight.shape[:1])
    ),
    save=_save_embed,
    differentiate=_differentiate_embed,
    definition=reference.patch_embed,
    backward_definition=_embed_backward_definition,
)  # fmt: skip


# --- patch_unembed: weight [p p C, dim] ------------------------------------------------------------------------------


def _unembed(x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, size: int) -> Tensor:
    weight = weight.contiguous()
    latent = x.new_empty((x.shape[0], weight.shape[0] // size**2, height, width))
    bias = bias if bias is None else bias.contiguous()
    return launch.to_latent(x, Patches(latent, size, False), weight, (1, weight.shape[1]), bias)


def _unembed_backward(
    dlatent: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool, size: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, [0] where not wanted."""
    patches, weight = Patches(dlatent, size, False), weight.contiguous()
    strides = (1, weight.shape[1])
    dx = launch.to_tokens(patches, weight, strides, x.shape[-1]) if wants_x else x.new_empty(0)
    dweight = _optional(weight, wants_weight)
    if wants_weight:
        launch.weight_gradient(x, patches, dweight, strides)
    return dx, dweight


def _save_unembed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, _, ctx.size = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _differentiate_unembed(ctx: Any, call: Any, dlatent: Tensor) -> tuple[Tensor | None, ...]:
    x_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad[:3]
    dx, dweight = call(dlatent, *ctx.saved_tensors, x_wanted, weight_wanted, ctx.size)
    dbias = None
    if bias_wanted:                                   # [p, p, C] of a latent, a hundredth of the tokens' size
        cells = dlatent.unflatten(3, (-1, ctx.size)).unflatten(2, (-1, ctx.size))             # [B, C, h, p, w, p]
        dbias = cells.sum((0, 2, 4), dtype=torch.float32).permute(1, 2, 0).flatten().to(ctx.bias_dtype)
    return dx if x_wanted else None, dweight if weight_wanted else None, dbias, None, None, None


def _unembed_backward_definition(
    dlatent: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool, size: int
) -> tuple[Tensor, ...]:
    made = pullback(reference.patch_unembed, (x, weight, None, *dlatent.shape[2:], size), (dlatent,))
    return tuple(g if wanted else g.new_empty(0) for g, wanted in zip(made, (wants_x, wants_weight), strict=False))


patch_unembed = Operator(
    "patch_unembed",
    forward_schema="(Tensor x, Tensor weight, Tensor? bias, SymInt height, SymInt width, int patch_size) -> Tensor",
    backward_schema="(Tensor dlatent, Tensor x, Tensor weight, bool wants_x, bool wants_weight, int patch_size)"
    " -> (Tensor, Tensor)",
    forward=_unembed,
    backward=_unembed_backward,
    fake_forward=lambda x, weight, bias, height, width, size: x.new_empty(
        (x.shape[0], weight.shape[0] // size**2, height, width)
    ),
    fake_backward=lambda dlatent, x, weight, wants_x, wants_weight, size: (
        _optional(x, wants_x), _optional(weight, wants_weight)
    ),
    save=_save_unembed,
    differentiate=_differentiate_unembed,
    definition=reference.patch_unembed,
    backward_definition=_unembed_backward_definition,
)  # fmt: skip
