"""The registered operator of joint attention: schema, fake implementation and autograd, stated once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rfkernels import bias
from rfkernels.joint_attention import launch
from rfkernels.joint_attention.layout import flatten, parse
from rfkernels.joint_attention.stream import Stream
from rfkernels.registration import Operator


def _fake_forward(tensors: list[Tensor], layout: str, scale: float, eps: float) -> list[Tensor]:
    streams = parse(tensors, layout)
    batch, _, heads, _ = streams[0].k.shape
    outs = [s.k.new_empty(s.k.shape) for s in streams if s.asks]
    queries, keys = sum(s.k.shape[1] for s in streams if s.asks), sum(s.k.shape[1] for s in streams)
    norm = all(s.cos is None and s.k_weight is not None and (s.q_weight is not None or not s.asks) for s in streams)
    lse = streams[0].k.new_empty((batch, heads, queries), dtype=torch.float32)
    rstd = lse.new_empty((batch, heads, keys) if norm else (0,))
    return [*outs, lse, rstd]


def _fake_backward(
    grads: list[Tensor], outputs: list[Tensor], tensors: list[Tensor], layout: str, scale: float, eps: float, bias: bool
) -> list[Tensor]:
    streams = parse(tensors, layout)
    wanted = [t for s in streams for t in s.differentiable()]
    sums = [s.k.new_empty((3, *s.k.shape[2:])) for s in streams] if bias else []
    return [*(t.new_empty(t.shape) for t in wanted if t is not None), *sums]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, *ctx.settings = inputs
    ctx.count = len(tensors)
    ctx.bias = launch.summable(ctx.settings[0]) and all(map(bias.wanted, (t for t in tensors if t.ndim == 5)))
    ctx.mark_non_differentiable(*output[-2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, call: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    tensors, outputs = saved[: ctx.count], saved[ctx.count :]
    if all(g is None for g in grads[:-2]):
        return [None] * ctx.count, None, None, None
    given = [torch.zeros_like(o) if g is None else g for g, o in zip(grads[:-2], outputs[:-2], strict=True)]
    found = iter(call(given, outputs, tensors, *ctx.settings, ctx.bias))
    wanted = [t for s in parse(tensors, ctx.settings[0]) for t in s.differentiable()]
    gradients = [None if t is None else next(found) for t in wanted]
    packed = [g for g in gradients if g is not None and g.ndim == 5]
    for gradient, sums in zip(packed if ctx.bias else (), found, strict=True):
        bias.give(gradient, sums)
    return gradients, None, None, None


_triton = Operator(
    "joint_attention",
    forward_schema="(Tensor[] tensors, str layout, float scale, float eps) -> Tensor[]",
    backward_schema="(Tensor[] grads, Tensor[] outputs, Tensor[] tensors, str layout, float scale, float eps,"
    " bool bias) -> Tensor[]",
    forward=launch.forward,
    backward=launch.backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    differentiate=_differentiate,
    after_list=3,
)


def triton_joint_attention(streams: Sequence[Stream], scale: float, eps: float) -> tuple[Tensor | None, ...]:
    tensors, layout = flatten(streams)
    outputs = iter(_triton(tensors, layout, scale, eps))
    return tuple(next(outputs) if s.queries else None for s in streams)
