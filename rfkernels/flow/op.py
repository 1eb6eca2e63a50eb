"""Public functions rectified_flow and weighted_mse: checks and dispatch."""

from __future__ import annotations

from torch import Tensor

from rfkernels import checks, dispatch, native
from rfkernels.flow import operators, reference
from rfkernels.triton_support import INTERPRETED, interpreted, refuses_triton


def rectified_flow(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """A point on the straight path from data to noise, and the velocity there.

    ``z_t = (1 - t) x0 + t noise``, ``target = noise - x0``; t = 0 is data, t = 1 is noise.

    Args:
        x0, noise: [B, ...], one shape and dtype. t: [B]; fp32 (a rounded t is a different t).
    Returns: (z_t, target) in x0's dtype; one rounding each, from fp32.
    Raises: ValueError or TypeError that names the argument.
    Source: Esser et al. 2024, equation 13.

    >>> x0, noise, t = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8), torch.tensor([0.1, 0.9])
    >>> z, velocity = rectified_flow(x0, noise, t)
    >>> z.shape
    torch.Size([2, 16, 8, 8])
    """
    made: tuple[Tensor, Tensor] | None = native.direct("rectified_flow", x0, noise, t)
    return dispatch.run("rectified_flow", *_check_flow(x0, noise, t)) if made is None else made


def weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean over all elements of ``weight[b] * (prediction - target)^2``, summed in fp32.

    Args:
        prediction, target: [B, ...], one shape; their dtypes may differ. weight: [B].
    Returns: scalar, fp32.
    Raises: ValueError or TypeError that names the argument.

    >>> prediction, target = torch.ones(2, 16, 8, 8), torch.zeros(2, 16, 8, 8)
    >>> float(weighted_mse(prediction, target, torch.tensor([0.5, 1.5])))
    1.0
    """
    loss: Tensor | None = native.direct("weighted_mse", prediction, target, weight)
    return dispatch.run("weighted_mse", *_check_mse(prediction, target, weight)) if loss is None else loss


def _per_sample(op, like, x, **vectors):
    checks.is_float(op, **vectors)
    checks.has_shape(op, (x.shape[0],), f"one per sample of {like}", **vectors)
    checks.same_device(op, like, x, **vectors)


def _batched(op, **xs):
    checks.is_float(op, **xs)
    for name, x in xs.items():
        if x.ndim == 0 or x.numel() == 0:
            raise ValueError(f"{op}: {name} has shape {list(x.shape)}; expected [B, ...] with at least one element")


def _check_flow(x0, noise, t):
    _batched("rectified_flow", x0=x0, noise=noise)
    checks.same_shape("rectified_flow", "x0", x0, noise=noise)
    checks.same_dtype("rectified_flow", "x0", x0, noise=noise)
    checks.same_device("rectified_flow", "x0", x0, noise=noise)
    _per_sample("rectified_flow", "x0", x0, t=t)
    if t.dtype.itemsize < 4:
        raise TypeError(f"rectified_flow: t has dtype {t.dtype}; expected float32 or float64: a rounded t is another t")
    return x0, noise, t


def _check_mse(prediction, target, weight):
    _batched("weighted_mse", prediction=prediction, target=target)
    checks.same_shape("weighted_mse", "prediction", prediction, target=target)
    checks.same_device("weighted_mse", "prediction", prediction, target=target)
    _per_sample("weighted_mse", "prediction", prediction, weight=weight)
    return prediction, target, weight


def _refuses(first, second, per_sample):
    return refuses_triton(first, second)                     # t and weight may be fp64: they are read as fp32


def _refuses_native(first, second, per_sample):
    return native.refuses(first, second)


def _implementations(op, what, run, definition):
    return (
        dispatch.Implementation("triton", what, run, _refuses, interpreted if INTERPRETED else None),
        dispatch.Implementation(
            "native", "one pass forward, one backward", native.or_else(op, definition), _refuses_native
        ),
        dispatch.Implementation("reference", "plain PyTorch, op by op", definition),
    )


dispatch.register(
    "rectified_flow",
    _check_flow,
    *_implementations(
        "rectified_flow", "noising and target in one kernel", operators.rectified_flow, reference.rectified_flow
    ),
)
dispatch.register(
    "weighted_mse",
    _check_mse,
    *_implementations(
        "weighted_mse", "one kernel each way, sums in a fixed order", operators.weighted_mse, reference.weighted_mse
    ),
)
