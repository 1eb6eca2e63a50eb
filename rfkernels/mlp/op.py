"""Public function gelu_mlp: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from rfkernels import checks, dispatch
from rfkernels.mlp import fused, reference
from rfkernels.triton_support import INTERPRETED, interpreted, refuses_triton


def gelu_mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """``gelu(x @ w1.T + b1) @ w2.T + b2`` with the tanh form of GELU.

    Args:
        x: [..., C]. w1: [hidden, C], b1: [hidden] or None. w2: [out, hidden], b2: [out] or None; layouts of nn.Linear.
    Returns: [..., out] in x's dtype (autocast's under autocast).
    Raises: ValueError or TypeError that names the argument.
    """
    return dispatch.run("gelu_mlp", *_check(x, w1, b1, w2, b2))


def _check(x, w1, b1, w2, b2):
    op = "gelu_mlp"
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
    one = all(t is None or t.dtype == x.dtype for t in (w1, b1, w2, b2))
    if not one and not torch.is_autocast_enabled(x.device.type):
        return "x, w1, b1, w2 and b2 have several dtypes"
    return refuses_triton(x, w1, b1, w2, b2)


dispatch.register(
    "gelu_mlp",
    _check,
    dispatch.Implementation(
        "triton", "PyTorch's products, pre-activation kept, one kernel between them in the backward", fused.gelu_mlp,
        _refuses, interpreted if INTERPRETED else None,
    ),
    dispatch.Implementation("reference", "two linears", reference.gelu_mlp),
)
