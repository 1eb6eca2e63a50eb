"""How a fused implementation becomes a PyTorch operator: a forward and a backward, each with a fake implementation.

Everything torch.compile, export, selective activation checkpointing and `torch.library.opcheck` need to know about it
is said here, once. In plain eager mode nobody needs to see the operator, and the call goes straight to an
`autograd.Function` around the same code: crossing `torch.library` costs more on the host than a short kernel takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("rfkernels", "DEF")


_PLAIN = {torch.Tensor, torch.nn.Parameter, str, float, int, bool, type(None)}


def watched(args: tuple[Any, ...]) -> bool:
    """Whether something wants to see operators: a compiler, a dispatch mode such as selective checkpointing, a function
    transform, or a tensor that is not a plain one (DTensor)."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or not _PLAIN.issuperset(map(type, args))
    )


def _flat(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lists among the arguments spread out."""
    return tuple(inner for arg in args for inner in (arg if isinstance(arg, list) else (arg,)))


def operator(name: str, schema: str, code: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """An operator without a derivative, for use inside a backward; called directly where nobody watches.

    Args: name, schema, code, fake: as of an `Operator`'s forward.
    """
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, code, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rfkernels::{name}", fake, lib=_library)
    registered = getattr(torch.ops.rfkernels, name).default
    return lambda *args: registered(*args) if watched(args) else code(*args)


class Operator:
    """A differentiable operator, called like a function.

    Args:
        name: rfkernels::NAME is the forward, rfkernels::NAME_backward the backward.
        forward_schema, backward_schema: schema of each without its name, "(Tensor x) -> Tensor".
        forward, backward: the code, for any device. Outputs must not alias inputs or each other.
        direct_backward: the backward of plain eager mode, where outputs may be parts of one tensor; None: `backward`.
        fake_forward, fake_backward: the outputs' shapes, dtypes and strides without computing them.
        save: `setup_context(ctx, inputs, output)`, as for torch.library.register_autograd.
        differentiate: `(ctx, call, *grads) -> gradients of the inputs`; `call(*args)` runs the backward.
        after_list: if the forward is `(Tensor[] tensors, ...) -> Tensor[]`, the number of its other arguments.
    """

    def __init__(
        self,
        name: str,
        *,
        forward_schema: str,
        backward_schema: str,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        fake_forward: Callable[..., Any],
        fake_backward: Callable[..., Any],
        save: Callable[..., None],
        differentiate: Callable[..., Any],
        direct_backward: Callable[..., Any] | None = None,
        after_list: int | None = None,
    ) -> None:
        for full, schema, code, fake in (
            (name, forward_schema, forward, fake_forward),
            (f"{name}_backward", backward_schema, backward, fake_backward),
        ):
            _library.define(full + schema, tags=(torch.Tag.pt2_compliant_tag,))
            _library.impl(full, code, "CompositeExplicitAutograd")
            torch.library.register_fake(f"rfkernels::{full}", fake, lib=_library)
        self.forward = getattr(torch.ops.rfkernels, name).default
        self.backward = getattr(torch.ops.rfkernels, f"{name}_backward").default

        def run_backward(*args: Any) -> Any:
            return self.backward(*args) if watched(_flat(args)) else (direct_backward or backward)(*args)

        def through_library(ctx: Any, *grads: Any) -> Any:
            return differentiate(ctx, self.backward, *_flat(grads))

        torch.library.register_autograd(f"rfkernels::{name}", through_library, setup_context=save, lib=_library)

        def no_second(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(f"rfkernels::{name} has no second derivative; use rfkernels.backend('reference')")

        torch.library.register_autograd(f"rfkernels::{name}_backward", no_second, lib=_library)

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                if after_list is not None:
                    args = (list(args[:-after_list]), *args[-after_list:])
                output = forward(*args)
                save(ctx, args, output)
                return tuple(output) if after_list is not None else output

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, *grads: Any) -> Any:
                gradients = differentiate(ctx, run_backward, *grads)
                return gradients if after_list is None else _flat(gradients)

        self._direct = Direct
        self._lists = after_list is not None

    def __call__(self, *args: Any) -> Any:
        flat = _flat(args) if self._lists else args
        return self.forward(*args) if watched(flat) else self._direct.apply(*flat)
