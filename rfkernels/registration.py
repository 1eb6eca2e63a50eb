"""How a fused op becomes a PyTorch operator: one forward and one backward, each with a fake implementation.

Everything torch.compile, export, selective activation checkpointing and `torch.library.opcheck` need to know about an
op is said here, once. `Library.define` is used instead of `custom_op` because it costs half as much per call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_library = torch.library.Library("rfkernels", "DEF")


@dataclass(frozen=True)
class Operator:
    """A registered operator: `forward` is differentiable, `backward` computes its gradients."""

    forward: Any
    backward: Any


def define(
    name: str,
    *,
    forward_schema: str,
    backward_schema: str,
    fake_forward: Callable[..., Any],
    fake_backward: Callable[..., Any],
    save: Callable[..., None],
    differentiate: Callable[..., Any],
) -> Operator:
    """Defines rfkernels::NAME and rfkernels::NAME_backward.

    Args:
        forward_schema, backward_schema: schema of each without its name, "(Tensor x) -> Tensor".
        fake_forward, fake_backward: the outputs' shapes, dtypes and strides without computing them.
        save: `setup_context(ctx, inputs, output)` of torch.library.register_autograd.
        differentiate: `backward(ctx, *grads)`; calls the registered backward operator.
    """
    for suffix, schema, fake in (("", forward_schema, fake_forward), ("_backward", backward_schema, fake_backward)):
        _library.define(f"{name}{suffix}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"rfkernels::{name}{suffix}", fake, lib=_library)
    torch.library.register_autograd(f"rfkernels::{name}", differentiate, setup_context=save, lib=_library)
    namespace = torch.ops.rfkernels
    return Operator(getattr(namespace, name).default, getattr(namespace, f"{name}_backward").default)


def implement(name: str, key: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
    """Gives an operator its code for a dispatch key: "CPU", "CUDA" or "CompositeExplicitAutograd" for any device."""
    _library.impl(name, forward, key)
    _library.impl(f"{name}_backward", backward, key)
