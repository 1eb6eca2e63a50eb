"""Whether an op may read a layer's weights instead of calling it."""

from __future__ import annotations

from torch import nn


def plain(layer: nn.Module, kind: type = nn.Linear) -> bool:
    """Whether a layer's weights are all there is to it: no adapter, no hook, no other class, no parametrisation, no
    quantised or distributed weight. If not, it is called."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if type(layer) is not kind or hooked or "forward" in layer.__dict__:
        return False
    return not hasattr(layer.weight, "__tensor_flatten__")                            # it would stand for other tensors
