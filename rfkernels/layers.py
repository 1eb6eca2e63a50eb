"""Layers of torch.nn: where they are made, and whether an op may read their weights instead of calling them."""

from __future__ import annotations

import torch
from torch import nn

Device = torch.device | str | int | None


def plain(layer: nn.Module, kind: type = nn.Linear) -> bool:
    """Whether a layer's weights are all there is to it: no adapter, no hook, no other class, no parametrisation, no
    quantised or distributed weight. If not, it is called."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if type(layer) is not kind or hooked or "forward" in layer.__dict__:
        return False
    if type(layer._parameters.get("weight")) is nn.Parameter:
        return True
    return not hasattr(layer.weight, "__tensor_flatten__")                            # it would stand for other tensors
