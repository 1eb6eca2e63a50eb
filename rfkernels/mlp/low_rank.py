"""gelu_mlp of frozen layers with low-rank parts: it keeps its pre-activation only, as without them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfkernels import dispatch
from rfkernels.autocast import to_autocast
from rfkernels.bias import linear
from rfkernels.layers import LoraLinear, adapted, plain
from rfkernels.mlp.fused import gelu_backward
from rfkernels.transforms import pullback, transforming

Layer = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""weight, bias, A and B; the last two None of a layer without a low-rank part."""


def takes(*layers: nn.Module) -> bool:
    """Whether layers are linear ones that this serves: one of them with a low-rank part that is on, of all its rows and
    without dropout, and nothing but that part to be trained."""

    def simple(layer: LoraLinear) -> bool:
        frozen = not layer.weight.requires_grad and (layer.bias is None or not layer.bias.requires_grad)
        return frozen and layer.parts == (0,) and not (layer.dropout and layer.training)

    on = [layer for layer in layers if adapted(layer)]
    others = [layer for layer in layers if layer not in on]
    frozen = all(plain(layer) and not any(p.requires_grad for p in layer.parameters()) for layer in others)
    return len(on) > 0 and frozen and all(map(simple, on))                                              # type: ignore[arg-type]


def gelu_mlp(x: Tensor, fc1: nn.Linear, fc2: nn.Linear) -> Tensor:
    """``fc2(gelu(fc1(x)))``; x [..., C], layers that `takes` takes."""
    tensors = tuple(t for layer in (fc1, fc2) for t in _tensors(layer))
    scales = (getattr(fc1, "scaling", 1.0), getattr(fc2, "scaling", 1.0))
    w1, b1, _, _, w2, b2, _, _ = tensors
    backend = dispatch.choose("gelu_mlp", x, w1, b1, w2, b2).backend
    if transforming() or backend == "reference" or not torch.is_grad_enabled():
        return definition(scales, x, *tensors)
    out: Tensor = _LowRankMlp.apply(backend == "native", scales, *to_autocast(x, *tensors))
    return out


def _tensors(layer: nn.Module) -> Layer:
    weight: Any = layer.weight
    bias: Any = layer.bias
    if not isinstance(layer, LoraLinear) or not layer.enabled:
        return weight, bias, None, None
    factors: list[Tensor] = [layer.lora_a, layer.lora_b]
    if not torch.is_autocast_enabled(weight.device.type):                 # which would give all of them one dtype
        factors = [factor.to(weight.dtype) for factor in factors]
    return weight, bias, factors[0], factors[1]


def definition(scales: tuple[float, float], x: Tensor, *tensors: Tensor | None) -> Tensor:
    h = F.gelu(_linear(x, tensors[:4], scales[0]), approximate="tanh")                               # type: ignore[arg-type]
    return _linear(h, tensors[4:], scales[1])                                                        # type: ignore[arg-type]


def _linear(x: Tensor, layer: Layer, scale: float) -> Tensor:
    weight, bias, a, b = layer
    out = linear(x, weight, bias, before="gated_adaln")               # the same product as without the low-rank part
    if a is None or b is None:
        return out
    given = x if torch.is_autocast_enabled(x.device.type) else x.to(a.dtype)
    return out + (F.linear(F.linear(given, a), b) * scale).to(out.dtype)


class _LowRankMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, on_cpu: bool, scales: tuple[float, float], x: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.on_cpu, ctx.scales = on_cpu, scales
        h = _linear(x, tensors[:4], scales[0])                                                       # type: ignore[arg-type]
        ctx.save_for_backward(x, h, *tensors)
        return _linear(F.gelu(h, approximate="tanh"), tensors[4:], scales[1])                        # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, h, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():                                       # create_graph=True
            return None, *pullback(definition, (ctx.scales, x, *tensors), (dy,))
        w1, _, a1, b1, w2, _, a2, b2 = tensors
        (s1, s2), rows, dy = ctx.scales, x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        da = _input_gradient(dy, w2, a2, b2, s2)
        a, dh, _ = gelu_backward(ctx.on_cpu)(h.view(-1, h.shape[-1]), da, a2 is not None, False)
        dx = _input_gradient(dh, w1, a1, b1, s1).view(x.shape)
        first, second = _factor_gradients(dh, rows, a1, b1, s1), _factor_gradients(dy, a, a2, b2, s2)
        return None, None, dx, None, None, *first, None, None, *second


def _input_gradient(dy: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
    dx = dy @ weight
    return dx if a is None or b is None else torch.addmm(dx, dy @ b, a, alpha=scale)


def _factor_gradients(
    dy: Tensor, x: Tensor, a: Tensor | None, b: Tensor | None, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    """Of A and B."""
    if a is None or b is None:
        return None, None
    return scale * ((dy @ b).t() @ x), scale * (dy.t() @ (x @ a.t()))
