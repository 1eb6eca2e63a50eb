"""Public function qk_norm: checks and dispatch."""

from __future__ import annotations

from torch import Tensor

from rfkernels import checks, dispatch, native
from rfkernels.qk_norm import launch, operators, reference
from rfkernels.triton_support import INTERPRETED, interpreted, refuses_triton, too_many_rows


def qk_norm(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """RMSNorm of queries and keys over the head dimension: ``x * rsqrt(mean(x^2) + eps) * weight``.

    Args:
        q, k: [B, S, H, D], read with their strides if the last dimension's is 1 (views of a packed qkv are), else
            copied; their S and H may differ, their D and dtype may not. bf16, fp16, fp32 or fp64.
        q_weight, k_weight: [D].
        eps: added to the mean square. nn.RMSNorm's default is another: 1.2e-7, fp32's machine epsilon.
    Returns: (q, k) normalised, in the input's dtype; mean square in fp32.
    Raises: ValueError or TypeError if shapes, dtypes or devices do not fit; the message names the argument.
    Source: Esser et al. 2024, section 5.3.2; Dehghani et al. 2023.

    >>> q, k = torch.randn(2, 2, 16, 4, 32)
    >>> q, k = qk_norm(q, k, torch.ones(32), torch.ones(32))
    >>> q.shape
    torch.Size([2, 16, 4, 32])
    """
    made: tuple[Tensor, Tensor] | None = native.direct("qk_norm", q, k, q_weight, k_weight, eps)
    return made or dispatch.run("qk_norm", *_check(q, k, q_weight, k_weight, eps=eps))


def _check(q, k, q_weight, k_weight, *, eps=1e-6):
    checks.is_float("qk_norm", q=q, k=k, q_weight=q_weight, k_weight=k_weight)
    checks.has_rank("qk_norm", 4, "[B, S, H, D]", q=q, k=k)
    checks.same_dtype("qk_norm", "q", q, k=k)
    checks.same_device("qk_norm", "q", q, k=k, q_weight=q_weight, k_weight=k_weight)
    checks.has_shape("qk_norm", (q.shape[-1],), "to match q's head dimension", q_weight=q_weight, k_weight=k_weight)
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"qk_norm: k has head dimension {k.shape[-1]}; expected {q.shape[-1]}, that of q")
    checks.positive("qk_norm", eps=eps)
    q, k = checks.unit_stride(q=q, k=k)
    return q, k, q_weight, k_weight, eps


def _refuses(q, k, q_weight, k_weight, eps):
    if q.shape[-1] > launch.MAX_HEAD_DIM:
        return f"the kernels take head dimensions up to {launch.MAX_HEAD_DIM}, not {q.shape[-1]}"
    rows = [too_many_rows(x.shape[0] * x.shape[1] * x.shape[2]) for x in (q, k)]
    return rows[0] or rows[1] or refuses_triton(q, k, q_weight, k_weight)


dispatch.register(
    "qk_norm",
    _check,
    dispatch.Implementation(
        "triton", "q and k in one kernel; backward one and the sums of the weights' gradients", operators.qk_norm,
        _refuses, interpreted if INTERPRETED else None,
    ),
    dispatch.Implementation("native", "one pass forward, one backward", operators.native_qk_norm, native.refuses),
    dispatch.Implementation("reference", "plain PyTorch, op by op", reference.qk_norm),
)
