"""The adapted layers of a model, on and off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rfkernels.nn import LoraLinear


def layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The adapted layers of a model, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """Inside, a model is its base, exactly. Backward of what was computed outside must not run inside: activation
    checkpointing would compute it again without the adapter."""
    found = [module for _, module in layers(model)]
    before = [module.enabled for module in found]
    for module in found:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(found, before, strict=True):
            module.enabled = enabled
