"""AdamW by the native code (csrc/cpu/optim.h): on a CPU, the definition's operations with exact roots."""

from __future__ import annotations

import torch
from torch import Tensor

from rfkernels import native
from rfkernels.optim.reference import Settings, log, mixed

DTYPES = (torch.float32, torch.bfloat16)


def refuses(parameter: Tensor, gradient: Tensor) -> str | None:
    """Why it cannot run on these, or None."""
    for name, tensor in (("parameter", parameter), ("gradient", gradient)):
        if tensor.dtype not in DTYPES or not tensor.is_contiguous():
            kind = "contiguous" if tensor.is_contiguous() else "not contiguous"
            return f"the {name} is {tensor.dtype} and {kind}; expected fp32 or bf16, contiguous"
    return native.refuses(parameter, gradient)


@torch.no_grad()
def adamw(
    parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], step: Tensor, settings: Settings,
    grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    """As `reference.adamw`; all tensors contiguous, on a CPU."""
    s = settings
    if not parameter.numel() or (found_inf is not None and found_inf.item()):
        return
    first, second = (-torch.expm1(step * log(beta)).item() for beta in (s.beta1, s.beta2))
    numbers = (s.lr, s.beta1, s.beta2, 1 - s.beta1, 1 - s.beta2, first, second, s.eps, 1 - s.lr * s.weight_decay)
    key = int(mixed(step.long() ^ (s.seed & 0xFFFFFFFF)))
    native.entry.adamw(
        parameter, gradient, state["exp_avg"], state["exp_avg_sq"], state.get("exp_avg_scale"),
        state.get("exp_avg_sq_scale"), numbers, None if grad_scale is None else grad_scale.item(), key, s.first_row,
    )  # fmt: skip
