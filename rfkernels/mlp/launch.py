"""Launch of the MLP's kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from rfkernels.adaln.launch import column_sums
from rfkernels.launch_tables import tile_launch
from rfkernels.triton_support import MAX_GRID, device_name, kernels_of, multiprocessors, on

PROGRAMS_PER_SM = 8


_kernels = kernels_of(f"{__package__}.kernels")


def gelu_backward(h: Tensor, da: Tensor, value: bool, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(gelu(h), dh, sum of dh over all rows) of h and da, the gradient of gelu(h), [N, C]; the first [0] if not
    `value`, the last [0] if not `bias`."""
    h, da = h.contiguous(), da.contiguous()
    dh = torch.empty_like(h)
    a, db = torch.empty_like(h) if value else h.new_empty(0), h.new_empty(h.shape[1] if bias else 0)
    if not h.numel():
        return a, dh, db.zero_()
    rows, channels = h.shape
    launch = tile_launch("gelu_bwd", channels, device_name(h.device))
    columns = -(-channels // launch.chunk)
    wanted = -(-PROGRAMS_PER_SM * multiprocessors(h.device) // columns)
    splits = max(1, min(-(-rows // launch.rows), wanted, MAX_GRID))
    span = -(-rows // (splits * launch.rows)) * launch.rows
    splits = -(-rows // span)
    with on(h.device):
        partials = torch.empty(splits if bias else 0, channels, dtype=torch.float32, device=h.device)
        _kernels().gelu_bwd[(columns, splits)](
            h, da, a, dh, partials, rows, span, C=channels, VALUE=value, BIAS=bias, ROWS=launch.rows,
            CHUNK=launch.chunk, num_warps=launch.warps, enable_fp_fusion=True,
        )  # fmt: skip
        if bias:
            column_sums(partials[None], db)
    return a, dh, db
