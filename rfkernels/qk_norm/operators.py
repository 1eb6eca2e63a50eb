"""The registered operator of qk_norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rfkernels import native
from rfkernels.qk_norm import launch, reference
from rfkernels.registration import Operator
from rfkernels.transforms import pullback


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, call: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return *call(dq, dk, *ctx.saved_tensors, ctx.eps), None


def _backward(dq_out: Tensor, dk_out: Tensor, *inputs: Any) -> tuple[Any, ...]:
    """The backward by its definition."""
    return pullback(reference.qk_norm, inputs, (dq_out, dk_out))[:4]


def _operator(name: str, forward: Any, backward: Any) -> Operator:
    return Operator(
        name,
        forward_schema="(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps) -> (Tensor, Tensor)",
        backward_schema="(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight,"
        " float eps) -> (Tensor, Tensor, Tensor, Tensor)",
        forward=forward,
        backward=backward,
        fake_forward=lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
        fake_backward=lambda dq, dk, *tensors: tuple(t.new_empty(t.shape) for t in tensors[:4]),
        save=_save,
        differentiate=_differentiate,
        definition=reference.qk_norm,
        backward_definition=_backward,
    )


_native = _operator("qk_norm_native", None, None)
qk_norm = _operator("qk_norm", launch.qk_norm, launch.qk_norm_backward)


def native_qk_norm(*args: Any) -> tuple[Tensor, Tensor]:
    made: tuple[Tensor, Tensor] | None = native.direct("qk_norm", *args)
    return _native(*args) if made is None else made
