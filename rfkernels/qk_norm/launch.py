"""Launches of qk_norm's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rfkernels.adaln.launch import column_sums
from rfkernels.triton_support import kernels_of, multiprocessors, on

MAX_HEAD_DIM = 1024
FORWARD, BACKWARD = 2048, 4096     # elements of a program at a time: 16 and 32 a thread with four warps
PROGRAMS_PER_SM = 4                # of a backward, for q and k together


_kernels = kernels_of(f"{__package__}.kernels")


def _settings(dim: int, elements: int) -> dict[str, Any]:
    block = 1 << max(4, (dim - 1).bit_length())
    return {"D": dim, "ROWS": max(1, elements // block), "BLOCK_D": block, "num_warps": 4, "enable_fp_fusion": True}


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> int:
    return x.shape[0] * x.shape[1] * x.shape[2]


def _sizes(q: Tensor, k: Tensor) -> list[int]:
    """Tokens, then heads, of both; rows are divided by them even where there are none."""
    return [max(1, t.shape[i]) for i in (1, 2) for t in (q, k)]


def qk_norm(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
    q_out, k_out, settings = _empty(q), _empty(k), _settings(q.shape[3], FORWARD)
    most = max(_rows(q), _rows(k))
    if most:
        with on(q.device):
            _kernels().qk_norm_fwd[(-(-most // settings["ROWS"]), 2)](
                q, k, q_weight, k_weight, q_out, k_out, q.stride()[:3], k.stride()[:3], *_sizes(q, k),
                _rows(q), _rows(k), eps, **settings,
            )  # fmt: skip
    return q_out, k_out


def qk_norm_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dq_weight, dk_weight)"""
    dq_out, dk_out, settings = _unit(dq_out), _unit(dk_out), _settings(q.shape[3], BACKWARD)
    q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
    dq, dk = _empty(q), _empty(k)
    weights = torch.empty_like(q_weight), torch.empty_like(k_weight)
    most, rows = max(_rows(q), _rows(k)), settings["ROWS"]
    if not most:
        return dq, dk, weights[0].zero_(), weights[1].zero_()
    programs = max(1, min(-(-most // rows), PROGRAMS_PER_SM * multiprocessors(q.device) // 2))
    spans = [-(-max(1, _rows(x)) // (programs * rows)) * rows for x in (q, k)]
    with on(q.device):
        partials = torch.empty((2, programs, q.shape[3]), dtype=torch.float32, device=q.device)
        strides = (t.stride()[:3] for t in (dq_out, dk_out, q, k))
        _kernels().qk_norm_bwd[(programs, 2)](
            dq_out, dk_out, q, k, q_weight, k_weight, dq, dk, *partials, *strides, *_sizes(q, k),
            _rows(q), _rows(k), *spans, eps, **settings,
        )  # fmt: skip
        column_sums(partials, *weights)
    return dq, dk, *weights
