"""Public function gelu_mlp: checks and dispatch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfkernels import checks, dispatch, native
from rfkernels.layers import plain
from rfkernels.mlp import fused, low_rank, reference
from rfkernels.triton_support import INTERPRETED, interpreted, refuses_triton


def gelu_mlp(x: Tensor, *layers: nn.Module | Tensor | None, **named: nn.Module | Tensor | None) -> Tensor:
    """``fc2(gelu(fc1(x)))`` with the tanh form of GELU: ``gelu_mlp(x, fc1, fc2)``.

    A layer that is more than its weights (an adapter, a quantised or parametrised layer, one with hooks) is called as
    it is. ``gelu_mlp(x, w1, b1, w2, b2)`` takes tensors, and knows nothing else: an adapter of the layer that they come
    from is left out without a word.

    Args:
        x: [..., C].
        fc1, fc2: nn.Linear of C to hidden and of hidden to out, or any modules of that kind. Or w1: [hidden, C], b1:
            [hidden] or None, w2: [out, hidden], b2: [out] or None.
    Returns: [..., out] in x's dtype (autocast's under autocast).
    Raises: ValueError or TypeError that names the argument.

    >>> fc1, fc2 = torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)
    >>> gelu_mlp(torch.randn(2, 16, 64), fc1, fc2).shape
    torch.Size([2, 16, 64])
    """
    if not named and (made := _direct(x, *layers)) is not None:
        return made
    checked = _check(x, *layers, **named)
    if checked is None:
        fc1, fc2 = _ordered(layers, named)
        if low_rank.takes(fc1, fc2):
            return low_rank.gelu_mlp(x, fc1, fc2)
        return fc2(F.gelu(fc1(x), approximate="tanh"))
    return dispatch.run("gelu_mlp", *checked)


def _direct(x: Tensor, *layers: nn.Module | Tensor | None) -> Tensor | None:
    """By the native code's entry point, which checks what it takes; None if it does not."""
    if len(layers) == 2 and all(isinstance(layer, nn.Linear) and plain(layer) for layer in layers):
        layers = tuple(getattr(layer, n) for layer in layers for n in ("weight", "bias"))
    return native.direct("gelu_mlp", x, *layers) if len(layers) == 4 else None


def _ordered(layers, named):
    """Layers or tensors in their order, however they were given."""
    names = ("fc1", "fc2") if named.keys() & {"fc1", "fc2"} else ("w1", "b1", "w2", "b2")
    unknown = named.keys() - set(names[len(layers) :])
    if unknown:
        raise TypeError(f"gelu_mlp: unexpected {', '.join(sorted(unknown))}; expected fc1, fc2 (or w1, b1, w2, b2)")
    return (*layers, *(named[n] for n in names[len(layers) :] if n in named))


def _check(x, *layers, **named):
    """The op's tensors; None if the layers have to be called."""
    op = "gelu_mlp"
    layers = _ordered(layers, named)
    if len(layers) == 2:
        for name, layer in zip(("fc1", "fc2"), layers, strict=True):
            if not isinstance(layer, nn.Module):
                raise TypeError(f"{op}: {name} is {type(layer).__name__}; expected a linear layer (or w1, b1, w2, b2)")
        if not all(map(plain, layers)):
            return None
        layers = tuple(t for layer in layers for t in (layer.weight, layer.bias))
    elif len(layers) != 4:
        raise TypeError(f"{op}: got {len(layers)} arguments after x; expected fc1, fc2 (or w1, b1, w2, b2)")
    w1, b1, w2, b2 = layers
    checks.is_float(op, x=x, w1=w1, w2=w2)
    if x.ndim == 0:
        raise ValueError(f"{op}: x has shape []; expected [..., C]")
    checks.has_rank(op, 2, "[hidden, C]", w1=w1)
    checks.has_shape(op, (w1.shape[0], x.shape[-1]), "to match x's channels", w1=w1)
    checks.has_rank(op, 2, "[out, hidden]", w2=w2)
    checks.has_shape(op, (w2.shape[0], w1.shape[0]), "to match w1", w2=w2)
    checks.same_device(op, "x", x, w1=w1, w2=w2)
    for name, bias, size in (("b1", b1, w1.shape[0]), ("b2", b2, w2.shape[0])):
        if bias is not None:
            checks.is_float(op, **{name: bias})
            checks.has_shape(op, (size,), "to match its weight", **{name: bias})
            checks.same_device(op, "x", x, **{name: bias})
    return x, w1, b1, w2, b2


def _refuses(x, w1, b1, w2, b2):
    return _several(x, w1, b1, w2, b2) or refuses_triton(x, w1, b1, w2, b2)


def _refuses_native(x, w1, b1, w2, b2):
    return _several(x, w1, b1, w2, b2) or native.refuses(x, w1, b1, w2, b2)


def _several(x, w1, b1, w2, b2):
    one = all(t is None or t.dtype == x.dtype for t in (w1, b1, w2, b2))
    if not one and not torch.is_autocast_enabled(x.device.type):
        return "x, w1, b1, w2 and b2 have several dtypes"
    return None


dispatch.register(
    "gelu_mlp",
    _check,
    dispatch.Implementation(
        "triton", "PyTorch's products, pre-activation kept, one kernel between them in the backward", fused.gelu_mlp,
        _refuses, interpreted if INTERPRETED else None,
    ),
    dispatch.Implementation(
        "native", "PyTorch's products, pre-activation kept, one pass between them in the backward",
        fused.native_gelu_mlp, _refuses_native,
    ),
    dispatch.Implementation("reference", "two linears", reference.gelu_mlp),
)
