"""Derivatives of fused code beyond the first: torch.func (grad, vjp, jvp, vmap, nested in any way), forward mode, and
`create_graph=True`.

The kernels give values and first derivatives. Tangents and further derivatives are those of the definition, the same
function in plain PyTorch. Forward mode inside forward mode runs the definition alone (`nested_forward`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

Args = tuple[Any, ...]


def transforming() -> bool:
    """Whether a function transform or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _levels() -> list[Any]:
    """What kinds of transforms are under way, outermost first."""
    return [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]


def only_functionalized() -> bool:
    return set(_levels()) == {TransformType.Functionalize}


def nested_forward() -> bool:
    """Whether forward mode runs inside forward mode: PyTorch takes an outer tangent past a function's own rule for an
    inner one, so such a rule would lose it."""
    return _levels().count(TransformType.Jvp) > 1


def refuses_transforms(what: str) -> str | None:
    """Why an implementation that only has a first derivative cannot run here, or None."""
    return f"{what} has no rule for function transforms and forward mode" if transforming() else None


def no_second_derivative(name: str) -> str:
    return f"{name} has no second derivative here; use rfkernels.backend('reference')"


def once(name: str, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients made while a graph of them is wanted, by code without a second derivative: asking for it raises."""
    refuse: Any = torch._C._functions.DelayedError(no_second_derivative(name).encode(), len(gradients))
    made: tuple[Tensor | None, ...] = refuse(*(g if g is None else g.detach().requires_grad_() for g in gradients))
    return made


class _First(torch.autograd.Function):
    """Identity of tensors whose way back has one derivative."""

    @staticmethod
    def forward(ctx: Any, name: str, *tensors: Tensor) -> Any:
        ctx.name = name
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return (None, *(once(ctx.name, *gradients) if torch.is_grad_enabled() else gradients))


def differentiable_once(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, for a call of code of somebody else's that has no second derivative: asking for one raises an error
    with our name in it. Costs nothing where no gradient is wanted, or under a compiler, which has its own."""
    wanted = [t for t in tensors if t.requires_grad] if torch.is_grad_enabled() else []
    if not wanted or torch.compiler.is_compiling() or transforming():
        return tensors
    guarded = iter(_First.apply(name, *wanted))
    return tuple(next(guarded) if t.requires_grad else t for t in tensors)


class Arguments:
    """Arguments of a function, its floating-point tensors apart from the rest."""

    def __init__(self, args: Args) -> None:
        self.places = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
        self.tensors = tuple(args[i] for i in self.places)
        self.rest = tuple(None if i in self.places else a for i, a in enumerate(args))

    def forget(self) -> Arguments:
        """Without the tensors, which autograd keeps."""
        self.tensors = ()
        return self

    def at_places(self, tensors: Iterable[Tensor]) -> dict[int, Tensor]:
        return dict(zip(self.places, tensors, strict=True))

    def joined(self, tensors: Iterable[Tensor]) -> Args:
        given = self.at_places(tensors)
        return tuple(given.get(i, a) for i, a in enumerate(self.rest))


def _pull(definition: Callable[..., Any], args: Arguments) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        made = definition(*args.joined(tensors))
        return (made,) if isinstance(made, Tensor) else tuple(made)

    made, pull, *_ = torch.func.vjp(outputs, *args.tensors)
    return made, pull


def pullback(definition: Callable[..., Any], args: Args, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Gradients of all args, None of what is no tensor, from those of the definition's outputs; differentiable."""
    split = Arguments(args)
    outputs, pull = _pull(definition, split)
    given = zip(gradients, outputs, strict=False)
    found = split.at_places(pull(tuple(torch.zeros_like(o) if g is None else g.to(o.dtype) for g, o in given)))
    return tuple(found.get(i) for i in range(len(args)))


def pushforward(definition: Callable[..., Any], args: Args, tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Tangents of the definition's outputs from those of args; differentiable. A pullback is linear, so the pushforward
    is the pullback of it: forward mode does not nest."""
    split = Arguments(args)
    outputs, pull = _pull(definition, split)
    push: Any = torch.func.vjp(pull, tuple(torch.zeros_like(o) for o in outputs))[1]
    given = ((t, tangents[i]) for i, t in zip(split.places, split.tensors, strict=True))
    made: tuple[Tensor, ...] = push(tuple(torch.zeros_like(t) if d is None else d.to(t.dtype) for t, d in given))[0]
    return made


def each(apply: Callable[..., Any], info: Any, in_dims: Args, args: Args) -> tuple[Any, Any]:
    """The vmap of a function: a call for each element."""
    if not info.batch_size:                                              # a call for the shapes alone
        given = zip(args, in_dims, strict=True)
        made = apply(*(a if d is None else a.new_zeros(a.shape[:d] + a.shape[d + 1 :]) for a, d in given))
        if isinstance(made, Tensor):
            return made.new_empty((0, *made.shape)), 0
        return tuple(t.new_empty((0, *t.shape)) for t in made), (0,) * len(made)
    rows = [
        apply(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(rows[0], Tensor):
        return torch.stack(rows), 0
    return tuple(torch.stack(column) for column in zip(*rows, strict=True)), (0,) * len(rows[0])


def fused(code: Callable[..., Any], definition: Callable[..., Any]) -> Callable[..., Any]:
    """`code(*args)` with every derivative taken through `definition(*args)`, which has the same outputs."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return code(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Args, output: Any) -> None:
            args = Arguments(inputs)
            ctx.save_for_backward(*args.tensors)
            ctx.save_for_forward(*args.tensors)
            ctx.args = args.forget()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            return pullback(definition, ctx.args.joined(ctx.saved_tensors), gradients)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            found = pushforward(definition, ctx.args.joined(ctx.saved_tensors), tangents)
            return found if len(found) > 1 else found[0]

        @staticmethod
        def vmap(info: Any, in_dims: Args, *args: Any) -> Any:
            return each(Fused.apply, info, in_dims, args)

    return Fused.apply
