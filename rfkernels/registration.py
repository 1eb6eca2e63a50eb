"""How a fused implementation becomes a PyTorch operator: a forward and a backward, each with a fake implementation.

Everything torch.compile, export, selective activation checkpointing and `torch.library.opcheck` need to know about it
is said here, once. In plain eager mode nobody needs to see the operator, and the call goes straight to an
`autograd.Function` around the same code: crossing `torch.library` costs more on the host than a short kernel takes.
Under a function transform another one stands there, which has the rules for it: transforms.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rfkernels.transforms import (
    Arguments,
    each,
    fused,
    nested_forward,
    no_second_derivative,
    once,
    only_functionalized,
    pushforward,
    transforming,
)  # fmt: skip

NAMESPACE = __name__.partition(".")[0]
"""Of the operators: the package's name. A copy of the package under another name (rfkernels.hub) has its own."""
_library = torch.library.Library(NAMESPACE, "DEF")
_operators = getattr(torch.ops, NAMESPACE)
_backwards: dict[str, Callable[..., Any]] = {}          # by the forward's name, differentiable


def differentiable_backward(name: str, run: Callable[..., Any]) -> None:
    """What the native code calls for gradients that have a graph, or that somebody watches."""
    _backwards[name] = run


def backward_by_name(name: str, *args: Any) -> Any:
    return _backwards[name](*args)


batched = torch._C._functorch.is_legacy_batchedtensor        # of torch.autograd.grad(..., is_grads_batched=True)
_PLAIN = {torch.Tensor, torch.nn.Parameter, str, float, int, bool, torch.dtype, type(None)}


def watched(args: tuple[Any, ...]) -> bool:
    """Whether something wants to see operators: a compiler, a dispatch mode such as selective checkpointing, a function
    transform or forward mode, or a tensor that is not a plain one (DTensor)."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or transforming()
        or not _PLAIN.issuperset(map(type, args))
    )


def _flat(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lists among the arguments spread out."""
    return tuple(inner for arg in args for inner in (arg if isinstance(arg, list) else (arg,)))


def operator(
    name: str, schema: str, code: Callable[..., Any] | None, fake: Callable[..., Any]
) -> Callable[..., Any]:
    """An operator without a derivative, for use inside a backward; called directly where nobody watches.

    Args: name, schema, code, fake: as of an `Operator`'s forward.
    """
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    if code is not None:
        _library.impl(name, code, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    registered = getattr(_operators, name).default
    return lambda *args: registered(*args) if code is None or watched(args) else code(*args)


class Operator:
    """A differentiable operator, called like a function.

    Args:
        name: rfkernels::NAME is the forward, rfkernels::NAME_backward the backward.
        forward_schema, backward_schema: schema of each without its name, "(Tensor x) -> Tensor".
        forward, backward: the code, for any device; None where it is in csrc. Outputs must not alias inputs or each
            other.
        direct_backward: the backward of plain eager mode, where outputs may be parts of one tensor; None: `backward`.
        fake_forward, fake_backward: the outputs' shapes, dtypes and strides without computing them.
        save: `setup_context(ctx, inputs, output)`, as for torch.library.register_autograd.
        differentiate: `(ctx, call, *grads) -> gradients of the inputs`; `call(*args)` runs the backward.
        definition: the forward in plain PyTorch: its outputs, less those at the end that have no gradient.
        backward_definition: the backward in plain PyTorch. With both, transforms and any derivative are right; without
            them there is a first derivative only, and a second one raises.
        after_list: if the forward is `(Tensor[] tensors, ...) -> Tensor[]`, the number of its other arguments.
    """

    def __init__(
        self,
        name: str,
        *,
        forward_schema: str,
        backward_schema: str,
        forward: Callable[..., Any] | None,
        backward: Callable[..., Any] | None,
        fake_forward: Callable[..., Any],
        fake_backward: Callable[..., Any],
        save: Callable[..., None],
        differentiate: Callable[..., Any],
        direct_backward: Callable[..., Any] | None = None,
        definition: Callable[..., Any] | None = None,
        backward_definition: Callable[..., Any] | None = None,
        after_list: int | None = None,
    ) -> None:
        for full, schema, code, fake in (
            (name, forward_schema, forward, fake_forward),
            (f"{name}_backward", backward_schema, backward, fake_backward),
        ):
            _library.define(full + schema, tags=(torch.Tag.pt2_compliant_tag,))
            if code is not None:
                _library.impl(full, code, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{NAMESPACE}::{full}", fake, lib=_library)
        self.forward = getattr(_operators, name).default
        outputs = len(self.forward._schema.returns)
        self.backward = getattr(_operators, f"{name}_backward").default
        forward_code: Callable[..., Any] = forward or self.forward
        backward_code: Callable[..., Any] = backward or self.backward

        def run_backward(*args: Any) -> Any:
            flat = _flat(args)
            seen = watched(flat) or any(map(batched, (a for a in flat if isinstance(a, torch.Tensor))))
            return self.backward(*args) if seen else (direct_backward or backward_code)(*args)

        def run_apart(*args: Any) -> Any:                              # no output is a part of another tensor
            return self.backward(*args) if watched(args) else backward_code(*args)

        def through_library(ctx: Any, *grads: Any) -> Any:
            return differentiate(ctx, self.backward, *_flat(grads))

        torch.library.register_autograd(f"{NAMESPACE}::{name}", through_library, setup_context=save, lib=_library)

        def no_second(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(no_second_derivative(f"{NAMESPACE}::{name}"))

        torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", no_second, lib=_library)
        twice = None if backward_definition is None else fused(run_apart, backward_definition)

        def run_differentiable(*args: Any) -> Any:
            return twice(*args) if torch.is_grad_enabled() and twice is not None else self.backward(*args)

        differentiable_backward(name, run_differentiable)

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                if after_list is not None:
                    args = (list(args[:-after_list]), *args[-after_list:])
                output = forward_code(*args)
                save(ctx, args, output)
                return tuple(output) if after_list is not None else output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                if not torch.is_grad_enabled():
                    gradients = differentiate(ctx, run_backward, *grads)
                    return gradients if after_list is None else _flat(gradients)
                if twice is not None:                                 # create_graph=True
                    return differentiate(ctx, twice, *grads)
                with torch.no_grad():
                    gradients = differentiate(ctx, run_backward, *grads)
                return once(f"{NAMESPACE}::{name}", *_flat(gradients))

        def run_forward(*args: Any) -> Any:
            return self.forward(*args) if watched(args) else forward_code(*args)

        class Transformed(torch.autograd.Function):
            @staticmethod
            def forward(*args: Any) -> Any:
                return run_forward(*args)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                save(ctx, inputs, output)
                args = Arguments(inputs)
                ctx.save_for_forward(*args.tensors)
                ctx.args = args.forget()

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return differentiate(ctx, twice, *grads)

            @staticmethod
            def jvp(ctx: Any, *tangents: Any) -> Any:
                found = pushforward(definition, ctx.args.joined(ctx.saved_tensors), tangents)        # type: ignore[arg-type]
                return (*found, *[None] * (outputs - len(found))) if outputs > 1 else found[0]

            @staticmethod
            def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
                return each(Transformed.apply, info, in_dims, args)

        self._definition, self._transformed = definition, Transformed
        self._direct = Direct
        self._lists = after_list is not None

    def __call__(self, *args: Any) -> Any:
        flat = _flat(args) if self._lists else args
        if not watched(flat):
            return self._direct.apply(*flat)
        if self._definition is None or not transforming():
            return self.forward(*args)
        if torch.compiler.is_compiling() or nested_forward():
            return self._definition(*args)
        return self.forward(*args) if only_functionalized() else self._transformed.apply(*args)
