"""Launch of AdamW's kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from rfkernels.optim.reference import BLOCK, Settings, log
from rfkernels.triton_support import kernels_of, on

TILES = {True: (16, 8), False: (8, 8)}
"""(blocks, warps) of a program, with states of 8 bits and without: sixteen and eight elements a thread, 16 bytes of the
narrowest tensor."""
_kernels = kernels_of(f"{__package__}.kernels")


@torch.no_grad()
def adamw(
    parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], step: Tensor, settings: Settings,
    grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    """As `reference.adamw`; all tensors contiguous, on one device."""
    s, (rows, columns) = settings, parameter.shape
    per_row = -(-columns // BLOCK)
    count = rows * per_row
    if not count:
        return
    eight = state["exp_avg"].dtype == torch.int8
    blocks, warps = TILES[eight]
    nothing = step                                                       # a pointer that is not read
    with on(parameter.device):
        _kernels().adamw_step[(-(-count // blocks),)](
            parameter, gradient, state["exp_avg"], state["exp_avg_sq"], state.get("exp_avg_scale", nothing),
            state.get("exp_avg_sq_scale", nothing), step, nothing if grad_scale is None else grad_scale,
            nothing if found_inf is None else found_inf,
            count, columns, per_row, s.first_row, s.seed & 0x7FFFFFFF, s.lr, s.beta1, s.beta2,
            1 - s.beta1, 1 - s.beta2, log(s.beta1), log(s.beta2), s.eps, 1 - s.lr * s.weight_decay,
            EIGHT=eight, BF16=state["exp_avg"].dtype == torch.bfloat16,
            BF16_WEIGHT=parameter.dtype == torch.bfloat16, SCALED=grad_scale is not None,
            CHECKED=found_inf is not None, BLOCKS=blocks, BLOCK=BLOCK, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
